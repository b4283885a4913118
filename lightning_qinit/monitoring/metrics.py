"""Quantization error as torchmetrics metrics, and the two functions they are made of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def quantization_error_update(quantized: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of the error and of the signal, 0-d each, in float32 at least."""
    if quantized.shape != original.shape:
        raise ValueError(
            "`quantized` and `original` must have the same shape, "
            f"got {tuple(quantized.shape)} and {tuple(original.shape)}."
        )
    dtype = torch.promote_types(original.dtype, torch.float32)
    original, quantized = original.detach().to(dtype), quantized.detach().to(dtype)
    return (quantized - original).square().sum(), original.square().sum()


def quantization_error_compute(noise: Tensor, signal: Tensor) -> Tensor:
    """The relative squared error ``noise / signal``; 0 where there is no noise."""
    return torch.where(noise == 0, 0.0, noise / signal)


def sqnr_db_compute(noise: Tensor, signal: Tensor) -> Tensor:
    """The signal-to-quantization-noise ratio in dB, ``10 log10(signal / noise)``; infinite without noise."""
    return torch.where(noise == 0, torch.inf, 10 * torch.log10(signal / noise))


class QuantizationError(Metric):
    """Relative squared error of quantized values, ``sum (q - x)^2 / sum x^2``: 0 is lossless, 1 loses everything.

    As input to ``forward`` and ``update`` the metric takes two tensors of the same shape, ``quantized`` and
    ``original``, and returns a 0-d tensor.

    Example:
        >>> import torch
        >>> metric = QuantizationError()
        >>> metric(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        tensor(0.1000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    noise: Tensor
    signal: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("noise", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("signal", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, quantized: Tensor, original: Tensor) -> None:
        """Add a batch of values."""
        noise, signal = quantization_error_update(quantized, original)
        self.noise = self.noise + noise
        self.signal = self.signal + signal

    def compute(self) -> Tensor:
        """The error over all values since the last reset."""
        return quantization_error_compute(self.noise, self.signal)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one or several values, the present one by default (see ``torchmetrics.Metric.plot``)."""
        return self._plot(val, ax)


class SignalToQuantizationNoiseRatio(QuantizationError):
    """Signal-to-quantization-noise ratio in dB, ``10 log10(sum x^2 / sum (q - x)^2)``.

    As input to ``forward`` and ``update`` the metric takes two tensors of the same shape, ``quantized`` and
    ``original``, and returns a 0-d tensor.

    Example:
        >>> import torch
        >>> metric = SignalToQuantizationNoiseRatio()
        >>> metric(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        tensor(10.)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The ratio over all values since the last reset."""
        return sqnr_db_compute(self.noise, self.signal)
