"""Watching what flows into the quantizers while a module runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qinit.calibration.sketch import Sketch
from lightning_qinit.functional.sample import float64_device
from lightning_qinit.insertion import QuantizedLayer


class Observation:
    """What was seen of a set of layers.

    Attributes:
        inputs: one sketch per layer that has an input quantizer and ran.
        first_run: layers in the order in which they first ran.
        last_run: the layer that ran last in the first batch; ``None`` if none did.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Sketch] = {}
        self.first_run: list[str] = []
        self.last_run: str | None = None
        self._first_batch = True

    def end_batch(self) -> None:
        """Tell that a batch is complete: the order of layers is that of the first."""
        self._first_batch = self._first_batch and not self.first_run

    def _ran(self, name: str) -> None:
        if self._first_batch:
            self.last_run = name
        if name not in self.first_run:
            self.first_run.append(name)

    def _saw(self, name: str, x: Tensor) -> None:
        if x.is_floating_point():
            self.inputs.setdefault(name, Sketch(float64_device(x))).update(x)


@contextmanager
def observe(layers: dict[str, QuantizedLayer]) -> Iterator[Observation]:
    """Watch the layers while the context is open: the order in which they run, and their inputs.

    Runs eagerly, also where the module is compiled, since compiled code need not call hooks.
    """
    observation = Observation()
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_runs(observation, name)))
            if layer.input_quantizer is not None:
                handles.append(layer.input_quantizer.register_forward_pre_hook(_sees(observation, name)))
        with torch.compiler.set_stance("force_eager"):
            yield observation
    finally:
        for handle in handles:
            handle.remove()


def _runs(observation: Observation, name: str) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        observation._ran(name)

    return hook


def _sees(observation: Observation, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        observation._saw(name, args[0])

    return hook
