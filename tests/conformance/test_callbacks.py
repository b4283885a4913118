"""Beside other callbacks, in every legal order; an illegal order is refused with the fix in the message."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quantizers, quiet, small_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_qinit import load_from_checkpoint
from lightning_qinit.insertion import quantized_layers

AVERAGING = {
    "WeightAveraging": lambda: WeightAveraging(),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.5),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
}


@pytest.mark.filterwarnings("ignore:.*swapped.*|.*swap.*|Swapping scheduler.*")
@pytest.mark.parametrize("name", AVERAGING)
def test_averaging_comes_after(make_trainer, name: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"`{name}` copies the module .* put QuantInitCallback before {name}"
    ):
        make_trainer(AVERAGING[name](), quiet()).fit(SmallNet(), loader())
    model, averaging = SmallNet(), AVERAGING[name]()
    copies = []

    class Check(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            twin = averaging._average_model
            twin = getattr(twin, "module", twin)
            copies.append(twin)
            assert "on_load_checkpoint" not in vars(twin)
            for key, quantizer in quantizers(twin).items():
                assert quantizer.is_calibrated, key
                assert torch.equal(quantizer.step, quantizers(pl_module)[key].step), key

    trainer = make_trainer(quiet(recalibrate_batchnorm=True), averaging, Check(), max_epochs=3)
    trainer.fit(model, loader())
    assert copies and all(
        bool(q.step.isfinite().all()) and bool((q.step > 0).all()) for q in quantizers(model).values()
    )


@pytest.mark.filterwarnings("ignore:.*swapped.*|.*swap.*|.*in a future release.*")
def test_what_was_averaged_with_its_buffers_loads_with_the_same_bits(make_trainer, tmp_path) -> None:
    model = SmallNet()  # 3 * 0.9 + 3 * 0.1 is a little less than 3, which as an integer is 2
    trainer = make_trainer(quiet(weight_bits=3), EMAWeightAveraging(decay=0.9, use_buffers=True), max_epochs=2)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    loaded = load_from_checkpoint(SmallNet, tmp_path / "averaged.ckpt")
    assert {name: q.n_bits for name, q in quantizers(loaded).items()} == {
        name: q.n_bits for name, q in quantizers(model).items()
    }
    x = small_data()[:8][0]
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_averaged_numbers_before_the_first_update_are_those_of_the_calibrated_module(make_trainer) -> None:
    """Upstream 21724: validation ran on a copy made before calibration."""
    losses = []

    class Record(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                losses.append(float(trainer.callback_metrics["val_loss"]))

    class Late(WeightAveraging):
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return False

    class Stop(pl.Callback):
        def on_train_batch_start(self, *args: object) -> None:
            raise RuntimeError("stop")

    model = SmallNet()
    twin = copy.deepcopy(model)
    data = DataLoader(small_data(), 32)
    make_trainer(quiet(weight_bits=2), Late(), Record()).fit(model, loader(shuffle=False), data)
    with pytest.raises(RuntimeError, match="stop"):  # calibrated, and not trained
        make_trainer(quiet(weight_bits=2), Stop()).fit(twin, loader(shuffle=False))
    expected = make_trainer(quiet(weight_bits=2)).validate(twin, data, verbose=False)[0]["val_loss"]
    assert losses == [expected]


@pytest.mark.parametrize("ours_first", [True, False])
def test_pruning_in_both_orders(make_trainer, ours_first: bool) -> None:
    """Upstream 11047, 13411: modules were replaced behind the back of pruning."""
    model, callback = SmallNet(), quiet()
    pruning = ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=None, use_lottery_ticket_hypothesis=False)
    order = [callback, pruning] if ours_first else [pruning, callback]
    trainer = make_trainer(*order, max_epochs=2)
    trainer.fit(model, loader())
    assert len(callback.report) == 8
    weights = torch.cat([getattr(model, name).weight.flatten() for name in ("stem", "body", "hidden", "head")])
    assert float((weights == 0).float().mean()) > 0.4
    assert all(not torch.equal(q.step, q.initial_step) for q in quantizers(model).values())


def test_learning_rate_finder_runs_on_the_float_module_and_leaves_no_trace(make_trainer, tmp_path) -> None:
    model, callback = SmallNet(), quiet()
    calibrated_during_search = []

    class Finder(LearningRateFinder):
        def lr_find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().lr_find(trainer, pl_module)
            calibrated_during_search.append(any(q.is_calibrated for q in quantizers(pl_module).values()))

    finder = Finder(num_training_steps=5, attr_name="learning_rate")
    trainer = make_trainer(callback, finder, max_epochs=1, enable_checkpointing=True)
    trainer.fit(model, loader())
    assert calibrated_during_search == [False] and len(callback.report) == 8
    assert all(q.is_calibrated for q in quantizers(model).values())


def test_batch_size_finder(make_trainer) -> None:
    class Sized(SmallNet):
        batch_size = 2

        def train_dataloader(self) -> DataLoader:
            return DataLoader(small_data(), self.batch_size)

        val_dataloader = train_dataloader

    model, callback = Sized(), quiet()
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    make_trainer(finder, callback, max_epochs=1, enable_checkpointing=True).fit(model)
    assert model.batch_size > 2 and len(callback.report) == 8


def test_finetuning(make_trainer, tmp_path) -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
            self.freeze([pl_module.stem, pl_module.body])

        def finetune_function(
            self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer
        ) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group([pl_module.stem, pl_module.body], optimizer)

    class Filtered(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, weight_decay=0.1)

    model, callback = Filtered(), quiet()
    seen = []

    class Frozen(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            moved = {name: not torch.equal(q.step, q.initial_step) for name, q in quantizers(pl_module).items()}
            seen.append({name for name, has in moved.items() if has})

    trainer = make_trainer(Unfreeze(), callback, Frozen(), max_epochs=2)
    trainer.fit(model, loader())
    first, second = seen
    assert not any(name.startswith(("stem", "body")) for name in first)
    assert second == set(quantizers(model))
    groups = trainer.optimizers[0].param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    steps = {id(q.relative_step) for q in quantizers(model).values()}
    assert all(group["weight_decay"] == 0 for group in groups if steps & {id(p) for p in group["params"]})

    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_trainer(Unfreeze(), quiet(), max_epochs=3)
    resumed.fit(Filtered(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.current_epoch == 3
    with pytest.raises(MisconfigurationException, match="put QuantInitCallback after Unfreeze in"):
        make_trainer(quiet(), Unfreeze()).fit(Filtered(), loader())


def test_the_backbone_gets_the_rates_that_its_callback_sets(make_trainer) -> None:
    class Parts(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(self.stem, self.body)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)

    class Rates(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Parts) -> None:
            rate_of = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
            rates.append([rate_of.get(id(p)) for p in (pl_module.stem.weight, pl_module.head.weight)])
            if quantized_layers(pl_module):
                steps = pl_module.stem.weight_quantizer, pl_module.head.weight_quantizer
                assert [rate_of.get(id(q.relative_step)) for q in steps] == rates[-1]

    found = []
    for ours in ([], [quiet()]):
        rates: list[list[float | None]] = []
        make_trainer(BackboneFinetuning(1), *ours, Rates(), max_epochs=5).fit(Parts(), loader())
        found.append(rates)
    assert found[0] == found[1] and len({of_backbone for of_backbone, _ in rates}) == 5


def test_layers_that_are_unfrozen_one_after_the_other_keep_their_rates(make_trainer) -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
            self.freeze([pl_module.stem, pl_module.body])

        def finetune_function(self, pl_module: SmallNet, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            for layer, start, rate in ((pl_module.body, 1, 1e-3), (pl_module.stem, 2, 1e-5)):
                if epoch == start:
                    self.unfreeze_and_add_param_group(layer, optimizer, lr=rate)

    class Filtered(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)

    model = Filtered()
    trainer = make_trainer(Unfreeze(), quiet(), max_epochs=4)
    trainer.fit(model, loader())
    rate_of = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for layer, rate in ((model.head, 0.01), (model.body, 1e-3), (model.stem, 1e-5)):
        assert rate_of[id(layer.weight)] == rate_of[id(layer.weight_quantizer.relative_step)] == rate


def test_early_stopping_and_checkpoints_on_a_quantization_metric(make_trainer, tmp_path) -> None:
    stop = EarlyStopping("quant_error/mean", patience=0, mode="min", check_on_train_epoch_end=True, min_delta=10.0)
    keep = ModelCheckpoint(tmp_path, monitor="quant_error/max", filename="{epoch}")
    trainer = make_trainer(quiet(), stop, keep, max_epochs=9, enable_checkpointing=True, log_every_n_steps=1)
    trainer.fit(SmallNet(), loader())
    assert trainer.current_epoch < 9 and stop.stopped_epoch > 0
    assert keep.best_model_score is not None and keep.best_model_path


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_quantization_metrics_are_there_before_the_first_log(make_trainer, tmp_path) -> None:
    """After a sanity check, which forgets all metrics, and in a run that resumes."""
    for path in (None, tmp_path / "last.ckpt"):
        stop = EarlyStopping("quant_error/mean", patience=9)
        keep = ModelCheckpoint(tmp_path / "kept", monitor="quant_error/max")
        sanity = {"num_sanity_val_steps": 2, "enable_checkpointing": True, "log_every_n_steps": 50}
        trainer = make_trainer(quiet(), stop, keep, max_epochs=1 if path is None else 2, **sanity)
        trainer.fit(SmallNet(), loader(), loader(shuffle=False), ckpt_path=path)
        assert 0 < float(keep.best_model_score) < 1 and 0 < float(stop.best_score) < 1
        trainer.save_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("depth", [1, -1])
def test_model_summary(make_trainer, depth: int, capsys) -> None:
    class Shown(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.randn(2, 1, 6, 6)

    make_trainer(quiet(), ModelSummary(depth), max_steps=1, enable_model_summary=True).fit(Shown(), loader())


def test_a_callback_that_the_module_brings(make_trainer) -> None:
    class Brings(SmallNet):
        def configure_callbacks(self) -> list[pl.Callback]:
            return [quiet()]

    model = Brings()
    make_trainer(max_steps=1).fit(model, loader())
    assert all(q.is_calibrated for q in quantizers(model).values())


@pytest.mark.filterwarnings("ignore:.*a model that overrides the configure_model callback")
@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_averaging_of_layers_that_are_built_later_is_refused_where_it_would_do_nothing(
    make_trainer, name: str, hook: str
) -> None:
    class Late(pl.LightningModule):
        def build(self, stage: str = "") -> None:
            if not hasattr(self, "net"):
                self.net = SmallNet()

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    setattr(Late, hook, Late.build)
    trainer, model = make_trainer(quiet(), AVERAGING[name](), max_epochs=2), Late()
    if hook == "configure_model" and name != "StochasticWeightAveraging":
        trainer.fit(model, loader())
        assert all(quantizer.is_calibrated for quantizer in quantizers(model).values())
        return
    with pytest.raises(
        MisconfigurationException, match=f"`{name}` copies Late before its `setup` or `configure_model`"
    ):
        trainer.fit(model, loader())
