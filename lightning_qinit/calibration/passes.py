"""The calibration batches, run through a module as often as a choice of steps needs it."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_qinit.calibration.batchnorm import Statistics, batch_statistics
from lightning_qinit.calibration.config import CalibrationConfig, Criterion
from lightning_qinit.calibration.initialize import choose
from lightning_qinit.calibration.observe import Observation, observe
from lightning_qinit.calibration.start import Start
from lightning_qinit.insertion import QuantizedLayer

Step = Callable[[Any, int], Sequence[Tensor]]


class Passes:
    """Runs ``step`` on every batch, once per call.

    Args:
        batches: read once if they are needed once, kept if they are needed again.
        step: runs the module on a batch, given with its index, and returns the losses that it computed.
        step_name: what the step is called, for messages.
        merge: adds what other ranks observed.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        step: Step,
        step_name: str,
        merge: Callable[[Mapping[str, QuantizedLayer], Observation], Observation] = lambda layers, seen: seen,
    ) -> None:
        self.batches, self.step, self.step_name, self.merge = batches, step, step_name, merge
        self.kept = False

    def choose(
        self, layers: Mapping[str, QuantizedLayer], config: CalibrationConfig, norms: Sequence[torch.nn.Module]
    ) -> tuple[list[Start], Observation, Statistics]:
        """Everything that calibration decides.

        Changes quantizers and statistics on the way: the caller puts the module back, and applies what is returned.
        """
        if config.sequential or config.recalibrate_batchnorm:
            self.batches, self.kept = list(self.batches), True
        starts, seen = choose(layers, self.watch, config.criterion, config.sequential, config.average_bits)
        statistics: Statistics = []
        if config.recalibrate_batchnorm and seen.first_run:
            for start in starts:
                start.apply()
            statistics = batch_statistics(norms, self.run)
        return starts, seen, statistics

    def watch(self, layers: Mapping[str, QuantizedLayer], criterion: Criterion = "mse") -> Observation:
        """What the layers see in all batches."""
        with ExitStack() as stack:
            observation = stack.enter_context(observe(layers, criterion))
            stack.enter_context(torch.set_grad_enabled(criterion == "fisher"))
            if criterion == "fisher" and any(isinstance(layer, nn.RNNBase) for layer in layers.values()):
                # cuDNN has no backward pass of recurrent layers in eval mode
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            batches = with_loss = 0
            for batches, batch in enumerate(self._fresh(), 1):
                losses = self.step(batch, batches - 1)
                if criterion == "fisher" and any(loss.requires_grad for loss in losses):
                    with_loss += 1  # a step may skip a batch
                    observation.differentiate(losses)
                observation.end_batch()
        if criterion == "fisher" and batches and not with_loss:
            raise ValueError(f"`criterion` = 'fisher' needs a loss with gradients; `{self.step_name}` returned none.")
        return self.merge(layers, observation)

    def run(self) -> None:
        """Run all batches without watching."""
        for index, batch in enumerate(self._fresh()):
            self.step(batch, index)

    def _fresh(self) -> Iterable[Any]:
        """The batches; copies of those that are kept."""
        return map(copied, self.batches) if self.kept else self.batches


def copied(batch: Any) -> Any:
    """A copy of a batch, which a step may take apart; of what cannot be copied, with copies of the tensors in it."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # of tensors that were computed with gradients, or of whatever else may be in a batch
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().clone())
