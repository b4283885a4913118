"""Watching what flows into the quantizers while a module runs."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_qinit.calibration.config import Criterion
from lightning_qinit.calibration.count import FEW, Counter, Tally
from lightning_qinit.calibration.sketch import Sketch
from lightning_qinit.functional.sample import float64_device
from lightning_qinit.insertion import QuantizedLayer

_CHUNK = 2**18  # values summed at a time: few enough to stay in the cache


class Observation:
    """What was seen of a set of layers.

    Attributes:
        inputs: one sketch per input quantizer that saw data, by its logged name.
        first_run: layers in the order in which they first ran.
        last_run: the layer that ran last in the first batch; ``None`` if none did.
        criterion: what was seen beyond that: ``"fisher"`` and ``"hessian"`` importances, ``"output"`` moments.
        weight_importance: a tensor like the weight per weight quantizer.
        input_importance: a weighted sketch per input quantizer.
        moments: of every input of a layer that is not quantized, by the same names as ``inputs``: ``(3,)`` float64,
            how many finite values it had, their sum and their sum of squares.
    """

    def __init__(self, criterion: Criterion = "mse") -> None:
        self.inputs: dict[str, Sketch] = {}
        self.first_run: list[str] = []
        self.last_run: str | None = None
        self.criterion = criterion
        self.weight_importance: dict[str, Tensor] = {}
        self.input_importance: dict[str, Sketch] = {}
        self.moments: dict[str, Tensor] = {}
        self._first_batch = True
        self._open = True
        self._used: dict[str, Tensor] = {}  # weights of this batch: FSDP2 puts others in their place once they are used
        self._seen: list[tuple[str, Tensor]] = []  # inputs of this batch that wait for their gradient
        self._counters: dict[torch.device, Counter] = {}
        self._tallies = WeakTensorKeyDictionary()  # version and tally of this batch's inputs that still exist

    def end_batch(self) -> None:
        """Tell that a batch is complete: the order of layers is that of the first."""
        self._first_batch = self._first_batch and not self.first_run
        self._seen.clear()
        self._used.clear()
        self._tallies.clear()

    def differentiate(self, losses: Sequence[Tensor]) -> None:
        """Add the squared gradients of a batch's loss (the empirical Fisher information, taken batch by batch)."""
        weights = [(name, w) for name, w in self._used.items() if w.requires_grad]
        total = torch.stack([loss.sum() for loss in losses]).sum()
        tensors = [tensor for _, tensor in weights + self._seen]
        self._open = False  # activation checkpointing runs layers once more
        try:
            gradients = torch.autograd.grad(total, tensors, allow_unused=True)
        finally:
            self._open = True
        squares = [None if g is None else g.to(float64_device(g)).double().square() for g in gradients]
        for (name, _), square in zip(weights, squares[: len(weights)], strict=True):
            if square is not None:
                self.add_weight_importance(name, square)
        for (name, x), square in zip(self._seen, squares[len(weights) :], strict=True):
            if square is not None:
                sketch = self.input_importance.setdefault(name, Sketch(float64_device(x), weighted=True))
                sketch.update(x, square)

    def add_weight_importance(self, name: str, importance: Tensor) -> None:
        """Add to the importance of a weight."""
        self.weight_importance[name] = self.weight_importance.get(name, torch.zeros_like(importance)) + importance

    def moments_of(self, name: str) -> Tensor | None:
        """Count, sum and sum of squares of an input, ``(3,)`` float64; ``None`` if it was not seen."""
        if name not in self.inputs:
            return self.moments.get(name)
        sample = self.inputs[name].sample()
        return torch.stack((sample.count, (sample.weights * sample.values).sum(1), sample.energy))[:, 0]

    def add_moments(self, name: str, x: Tensor) -> None:
        """Add the values of an input."""
        total = self.moments.setdefault(name, torch.zeros(3, dtype=torch.float64, device=float64_device(x)))
        for part in x.detach().to(total.device).flatten().split(_CHUNK):
            values = part.double()
            finite = values.isfinite()
            values = torch.where(finite, values, 0.0)
            total += torch.stack((finite.sum(), values.sum(), values.square().sum()))

    def _ran(self, name: str) -> None:
        if self._first_batch:
            self.last_run = name
        if name not in self.first_run:
            self.first_run.append(name)

    def _saw(self, name: str, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if self._open:
            device = float64_device(x)
            if name not in self.inputs:
                self.inputs[name] = Sketch(device)
            self.inputs[name].add(self._count(x, self._counters.setdefault(device, Counter(device))))
        if self.criterion == "fisher":
            x = x if x.requires_grad else x.detach().requires_grad_()
            if self._open:
                self._seen.append((name, x))
        return x

    def _count(self, x: Tensor, counter: Counter) -> Tally:
        """Count the values of an input; only once, where several layers take the same tensor."""
        if x.is_inference() or x.numel() <= FEW:  # nothing tells whether an inference tensor was changed
            return counter.count(x)
        version, tally = self._tallies.get(x, (None, None))
        if tally is None or version != x._version:
            tally = counter.count(x)
            self._tallies[x] = x._version, tally
        return tally


@contextmanager
def observe(layers: Mapping[str, QuantizedLayer], criterion: Criterion = "mse") -> Iterator[Observation]:
    """Watch the layers while the context is open: the order in which they run, and their inputs.

    With ``"hessian"`` also the mean square of the inputs that each weight meets, with ``"output"`` the moments of
    inputs that are not quantized. With ``"fisher"`` gradients must be on, and :meth:`Observation.differentiate` be
    called with the loss of each batch.

    Runs eagerly, also where the module is compiled, since compiled code need not call hooks.
    """
    observation = Observation(criterion)
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(_runs(observation, name), with_kwargs=True))
            for what, quantizer in layer.input_quantizers().items():
                handles.append(quantizer.register_forward_pre_hook(_sees(observation, f"{name}.{what}")))
        with torch.compiler.set_stance("force_eager"):
            yield observation
    finally:
        for handle in handles:
            handle.remove()


def _runs(observation: Observation, name: str) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, QuantizedLayer)
        observation._ran(name)
        if observation.criterion == "fisher" and observation._open:
            observation._used.update({f"{name}.{what}": weight for what, weight in layer.weights().items()})
        if observation.criterion == "hessian" and layer.linear and "weight" in layer.weights():
            observation.add_weight_importance(f"{name}.weight", _squares_met(layer, args, kwargs))
        if observation.criterion == "output" and layer.inputs and layer.weights():
            given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
            for what in layer.float_inputs():
                x = given[what].data if isinstance(given[what], PackedSequence) else given[what]
                observation.add_moments(f"{name}.{what}", x)

    return hook


def _sees(observation: Observation, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (observation._saw(name, args[0]),)

    return hook


def _squares_met(layer: QuantizedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The sum of squares of the inputs that each element of the weight is multiplied with.

    The output is linear in the weight, so this is the gradient of its sum, taken on squared inputs.
    """

    def squared(x: Any) -> Any:
        return x.detach().float().square() if isinstance(x, Tensor) and x.is_floating_point() else x

    (name,) = layer.weight_names(layer)
    zero = torch.zeros_like(getattr(layer, name), dtype=torch.float32, requires_grad=True)
    twin: Any = object.__new__(layer.float_class)  # shares everything but what is set here
    vars(twin).update(vars(layer))
    vars(twin).pop(name, None)  # where pruning keeps the masked one
    vars(twin)["_parameters"] = {**dict.fromkeys(layer._parameters), name: zero}
    if hasattr(twin, "scale_grad_by_freq"):
        vars(twin)["scale_grad_by_freq"] = False
    with torch.enable_grad(), torch.autocast(zero.device.type, enabled=False):
        output = twin.forward(*map(squared, args), **{key: squared(value) for key, value in kwargs.items()})
        (gradient,) = torch.autograd.grad(output.sum(), zero)
    return gradient.to(float64_device(gradient)).double()
