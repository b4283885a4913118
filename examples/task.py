"""The task of the examples: a small residual network and small images, as Lightning's two kinds of modules."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class Classifier(pl.LightningModule):
    """A small ResNet.

    Args:
        channels: of the input images.
        width: channels of the first block.
        learning_rate: of SGD with momentum 0.9 and a cosine schedule.
    """

    def __init__(self, channels: int = 1, width: int = 16, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Images(pl.LightningDataModule):
    """Small images: scikit-learn's digits (in its package), or torchvision's Fashion-MNIST or CIFAR-10.

    Args:
        name: "digits", "fashion-mnist" or "cifar10".
        root: folder of torchvision's datasets; what is absent is downloaded.
        batch_size: images per batch.
    """

    def __init__(self, name: str = "digits", root: str = "data", batch_size: int = 64) -> None:
        super().__init__()
        self.name, self.root, self.batch_size = name, root, batch_size
        self.channels = 3 if name == "cifar10" else 1

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        if self.name == "digits":
            train, self.test = random_split(_digits(), [1437, 360], generator)
        else:
            train, self.test = _torchvision(self.name, self.root)
        held_out = len(train) // 12
        self.train, self.val = random_split(train, [len(train) - held_out, held_out], generator)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 256)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return TensorDataset((x - 0.3) / 0.38, torch.tensor(digits.target))


def _torchvision(name: str, root: str) -> tuple[Dataset, Dataset]:
    from torchvision import datasets
    from torchvision.transforms import v2

    if name not in ("fashion-mnist", "cifar10"):
        raise ValueError(f"`name` must be 'digits', 'fashion-mnist' or 'cifar10', got {name!r}.")
    kind = datasets.FashionMNIST if name == "fashion-mnist" else datasets.CIFAR10
    mean, std = ([0.286], [0.353]) if name == "fashion-mnist" else ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262])
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    Path(root).mkdir(parents=True, exist_ok=True)
    return tuple(kind(root, train=train, transform=transform, download=True) for train in (True, False))
