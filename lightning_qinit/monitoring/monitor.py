"""What each quantizer does while training, measured on the values that training sees."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_qinit.insertion import QuantizedLayer, named_quantizers
from lightning_qinit.monitoring.metrics import (
    quantization_error_compute,
    quantization_error_update,
    sqnr_db_compute,
)
from lightning_qinit.quantizers import Quantizer

AGGREGATES = ("quant_error/mean", "quant_error/max")


class Monitor:
    """Measures steps and errors of the quantizers, on the batches between :meth:`open` and :meth:`close` only.

    Measuring happens in forward hooks on the values that pass through the quantizers, and nothing is copied from
    the device before :meth:`close`, which takes all numbers in one transfer.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self.quantizers = named_quantizers(layers)
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, Tensor] = {}

    def open(self) -> None:
        """Start measuring; a second call before :meth:`close` goes on (gradient accumulation)."""
        if not self._handles:
            self._handles = [q.register_forward_hook(self._measure(name)) for name, q in self.quantizers.items()]

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Stop measuring and return what was measured by its logged name.

        Args:
            reduce: sums a tensor over all ranks.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        # ranks may have run different layers; all reduce the same tensor
        device = next(iter(self.quantizers.values())).initial_step.device
        zeros = torch.zeros(2, device=device)
        sums = reduce(torch.stack([self._sums.get(name, zeros) for name in self.quantizers]))
        steps = torch.stack([self._steps.get(name, q.step.detach().mean()) for name, q in self.quantizers.items()])
        noise, signal = sums.unbind(1)
        table = torch.stack(
            (steps, quantization_error_compute(noise, signal), sqnr_db_compute(noise, signal), signal)
        ).tolist()
        self._sums, self._steps = {}, {}
        values: dict[str, float] = {}
        errors = []
        for name, step, error, sqnr, energy in zip(self.quantizers, *table, strict=True):
            if not self.quantizers[name].active:
                continue
            values[f"quant_step/{name}"] = step
            if energy > 0:
                values[f"quant_error/{name}"] = error
                if error > 0:  # without noise the ratio is infinite, which loggers cannot draw
                    values[f"quant_sqnr_db/{name}"] = sqnr
                errors.append(error)
        return {**values, **aggregates(errors)}

    def _measure(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            assert isinstance(module, Quantizer)
            if module.active:
                sums = torch.stack(quantization_error_update(output, module.transform(args[0]))).float()
                self._sums[name] = self._sums[name] + sums if name in self._sums else sums
                self._steps[name] = module.step.detach().mean()

        return hook


def aggregates(errors: list[float]) -> dict[str, float]:
    """The mean and the worst of all relative errors, by their logged names; nothing if there are none."""
    return dict(zip(AGGREGATES, (sum(errors) / len(errors), max(errors)), strict=True)) if errors else {}
