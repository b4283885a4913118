"""Every way to give a Trainer data, and to limit it: training sees the batches that it would see without us."""

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quiet, small_data
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, Subset, default_collate

from lightning_qinit.insertion import named_quantizers, quantized_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*overfit_batches.*|.*You requested to overfit.*",
    "ignore:This process .* is multi-threaded, use of fork.*:DeprecationWarning",
)


class Records(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def batch(self, batch: Any) -> list[Tensor]:
        if isinstance(batch, dict):
            batch = next(iter(batch.values()))
        return batch[0] if isinstance(batch[0], list) else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.batch(batch)
        self.seen.append(batch[0].clone())
        return super().training_step(batch, batch_idx)


class Numbers(IterableDataset):
    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(small_data())


class Batches:
    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(loader())


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.items = iter(small_data())

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> list[Tensor]:
        return next(self.items)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader()


def with_generator() -> DataLoader:
    return DataLoader(small_data(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))


class Shuffled(Sampler):
    """Shuffles its own list in place."""

    def __init__(self) -> None:
        self.order = list(range(32))

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.order)
        return iter(list(self.order))

    def __len__(self) -> int:
        return 32


class Shards(IterableDataset):
    """As do many that stream files; and counts its epochs."""

    def __init__(self) -> None:
        self.shards, self.epoch = list(range(32)), 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        random.shuffle(self.shards)
        self.epoch += 1
        items = small_data()
        return iter([[items[i][0] * self.epoch, items[i][1]] for i in self.shards])


class Counts(pl.LightningDataModule):
    """Whose next loader depends on the last."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.order = list(range(32))

    def train_dataloader(self) -> DataLoader:
        random.shuffle(self.order)
        self.calls += 1
        return DataLoader(Subset(small_data(), self.order[self.calls :]), 8)


class Drawn(IterableDataset):
    """Draws the order from a generator of its own as soon as it is asked for an iterator."""

    def __init__(self, items: Any) -> None:
        self.items, self.generator = items, torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter([self.items[i] for i in torch.randperm(len(self.items), generator=self.generator).tolist()])


class Epochs:
    """A loader, but none of torch's, that counts how often it was read."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.epoch += 1
        return iter([[x * self.epoch, y] for x, y in loader(shuffle=False)])


class Augmented(pl.LightningDataModule):
    """Draws from a generator of its own: which samples there are, and what is added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def train_dataloader(self) -> DataLoader:
        some = torch.randperm(32, generator=self.generator)[:24].tolist()
        return DataLoader(Subset(small_data(), some), 8)

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] + torch.rand(1, generator=self.generator), batch[1]]


class Lines(IterableDataset):
    """Reads a file that the processes which share it read on."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.write(writing, bytes(range(32)))
        os.close(writing)
        self.file = reading

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> list[Tensor]:
        read = os.read(self.file, 1)
        if not read:
            raise StopIteration
        return small_data()[read[0]]


class OfWorkers(IterableDataset):
    """Which cannot be read but in a worker."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        info = torch.utils.data.get_worker_info()
        return iter([small_data()[i] for i in range(info.id, 32, info.num_workers)])


SOURCES: dict[str, Callable[[], Any]] = {
    "shuffled": loader,
    "own generator": with_generator,
    "datamodule": Data,
    "workers": lambda: DataLoader(small_data(), 8, shuffle=True, num_workers=1),
    "persistent workers": lambda: DataLoader(small_data(), 8, shuffle=True, num_workers=1, persistent_workers=True),
    "iterable": lambda: DataLoader(Numbers(), 8),
    "stream": lambda: DataLoader(Stream(), 8),
    "plain iterable": lambda: Batches(),
    "dict": lambda: {"a": loader(), "b": loader(batch_size=4)},
    "list of loaders": lambda: [loader(), loader()],
    "a sampler that shuffles in place": lambda: DataLoader(small_data(), 8, sampler=Shuffled()),
    "in batches": lambda: DataLoader(small_data(), batch_sampler=BatchSampler(Shuffled(), 8, False)),
    "shards shuffled in place": lambda: DataLoader(Shards(), 8),
    "datamodule that counts": Counts,
    "generator of a dataset": lambda: DataLoader(Drawn(small_data()), 8),
    "generator of a loader": lambda: Drawn(list(loader(shuffle=False))),
    "loader that counts": Epochs,
    "datamodule with a generator": Augmented,
    "a file that workers share": lambda: DataLoader(Lines(), 8, num_workers=1),
    "in workers alone": lambda: DataLoader(OfWorkers(), 8, num_workers=2),
    "combined": lambda: CombinedLoader({"a": loader(), "b": loader(16)}, "min_size"),
}


def run(make_trainer, source: Callable[[], Any], *callbacks: pl.Callback, **limits) -> Records:
    torch.manual_seed(0)
    random.seed(0)
    model = Records()
    data = source()
    trainer = make_trainer(*callbacks, **{"max_epochs": 2, **limits})
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(model, datamodule=data)
    else:
        trainer.fit(model, data)
    return model


@pytest.mark.filterwarnings("ignore:.*treated as.*|Your `IterableDataset` has `__len__`.*")
@pytest.mark.parametrize("name", SOURCES)
def test_batches_are_those_of_a_run_without_the_callback(make_trainer, name: str) -> None:
    plain, callback = run(make_trainer, SOURCES[name]), quiet()
    quantized = run(make_trainer, SOURCES[name], callback)
    assert len(callback.report) == 8
    assert len(plain.seen) == len(quantized.seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, quantized.seen, strict=True))


class Collates(pl.LightningDataModule):
    """Whose method goes to the workers, with the trainer that it holds."""

    def collate(self, samples: list[Any]) -> Any:
        return default_collate(samples)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(small_data(8), 8, num_workers=1, collate_fn=self.collate, multiprocessing_context="spawn")


@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`")
def test_workers_that_are_sent_the_trainer(make_trainer) -> None:
    callback = quiet()
    trainer = make_trainer(callback, max_epochs=1, gradient_clip_val=1.0)
    trainer.fit(SmallNet(), datamodule=Collates())
    assert trainer.global_step == 1 and len(callback.report) == 8


LIMITS: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": 2},
    "overfit_batches": {"overfit_batches": 2},
    "two batches": {"limit_train_batches": 2},
    "half": {"limit_train_batches": 0.5},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "accumulate": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(make_trainer, name: str) -> None:
    plain, callback = run(make_trainer, loader, **LIMITS[name]), quiet()
    quantized = run(make_trainer, loader, callback, **LIMITS[name])
    assert len(callback.report) == 8
    assert len(plain.seen) == len(quantized.seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, quantized.seen, strict=True))


def test_calibration_reads_no_further_than_the_limit(make_trainer) -> None:
    read = []

    class Watched(SmallNet):
        def calibration_step(self, batch: list[Tensor], batch_idx: int) -> None:
            read.append(batch[0])
            self(batch[0])

    torch.manual_seed(0)
    make_trainer(quiet(calibration_batches=99), limit_train_batches=2).fit(Watched(), loader(shuffle=False))
    assert len(read) == 2


def test_no_batches_at_all(make_trainer) -> None:
    model = SmallNet()
    with pytest.warns(UserWarning, match="saw no training batch"):
        make_trainer(quiet(sequential=True), limit_train_batches=0, max_epochs=1).fit(model, loader())
    assert not any(q.is_calibrated for q in named_quantizers(quantized_layers(model)).values())
