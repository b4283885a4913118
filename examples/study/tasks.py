"""The tasks: data, network, recipe; and the float weights that all runs of a seed start from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data
import lightning.pytorch as pl
import torch
from data import Data, Pair
from networks import CharTransformer, Forecaster, ResNet, SpeechNet
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the learning rate falls to zero as a cosine.

    Attributes:
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adam"``.
        learning_rate: of quantization-aware training.
        steps: of quantization-aware training.
        batch_size: of both.
        every: steps between two evaluations in quantization-aware training.
        float_learning_rate: of the float training.
        float_steps: of the float training; 0 where the weights are published.
        crops: whether to augment training images by flips and crops.
    """

    optimizer: str
    learning_rate: float
    steps: int
    batch_size: int
    every: int
    float_learning_rate: float = 0.0
    float_steps: int = 0
    crops: bool = False


@dataclass(frozen=True)
class Task:
    """What a grid calls by its name.

    Attributes:
        load: reads the data below a folder.
        network: builds the float network.
        recipe: how it is trained.
        weights: file of published float weights below that folder.
    """

    load: Callable[[Path], Data]
    network: Callable[[], nn.Module]
    recipe: Recipe
    weights: str | None = None


TASKS = {
    "digits": Task(data.digits, lambda: ResNet(1, 8, 1), Recipe("sgd", 0.02, 100, 64, 5, 0.05, 300)),
    "speech": Task(data.speech, SpeechNet, Recipe("sgd", 0.03, 120, 32, 10, 0.05, 1500)),
    "chars": Task(data.chars, CharTransformer, Recipe("adam", 3e-3, 100, 16, 10, 3e-3, 2000)),
    "ett": Task(data.ett, Forecaster, Recipe("adam", 1e-3, 120, 32, 10, 3e-3, 600)),
    "fashion": Task(data.fashion, lambda: ResNet(1, 8, 1), Recipe("sgd", 0.02, 150, 64, 10, 0.1, 2000)),
    "cifar10": Task(
        partial(data.cifar10, tested=1000), ResNet, Recipe("sgd", 0.01, 100, 128, 20), "cifar10_resnet20.pt"
    ),
    "cifar10-long": Task(data.cifar10, ResNet, Recipe("sgd", 0.01, 5265, 128, 351, crops=True), "cifar10_resnet20.pt"),
}


class Learner(pl.LightningModule):
    """Trains a network by a recipe: whole numbers as targets are classes, others are values to forecast."""

    def __init__(self, net: nn.Module, recipe: Recipe, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.net, self.recipe, self.learning_rate, self.steps = net, recipe, learning_rate, steps

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        x, y = batch
        if self.recipe.crops and self.training:
            x = flip_and_crop(x)
        return loss_of(self.net(x), y)

    def configure_optimizers(self) -> dict:
        if self.recipe.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        else:
            optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for classes, mean squared error for values."""
    if y.is_floating_point():
        return functional.mse_loss(output, y)
    return functional.cross_entropy(output.flatten(0, -2), y.flatten())


def flip_and_crop(x: Tensor, pad: int = 4) -> Tensor:
    """Every image mirrored or not, and moved by up to ``pad`` pixels either way."""
    count, _, height, width = x.shape
    mirrored = torch.rand(count, 1, 1, 1) < 0.5  # drawn on the CPU: the same on any device
    rows = torch.randint(2 * pad + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(2 * pad + 1, (count, 1)) + torch.arange(width)
    image = torch.arange(count)[:, None, None]
    mirrored, rows, columns, image = (index.to(x.device) for index in (mirrored, rows, columns, image))
    padded = functional.pad(torch.where(mirrored, x, x.flip(3)), (pad,) * 4)
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(pair: Pair, size: int, seed: int) -> DataLoader:
    """Training batches, whole ones only, in an order that the seed decides."""
    dataset = TensorDataset(*pair)
    shuffled = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, sampler=BatchSampler(shuffled, size, drop_last=True), batch_size=None)


def trainer(steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    """A Trainer that does nothing but train."""
    return pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def float_network(task: Task, parts: Data, seed: int, root: Path, kept: Path) -> nn.Module:
    """The network with its float weights: the published ones, or trained once for each seed and kept in a file."""
    torch.manual_seed(seed)
    net = task.network()
    source = kept if task.weights is None else root / task.weights
    if not source.exists():
        recipe = task.recipe
        learner = Learner(net, recipe, recipe.float_learning_rate, recipe.float_steps)
        trainer(recipe.float_steps).fit(learner, batches(parts.train, recipe.batch_size, seed))
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.cpu().state_dict(), kept)
    net.load_state_dict(torch.load(source, weights_only=True))
    return net
