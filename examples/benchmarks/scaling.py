"""How the cost of calibration and of a training step grows with layers, channels, bits, batches and ranks.

python examples/benchmarks/scaling.py

A tower of convolutions with BatchNorm and ReLU. One thing grows at a time; times are relative to the float model of the
same size: calibration to the same forward passes, the training step to a float step. Ranks are processes of one thread
under DDP; they share the batches of calibration, and each passes only its own.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from result import write
from runs import apart, bare_trainer, hush, seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qinit import QuantInitCallback, calibrate, prepare

BASE = {"layers": 4, "channels": 32, "bits": 4, "batches": 4}
GROWTH = {"layers": (4, 8, 16), "channels": (32, 64, 128), "bits": (2, 4, 8), "batches": (4, 16, 64)}
RANKS, SHARED = (1, 2), 16  # batches of calibration, over all ranks


def tower(layers: int, channels: int) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for _ in range(layers - 2):
        parts += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def measure(layers: int, channels: int, bits: int, batches: int, batch: int, repeats: int) -> dict[str, float]:
    float_model = tower(layers, channels).eval()
    data = [torch.randn(batch, 3, 32, 32) for _ in range(batches)]

    @torch.no_grad()
    def forward() -> None:
        for x in data:
            float_model(x)

    calibrations, models = [], []
    for _ in range(repeats):
        models.append(prepare(copy.deepcopy(float_model), weight_bits=bits, activation_bits=bits))
        alone = seconds(forward)
        calibrations.append(seconds(lambda: calibrate(models[-1], data)) / alone)
    plain, quantized = stepper(float_model.train(), data[0]), stepper(models[-1].train(), data[0])
    steps = []
    for warm in (True, True, *[False] * 3 * repeats):
        alone = seconds(plain)
        ratio = seconds(quantized) / alone
        if not warm:
            steps.append(ratio)
    return {"calibration": statistics.median(calibrations), "step": statistics.median(steps)}


class Tower(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tower(BASE["layers"], BASE["channels"])

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class Clock(pl.Callback):
    """The seconds of every step."""

    def __init__(self) -> None:
        self.begin, self.steps = 0.0, []

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.steps.append(time.perf_counter() - self.begin)


class Passes(pl.Callback):
    """The seconds of forward passes alone."""

    def __init__(self, batches: int, x: Tensor) -> None:
        self.batches, self.x, self.took = batches, x, 0.0

    @torch.no_grad()
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        net = copy.deepcopy(pl_module.net).eval()
        net(self.x)
        self.took = seconds(lambda: [net(self.x) for _ in range(self.batches)])


class Timed(QuantInitCallback):
    """Knows how long it calibrated."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.took = seconds(lambda: QuantInitCallback.on_fit_start(self, trainer, pl_module))


def train(ranks: int, batch: int) -> dict[str, float]:
    """As a rank, or as the first, which starts the others."""
    hush()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 32, 32)
    data = DataLoader(TensorDataset(x.repeat(ranks * SHARED, 1, 1, 1)), batch)
    bits = BASE["bits"]
    passes = Passes(-(-SHARED // ranks), x)
    calibration = Timed(weight_bits=bits, activation_bits=bits, calibration_batches=SHARED, print_report=False)
    steps = []
    for timed in (passes, calibration):
        clock = Clock()
        strategy = "ddp" if ranks > 1 else "auto"
        trainer = bare_trainer(
            accelerator="cpu", strategy=strategy, devices=ranks, max_epochs=1, callbacks=[timed, clock]
        )
        trainer.fit(Tower(), data)
        steps.append(statistics.median(clock.steps[2:]))
    return {"calibration": calibration.took / passes.took, "step": steps[1] / steps[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--json", default="scaling.json", help="where to write the result")
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train(arguments.train, arguments.batch)), flush=True)
        return
    hush()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    measure(**BASE, batch=arguments.batch, repeats=1)  # warm up
    rows: list[dict[str, Any]] = []

    def add(grown: str, size: int, result: dict[str, float]) -> None:
        rows.append({"grown": grown, "size": size, **result})
        print(
            f"{grown:9s} {size:4d}   calibration {result['calibration']:6.2f}   step {result['step']:5.2f}", flush=True
        )

    for grown, sizes in GROWTH.items():
        for size in sizes:
            add(grown, size, measure(**{**BASE, grown: size}, batch=arguments.batch, repeats=arguments.repeats))
    for ranks in RANKS:
        command = "--train", ranks, "--batch", arguments.batch
        results = [apart(__file__, *command) for _ in range(arguments.repeats)]
        add("ranks", ranks, {name: statistics.median(r[name] for r in results) for name in ("calibration", "step")})
    write(arguments, rows)


if __name__ == "__main__":
    main()
