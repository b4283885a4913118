"""Who reads a tensor while a module runs."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Readers = set[nn.Module | None]
"""Layers; ``None`` stands for whatever runs outside of them."""


@dataclass
class Output:
    """What one call of a layer returned, without keeping it alive.

    Attributes:
        layer: the layer.
        axes: how many the tensor has.
        tensor: gives the tensor, or ``None`` once nothing holds it any more.
        readers: the layers in which an operator took it as an argument, be it to write.
    """

    layer: nn.Module
    axes: int
    tensor: Callable[[], Tensor | None]
    readers: Readers = field(default_factory=set)


class Reads(TorchDispatchMode):
    """While it is on, notes the calls of some layers, and who reads their outputs, parameters and buffers.

    It sees every operator below autograd, so that views, methods and functions of all kinds count.

    Args:
        layers: that do not call each other.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.calls: Counter[nn.Module] = Counter()
        self.outputs: list[Output] = []
        own = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
        self.readers: dict[int, Readers] = {id(tensor): set() for tensor in own}
        self._running: nn.Module | None = None
        self._latest: dict[int, Output] = {}  # by the id of the tensor, which a later one may have again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if id(tensor) in self.readers:
                self.readers[id(tensor)].add(self._running)
            output = self._latest.get(id(tensor))
            if output is not None and output.tensor() is tensor:
                output.readers.add(self._running)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Turn it on."""
        hooks = [layer.register_forward_pre_hook(self._begin) for layer in self.layers]
        hooks += [layer.register_forward_hook(self._end) for layer in self.layers]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, layer: nn.Module, args: Any) -> None:
        self._running = layer

    def _end(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._running = None
        self.calls[layer] += 1
        if isinstance(output, Tensor):
            self._latest[id(output)] = Output(layer, output.dim(), weakref.ref(output))
            self.outputs.append(self._latest[id(output)])
