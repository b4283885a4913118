"""Everything that is measured: the callback that records a run, and what is read off the record.

The *score* of a network is its accuracy in percent; for forecasts it is the share of the variance that is explained,
``100 (1 - MSE / variance)``, and 0 where that is negative. More is better.

A record is plain numbers, kept as a line of JSON:

- ``float``: the score of the float network;
- ``scores``: pairs of step and score, evaluated right after initialization (step 0), every few steps, and at the end;
- ``losses``: of training, the mean over each ten steps; ``null`` where it was not finite;
- ``blind``: the loss of the best constant answer, on the data evaluated;
- ``drift``: how far the steps of the quantizers moved from their start: the mean over quantizers of ``|log2|`` of the
  ratio.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from data import Pair
from scipy.stats import t as student
from torch import Tensor, nn

from lightning_qinit import Quantizer

Record = dict[str, Any]
BLOCK = 10  # steps whose losses are kept as one mean
TARGET = 0.95  # of the float network's score


@torch.no_grad()
def score(net: nn.Module, pair: Pair, size: int = 512) -> float:
    """The score of a network in evaluation mode."""
    training = net.training
    net.eval()
    device = next(net.parameters()).device
    output = torch.cat([net(x.to(device)).cpu() for x in pair[0].split(size)])
    net.train(training)
    y = pair[1]
    if y.is_floating_point():
        found = 100 * max(0.0, 1 - float((output - y).square().mean() / blind_loss(y)))
    else:
        found = 100 * float((output.argmax(-1) == y).double().mean())
    return round(found, 3) if math.isfinite(found) else 0.0


def blind_loss(y: Tensor) -> Tensor:
    """The loss of the best constant answer."""
    if y.is_floating_point():
        return (y - y.mean(tuple(range(y.dim() - 1)))).square().mean()
    share = torch.bincount(y.flatten()).double() / y.numel()
    return -(share * share.clamp(min=1e-12).log()).sum()


class Recorder(pl.Callback):
    """Records a run. It comes after QuantInitCallback, which has calibrated by the time that training starts.

    Args:
        pair: inputs and targets to evaluate on.
        every: steps between two evaluations.
    """

    def __init__(self, pair: Pair, every: int) -> None:
        self.pair, self.every = pair, every
        self.losses: list[Tensor] = []
        self.scores: list[tuple[int, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.scores.append((0, score(pl_module.net, self.pair)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        done = len(self.losses)
        if done % self.every == 0 or done == trainer.max_steps:
            self.scores.append((done, score(pl_module.net, self.pair)))

    def record(self, net: nn.Module, float_score: float) -> Record:
        """All of it as plain numbers."""
        losses = [float(block.mean()) for block in torch.stack(self.losses).cpu().split(BLOCK)]
        return {
            "float": float_score,
            "scores": self.scores,
            "losses": [float(f"{loss:.4g}") if math.isfinite(loss) else None for loss in losses],
            "blind": round(float(blind_loss(self.pair[1])), 4),
            "drift": round(drift(net), 4),
        }


@torch.no_grad()
def drift(net: nn.Module) -> float:
    """The mean over quantizers of ``|log2(step / initial step)|``, each its mean over channels."""
    quantizers = [module for module in net.modules() if isinstance(module, Quantizer) and module.is_calibrated]
    if not quantizers:
        return 0.0
    return float(torch.stack([(q.step / q.initial_step).log2().abs().mean() for q in quantizers]).mean())


def initial_score(record: Record) -> float:
    """The score right after initialization."""
    return record["scores"][0][1]


def final_score(record: Record) -> float:
    """The score after the last step (not the best on the way)."""
    return record["scores"][-1][1]


def reached(record: Record) -> bool:
    """Whether an evaluation met 95 % of the float network's score."""
    return any(found >= TARGET * record["float"] for _, found in record["scores"])


def steps_to_target(record: Record) -> float:
    """The first evaluated step that met the target; the length of the run where none did (the truth is more)."""
    met = [step for step, found in record["scores"] if found >= TARGET * record["float"]]
    return met[0] if met else record["scores"][-1][0]


def mean_loss(record: Record, steps: int) -> float:
    """The mean loss of the first steps, or of all where there are fewer; a loss beyond the blind one counts as that.

    A run that explodes would otherwise outweigh all others; that it did is counted by :func:`diverged`.
    """
    blocks = record["losses"][: steps // BLOCK]
    return sum(record["blind"] if x is None else min(x, record["blind"]) for x in blocks) / len(blocks)


def diverged(record: Record) -> bool:
    """Whether a loss was not finite, or that of the last ten steps is no better than the best constant answer's."""
    losses = record["losses"]
    return None in losses or losses[-1] >= record["blind"]


class Measure(NamedTuple):
    """A number of a record.

    Attributes:
        title: for tables.
        of: reads it off.
        better: 1 where more is better, -1 where less is, 0 for neither.
        relative: whether two are compared by their ratio, as percent, since tasks differ in scale.
    """

    title: str
    of: Callable[[Record], float]
    better: int
    relative: bool = False

    def difference(self, first: Record, second: Record) -> float:
        """How much more the first has: in units of the measure, or in percent of the second."""
        a, b = self.of(first), self.of(second)
        return 100 * (a / b - 1) if self.relative else a - b


MEASURES = {
    "initial": Measure("score after initialization", initial_score, 1),
    "target": Measure("steps to target", steps_to_target, -1),
    "loss50": Measure("loss of steps 1-50, %", lambda record: mean_loss(record, 50), -1, relative=True),
    "loss500": Measure("loss of steps 1-500, %", lambda record: mean_loss(record, 500), -1, relative=True),
    "final": Measure("final score", final_score, 1),
    "diverged": Measure("diverged, %", lambda record: 100.0 * diverged(record), -1),
    "drift": Measure("drift, octaves", lambda record: record["drift"], 0),
}


class Interval(NamedTuple):
    """A mean with the half width of its confidence interval; infinite for a single value."""

    mean: float
    half: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0. Equal differences have no width."""
        return 0 if abs(self.mean) <= self.half or self.mean == 0 else (1 if self.mean > 0 else -1)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of paired differences, one for each seed."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Interval(mean, math.inf)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(student.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count))
