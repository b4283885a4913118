"""Modules as users write them: hooks that set something up, state of their own, several stages."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import SmallNet, loader, quantizers, quiet, small_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, Subset
from torchmetrics import MeanMetric

from lightning_qinit import calibrate, prepare
from lightning_qinit.functional import optimal_scale
from lightning_qinit.insertion import quantized_layers


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_a_step_may_need_what_a_hook_sets_up(make_trainer, hook: str) -> None:
    class Keeps(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(loss.detach()))
            return loss

    def set_up(self: Keeps) -> None:
        self.losses = []

    setattr(Keeps, hook, set_up)
    model, callback = Keeps(), quiet()
    make_trainer(callback).fit(model, loader())
    assert len(model.losses) == 4  # of training, and of no batch of calibration
    assert len(callback.report) == 8 and all(q.is_calibrated for q in quantizers(model).values())


@pytest.mark.parametrize("limit", [{}, {"max_epochs": 0}], ids=["", "no training"])
def test_the_trainer_trains_while_a_module_with_a_start_of_its_own_is_calibrated(make_trainer, limit: dict) -> None:
    class Starts(SmallNet):
        def on_fit_start(self) -> None:
            pass

        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0] * 2 if self.trainer.training else batch[0], batch[1]]  # as augmentation would

    torch.manual_seed(0)
    model, callback = Starts(), quiet()
    x = 2 * torch.cat([batch[0] for batch, _ in zip(loader(shuffle=False), range(3), strict=False)])
    trainer = make_trainer(callback, num_sanity_val_steps=2, **{"max_steps": 1, **limit})
    trainer.fit(model, loader(shuffle=False), loader(shuffle=False))
    fit = optimal_scale(x, model.stem.input_quantizer.levels)
    assert torch.allclose(model.stem.input_quantizer.initial_step.double(), fit.scale, rtol=1e-3)


def test_weights_that_a_module_loads_as_fit_starts_are_those_calibrated(make_trainer) -> None:
    class Loads(SmallNet):
        def on_fit_start(self) -> None:
            with torch.no_grad():
                self.hidden.weight.mul_(100)

    torch.manual_seed(0)
    model, callback = Loads(), quiet()
    before = model.hidden.weight.detach().clone()
    make_trainer(callback, max_steps=1).fit(model, loader(shuffle=False))
    fit = optimal_scale(100 * before, model.hidden.weight_quantizer.levels, 0)
    assert torch.allclose(model.hidden.weight_quantizer.initial_step.double(), fit.scale, rtol=1e-5)


def test_a_step_may_ask_the_trainer_for_its_loader(make_trainer) -> None:
    asked = []

    class Asks(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            asked.append((len(self.trainer.train_dataloader), self.trainer.num_training_batches))
            return super().training_step(batch, batch_idx)

    make_trainer(quiet()).fit(Asks(), loader())
    assert asked == [(4, 4)] * 7


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_calibration_leaves_no_trace_in_what_a_module_holds(make_trainer) -> None:
    class Ordered(OrderedDict):
        def clear(self) -> None:
            raise TypeError("this one is only added to")

    class Holds(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"beta": 1.0})
            self.counts, self.ordered = np.zeros(3), Ordered(a=1, b=2)
            self.metrics, self.inner = [MeanMetric()], (nn.BatchNorm1d(3),)
            self.nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            self.counts[0] += 1
            self.hparams.beta *= 0.5
            self.ordered["c"] = 3
            self.metrics[0].update(loss.detach())
            self.inner[0](torch.rand(4, 3))
            self.nested.add_(1)
            optimizer.param_groups[0]["lr"] *= 0.5
            self.trainer.should_stop = True
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.trainer.lr_scheduler_configs[0].scheduler.step()

        def configure_optimizers(self) -> tuple[list, list]:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]

    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Holds) -> None:
            seen.extend((module.counts.tolist(), module.hparams.beta, list(module.ordered.items())))
            seen.extend((module.metrics[0].update_count, trainer.optimizers[0].param_groups[0]["lr"]))
            seen.extend((trainer.should_stop, int(module.inner[0].num_batches_tracked)))
            seen.extend((float(module.nested[1].sum()), trainer.lr_scheduler_configs[0].scheduler.last_epoch))

    make_trainer(quiet(), Look()).fit(Holds(), loader())
    assert seen == [[0.0] * 3, 1.0, [("a", 1), ("b", 2)], 0, 0.05, False, 0, 0.0, 0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|freeze).*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.(script|freeze).*is deprecated:DeprecationWarning")
def test_a_scripted_module_stays_in_its_mode(make_trainer) -> None:
    class Scripted(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.jit.script(nn.BatchNorm2d(4))

    model = Scripted()
    make_trainer(quiet(), max_steps=4).fit(model, loader())
    assert model.norm.training and int(model.norm.num_batches_tracked) == 4
    frozen = nn.Sequential(nn.Linear(6, 5), torch.jit.freeze(torch.jit.script(nn.ReLU().eval())))  # which has no mode
    assert len(calibrate(prepare(frozen), [torch.randn(4, 6)])) == 2


class Run:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def track(self, value: int) -> None:
        self.seen.append(value)


class Forwards(CSVLogger):
    """A logger with a handle, to which it forwards what it does not know."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.run, self.tags = Run(), {"a", "b"}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "run":
            raise AttributeError(name)
        return getattr(self.run, name)


def test_handles_of_loggers_lead_nowhere_in_calibration(make_trainer, tmp_path: Path) -> None:
    class Asks(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.logger.track(1)
            self.logger.run.track(2)
            assert "a" in self.logger.tags
            assert [value > 1 for value in self.logger.run.seen] in ([], [False, True])
            return super().training_step(batch, batch_idx)

    logger = Forwards(tmp_path)
    make_trainer(quiet(), logger=logger, max_steps=1).fit(Asks(), loader())
    assert logger.run.seen == [1, 2]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_step_may_ask_where_logs_go(make_trainer, tmp_path: Path, kind: type) -> None:
    class Asks(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            logger = self.trainer.loggers[0]
            asked.append((self.trainer.log_dir, logger.log_dir, logger.save_dir, logger.name, logger.version))
            assert isinstance(logger, kind)
            logger.log_metrics({"by hand": len(asked)}, step=0)
            if kind is TensorBoardLogger:
                logger.experiment.add_scalar("by hand", len(asked), 0)
            logger.log_hyperparams({"calls": len(asked)})
            return super().training_step(batch, batch_idx)

    asked: list[tuple] = []
    logger = kind(tmp_path)
    make_trainer(quiet(), logger=logger, max_steps=1).fit(Asks(), loader())
    assert len(asked) == 4 and set(asked) == {(logger.log_dir, logger.log_dir, logger.save_dir, logger.name, 0)}
    if kind is CSVLogger:
        assert (Path(logger.log_dir) / "metrics.csv").read_text() == "by hand,step\n4,0\n"
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(logger.log_dir).Reload().Scalars("by hand")
        assert {event.value for event in found} == {4.0}


class Noise:
    """As transforms that hold a generator of their own do."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)


class Noisy(Dataset):
    def __init__(self) -> None:
        self.data, self.transforms = small_data(), [Noise()]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, label = self.data[index]
        return x + float(self.transforms[0].generator.normal()), label


class EveryEpochItsOwn(RandomSampler):
    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        yield from torch.randperm(len(self.data_source), generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Resumable:
    """A loader that goes on where it was left."""

    def __init__(self) -> None:
        self.batches, self.next = list(loader(64, shuffle=False)), 0

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        for _ in range(4):
            self.next += 1
            yield self.batches[(self.next - 1) % 8]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("late", [False, True], ids=["", "calibrated in training"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Noisy(), 8, num_workers=1, persistent_workers=True),
        lambda: CombinedLoader(loader(shuffle=False), "min_size"),
        lambda: DataLoader(Subset(Noisy(), range(16)), 8),
        lambda: DataLoader(ConcatDataset([Noisy(), Noisy()]), 8),
        lambda: DataLoader(small_data(), 8, sampler=EveryEpochItsOwn(small_data())),
        Resumable,
    ],
    ids=["workers", "combined", "subset", "concatenated", "sampler", "resumable"],
)
def test_training_sees_the_batches_that_it_would_have_seen(make_trainer, make, late: bool) -> None:
    class Model(SmallNet):
        def on_train_start(self) -> None:
            self.shift = 0.0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (self.shift if late else 0.0)

    seen: list[list[Tensor]] = []

    class Sees(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: SmallNet, batch: Any, batch_idx: int) -> None:
            seen[-1].append(batch[0].clone())

    for callbacks in ([], [quiet()]):
        seen.append([])
        make_trainer(*callbacks, Sees(), max_epochs=2).fit(model := Model(), make())
        assert not callbacks or all(q.is_calibrated for q in quantizers(model).values())
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_module_inside_another_may_optimize_by_hand(make_trainer) -> None:
    class Inner(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def improve(self, batch: list[Tensor]) -> None:
            optimizer = self.optimizers()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    class Outer(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.automatic_optimization = Inner(), False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.inner.improve(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer, model = make_trainer(quiet(criterion="fisher")), Outer()
    trainer.fit(model, loader())
    assert trainer.global_step == 4 and all(q.is_calibrated for q in quantizers(model).values())


class Stages(SmallNet):
    """A head that only the second stage uses."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.stage = nn.Linear(3, 3), 1

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.second(x) if self.stage == 2 else x


def test_layers_that_run_in_a_second_stage_only_are_calibrated_then(make_trainer) -> None:
    model, callback = Stages(), quiet()
    with pytest.warns(UserWarning, match="saw no data for second.weight, second.input"):
        make_trainer(callback).fit(model, loader())
    model.stage = 2
    step = model.head.weight_quantizer.initial_step.clone()
    make_trainer(callback).fit(model, loader())
    assert [row.name for row in callback.report] == ["second.weight", "second.input"]
    assert torch.equal(model.head.weight_quantizer.initial_step, step)


def test_a_second_fit_can_be_monitored_before_its_first_log(make_trainer) -> None:
    model = SmallNet()
    for _ in range(2):
        trainer = make_trainer(quiet(), EarlyStopping("quant_error/mean"), log_every_n_steps=50)
        trainer.fit(model, loader(), loader(shuffle=False))
        assert 0 < float(trainer.callback_metrics["quant_error/mean"]) < 1


def test_a_pattern_that_matches_nothing_leaves_a_module_with_a_setup_as_it_was(make_trainer) -> None:
    class WithSetup(SmallNet):
        def setup(self, stage: str) -> None:
            pass

    model = WithSetup()
    with pytest.raises(MisconfigurationException, match="`skip` has the pattern 'typo', which matches no layer"):
        make_trainer(quiet(skip=["typo"])).fit(model, loader())
    assert not quantized_layers(model)
    make_trainer(quiet(skip=["head"])).fit(model, loader())
    assert "head" not in quantized_layers(model)


def test_a_layer_that_is_replaced_on_the_way_has_no_last_picture(make_trainer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    class Replaces(SmallNet):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.head = nn.Linear(8, 3)

    logger = TensorBoardLogger(tmp_path)
    model = Replaces()
    callback = quiet(skip=["stem", "body", "hidden"], log_figures=1)
    make_trainer(callback, logger=logger, max_epochs=2, log_every_n_steps=1).fit(model, loader())
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("inside_step", [False, True])
def test_steps_follow_a_learning_rate_that_the_module_sets(make_trainer, inside_step: bool) -> None:
    class Sets(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if inside_step:
                self.optimizers().param_groups[0]["lr"] = 0.01
            return super().training_step(batch, batch_idx)

        def on_train_start(self) -> None:
            self.optimizers().param_groups[0]["lr"] = 0.02

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.01)

    trainer = make_trainer(quiet(step_lr_scale=0.5), max_steps=1)
    trainer.fit(Sets(), loader())
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == ([0.01, 0.005] if inside_step else [0.02, 0.01])


def test_an_optimizer_that_takes_the_place_of_another_gets_no_decay_of_steps_either(make_trainer) -> None:
    class Swaps(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.01)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                layers, rest = [], []
                for name, parameter in self.named_parameters():
                    (layers if "head" in name else rest).append(parameter)
                groups = [{"params": layers}, {"params": rest}]
                self.trainer.optimizers = [torch.optim.SGD(groups, 0.1, weight_decay=0.01)]

    trainer, model = make_trainer(quiet(), max_epochs=2), Swaps()
    trainer.fit(model, loader())
    steps = {id(p) for q in quantizers(model).values() for p in q.parameters()}
    for group in trainer.optimizers[0].param_groups:
        assert not group["weight_decay"] or not any(id(p) in steps for p in group["params"])


class Pickles(SmallNet):
    def pickle(self) -> None:
        pickle.dumps(self)

    on_fit_start = on_validation_start = on_test_start = pickle


def test_a_module_can_be_pickled_in_its_own_hooks(make_trainer) -> None:
    model = Pickles()
    make_trainer(quiet(), num_sanity_val_steps=1).fit(model, loader(), loader(shuffle=False))
    make_trainer(quiet()).test(model, loader(shuffle=False), verbose=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated:DeprecationWarning")
def test_the_graph_of_a_module_is_logged(make_trainer, tmp_path: Path) -> None:
    class Drawn(SmallNet):
        example_input_array = torch.zeros(2, 1, 6, 6)

    logger = TensorBoardLogger(tmp_path, log_graph=True)
    model = Drawn()
    make_trainer(quiet(quantizer="lsq+"), logger=logger).fit(model, loader())
    model.eval()
    traced, x = torch.jit.trace(model, torch.zeros(2, 1, 6, 6)), torch.randn(5, 1, 6, 6)
    assert torch.allclose(traced(x), model(x), atol=1e-6)


def test_steps_of_weights_that_were_computed_without_gradients_are_trained() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    with torch.no_grad():
        layer(torch.ones(1, 4))
    model = prepare(nn.Sequential(layer))
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_to_the_data_are_to_be_had_while_evaluating(make_trainer) -> None:
    class Attacks(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(36, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.cell(x.flatten(1)[:, None])[0].sum()

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self(x).square().sum(), x)
                self.log("attacked", gradient.abs().sum())

    model = Attacks()
    make_trainer(quiet()).fit(model, loader())
    assert make_trainer(quiet()).test(model, loader(shuffle=False), verbose=False)[0]["attacked"] > 0
