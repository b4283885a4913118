"""What all quantized layers have in common."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_qinit.config import LayerConfig
from lightning_qinit.quantizers import Quantizer


class QuantizedLayer(nn.Module):
    """Mixin of all quantized layers.

    A subclass states which of its parameters are quantized weights, which inputs it quantizes, and computes its
    forward pass with :meth:`quantize_weight` and :meth:`quantize_input`. A row in ``QUANTIZED_LAYERS`` puts it to use.

    Attributes:
        weight_quantizer: a quantizer; several by the name of the parameter, in layers with several; or ``None``.
        input_quantizer: a quantizer; several by the name of the input; or ``None``.
        quant_config: the settings that the layer was inserted with.
    """

    float_class: ClassVar[type[nn.Module]]
    output_axis: ClassVar[int] = 0
    """The axis of the weights along which output channels run."""
    inputs: ClassVar[tuple[str, ...]] = ("input",)
    """Names of the inputs that are quantized."""
    optional_inputs: ClassVar[tuple[str, ...]] = ()
    """Those of them that may never be seen, because another quantizer serves them."""

    quant_config: LayerConfig
    weight_quantizer: nn.Module | None
    input_quantizer: nn.Module | None

    @classmethod
    def accepts(cls, layer: nn.Module) -> bool:
        """Whether a float layer of the right type can be quantized.

        Not one with complex, integer or no weights, nor one whose ``forward`` was replaced.
        """
        if "forward" in vars(layer):
            return False
        weights = [getattr(layer, name) for name in cls.weight_names(layer)]
        return all(weight.is_floating_point() and weight.numel() > 0 for weight in weights)

    @classmethod
    def weight_names(cls, layer: nn.Module) -> tuple[str, ...]:
        """Names of the parameters that are quantized as weights."""
        return ("weight",)

    @classmethod
    def batch_axis(cls, layer: nn.Module) -> int:
        """The axis of the inputs that runs over samples."""
        return 0

    @property
    def linear(self) -> bool:
        """Whether the output is linear in the one weight, so that it is known which inputs each element meets."""
        return False

    def weights(self) -> dict[str, Tensor]:
        """The parameters that have a quantizer, by the same names as in :meth:`quantizers`."""
        names = self.weight_names(self)
        found = {name: getattr(self, name) for name in names}
        if len(names) == 1:
            found = {"weight": found[names[0]]}
        return found if self.weight_quantizer is not None else {}

    def inputs_met(self, what: str) -> tuple[str, ...]:
        """Which inputs a weight is multiplied with, and its outputs the sums of.

        Args:
            what: one of :meth:`weights`.

        Returns:
            Names from ``inputs``, for equal parts along the output axis in their order; none if the weight meets
            nothing that the layer is given, or is not summed over.
        """
        return ()

    def outputs_fed(self, weight: Tensor) -> Tensor:
        """For every element of a weight a number of the output that it feeds, broadcastable to the weight."""
        shape = [1] * weight.dim()
        shape[self.output_axis] = -1
        return torch.arange(weight.shape[self.output_axis], device=weight.device).view(shape)

    def weight_quantizers(self) -> dict[str, Quantizer]:
        """By what they quantize: ``"weight"``, or the names of the parameters."""
        return _by_name(self.weight_quantizer, "weight")

    def parameter_quantizers(self) -> dict[str, Quantizer]:
        """Those of weights by the names of the parameters, also where there is only one."""
        quantizers = self.weight_quantizers()
        return dict(zip(self.weight_names(self), quantizers.values(), strict=True)) if quantizers else {}

    def input_quantizers(self) -> dict[str, Quantizer]:
        """By what they quantize: ``"input"``, or the names of the inputs."""
        return _by_name(self.input_quantizer, "input")

    def float_inputs(self) -> list[str]:
        """The names of the inputs that have no quantizer."""
        return [what for what in self.inputs if what not in self.input_quantizers()]

    def quantizers(self) -> dict[str, Quantizer]:
        """All that there are, those of weights first."""
        return self.weight_quantizers() | self.input_quantizers()

    @property
    def awaits_calibration(self) -> bool:
        """Whether no quantizer is calibrated: the layer is new, or did not run so far."""
        return not any(quantizer.is_calibrated for quantizer in self.quantizers().values())

    def quantize_weight(self, weight: Tensor, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """A weight as it is used: quantized, or as it is if weights stay in float.

        Args:
            weight: the weight.
            name: its name, in layers with several.
            dtype: of the quantized weight; ``None``: its own.
        """
        return _quantize(self.weight_quantizer, weight, name, dtype=dtype)

    def quantize_input(
        self, x: Tensor, name: str = "input", samples: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """An input as it is used: quantized, or as it is if inputs stay in float.

        Args:
            x: the input.
            name: one of ``inputs``.
            samples: how many samples it holds, where that is not the size of its batch axis.
            dtype: of the quantized input; ``None``: its own.
        """
        return _quantize(self.input_quantizer, x, name, samples, dtype)


def held(named: Mapping[str, nn.Module]) -> nn.Module | None:
    """How a layer holds its quantizers: alone, or several by name; ``None`` for none."""
    return nn.ModuleDict(named) if len(named) > 1 else next(iter(named.values()), None)


def _by_name(held: nn.Module | None, role: str) -> dict[str, Quantizer]:
    named = dict(held.items()) if isinstance(held, nn.ModuleDict) else {role: held}
    # what an export has put in their place learns no more
    return {name: quantizer for name, quantizer in named.items() if isinstance(quantizer, Quantizer)}


def _quantize(
    held: nn.Module | None,
    x: Tensor,
    name: str,
    samples: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    quantizer = held[name] if isinstance(held, nn.ModuleDict) else held
    return x if quantizer is None else quantizer(x, samples, dtype)
