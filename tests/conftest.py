"""Small modules and data that many tests share."""

import os
from pathlib import Path

# The tensors here are small: threads only wait for each other, for ever so long where another process is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_qinit import QuantInitCallback
from lightning_qinit.insertion import named_quantizers, quantized_layers


class SmallNet(pl.LightningModule):
    """A few layers of every common kind: convolution, BatchNorm, residual connection, dropout, linear."""

    def __init__(self, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.num_batches_tracked.fill_(1)  # its statistics count as trained
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(4 * 36, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.body(x)).relu()
        return self.head(self.dropout(self.hidden(x.flatten(1)).relu()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)


class Tied(nn.Module):
    """An embedding and a projection of one weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, width), nn.Linear(width, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class Wide(SmallNet):
    """Channels of enough values everywhere, so that the optimum is the plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 6, padding=3)
        self.hidden = nn.Linear(4 * 49, 40)
        self.head = nn.Linear(40, 3)


class Recorder(SmallNet):
    """Keeps what a user's module might: batches, outputs, a metric, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []
        self.outputs = {"loss": [], "seen": 0}
        self.metric = MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.batches.append(batch[0].clone())
        self.outputs["loss"].append(float(loss.detach()))
        self.outputs["seen"] += 1
        self.metric.update(loss.detach())
        self.logger.log_metrics({"noise": float(torch.rand(()))})
        return loss


def quantizers(module: nn.Module) -> dict:
    return named_quantizers(quantized_layers(module))


def small_data(count: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) * 18).clamp(-1, 1).round().long() + 1)


def loader(count: int = 32, batch_size: int = 8, shuffle: bool = True) -> DataLoader:
    return DataLoader(small_data(count), batch_size, shuffle=shuffle)


def quiet(**settings) -> QuantInitCallback:
    """The callback on a few batches, without a printed report."""
    return QuantInitCallback(**{"print_report": False, "calibration_batches": 3, **settings})


@pytest.fixture
def make_trainer(tmp_path: Path):
    """A quiet CPU trainer that writes below the test's own folder; arguments override."""

    def make(*callbacks: pl.Callback, **arguments) -> pl.Trainer:
        defaults = dict(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            num_sanity_val_steps=0,
        )
        return pl.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})

    return make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
