"""What watching 60 quantizers costs a training run: the time of training with it, relative to training without.

python examples/benchmarks/monitoring.py

A residual tower of 30 convolutions with BatchNorm, weights and inputs at 4 bits, `log_every_n_steps=50`. Both kinds of
runs alternate in one process; each ratio is of the same two neighbours.
"""

import argparse
import tempfile
import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from result import spread, write
from runs import bare_trainer, hush
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qinit import QuantInitCallback


class Tower(pl.LightningModule):
    def __init__(self, layers: int = 30, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in range(layers - 2)
        )
        self.head = nn.Linear(channels, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.stem(batch[0])
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x.mean((2, 3))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.001, momentum=0.9)


class Stopwatch(pl.Callback):
    """Seconds from the first to the last step, calibration left out."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.start


def seconds(steps: int, batch: int, size: int, watched: bool, folder: str) -> float:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(batch * 4, 3, size, size), torch.randint(10, (batch * 4,)))
    watch = Stopwatch()
    callback = QuantInitCallback(4, 4, log_quantizers=watched, print_report=False, log_figures=0, calibration_batches=1)
    trainer = bare_trainer(
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        log_every_n_steps=50,
        logger=CSVLogger(folder),
        callbacks=[callback, watch],
    )
    trainer.fit(Tower(), DataLoader(data, batch))
    return watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=16, help="side of the images")
    parser.add_argument("--json", default="monitoring.json", help="where to write the result")
    arguments = parser.parse_args()
    hush()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        seconds(10, arguments.batch, arguments.size, True, folder)  # warm up
        for repeat in range(arguments.repeats):
            order = (True, False) if repeat % 2 else (False, True)
            took = {
                watched: seconds(arguments.steps, arguments.batch, arguments.size, watched, folder) for watched in order
            }
            ratios.append(took[True] / took[False])
            print(f"with {took[True]:.2f} s, without {took[False]:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"time of training {spread(ratios)}")
    write(arguments, [{"ratios": ratios}])


if __name__ == "__main__":
    main()
