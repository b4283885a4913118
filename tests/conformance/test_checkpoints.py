"""Checkpoints: resume, load, refuse. Numbers are of issues with the callback that Lightning removed."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quiet, small_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_qinit
from lightning_qinit import Sample, load_from_checkpoint, prepare
from lightning_qinit.export import load_integers
from lightning_qinit.insertion import named_quantizers, quantized_layers

KINDS = [
    {"weight_bits": 3},
    {"activation_quantizer": "lsq+", "weight_quantizer": "apot", "average_bits": 3.0},
    {"weight_quantizer": {"name": "lsq", "narrow_range": True}, "per_channel": False, "skip": ["body"]},
]


class Restoring(SmallNet):
    """With the one line that README asks for."""

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        lightning_qinit.restore(self, checkpoint)


def trained(make_trainer, path: Path, model: pl.LightningModule | None = None, **settings) -> pl.LightningModule:
    model = model or SmallNet()
    trainer = make_trainer(quiet(**settings), max_steps=3)
    trainer.fit(model, loader())
    trainer.save_checkpoint(path)
    return model.eval()


def same_outputs(one: nn.Module, other: nn.Module) -> bool:
    x = small_data().tensors[0]
    return torch.equal(one.eval()(x), other.eval()(x))


@pytest.mark.parametrize("settings", KINDS, ids=["plain", "offset and allocated", "narrow and skipped"])
def test_load_from_checkpoint_is_strict_and_gives_the_trained_module(make_trainer, tmp_path, settings) -> None:
    """Upstream 6457, 8485, 11346: unexpected keys in `load_from_checkpoint`; only a callback knew the structure."""
    path = tmp_path / "trained.ckpt"
    model = trained(make_trainer, path, **settings)
    loaded = lightning_qinit.load_from_checkpoint(SmallNet, path, learning_rate=0.5)
    assert type(loaded) is SmallNet and loaded.learning_rate == 0.5
    assert same_outputs(loaded, model)
    torch.load(path, weights_only=True)


def test_one_line_in_the_module_restores_too(make_trainer, tmp_path) -> None:
    path, float_path = tmp_path / "trained.ckpt", tmp_path / "float.ckpt"
    model = trained(make_trainer, path, Restoring(), weight_bits=2)
    assert same_outputs(Restoring.load_from_checkpoint(path), model)
    fresh = Restoring()
    make_trainer(quiet(weight_bits=2)).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert same_outputs(fresh, model)
    trainer = make_trainer(max_steps=1)
    trainer.fit(Restoring(), loader())
    trainer.save_checkpoint(float_path)
    assert not quantized_layers(Restoring.load_from_checkpoint(float_path))


def test_layers_built_in_configure_model_are_restored(make_trainer, tmp_path) -> None:
    class Late(SmallNet):
        def configure_model(self) -> None:
            if not hasattr(self, "extra"):
                self.extra = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.extra(super().forward(x))

    path = tmp_path / "late.ckpt"
    model = trained(make_trainer, path, Late())
    assert same_outputs(lightning_qinit.load_from_checkpoint(Late, path), model)


def test_weights_alone_need_the_settings(make_trainer, tmp_path) -> None:
    keep = ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights")
    model = SmallNet()
    make_trainer(quiet(weight_bits=2), keep, enable_checkpointing=True, max_steps=3).fit(model, loader())
    path = tmp_path / "weights.ckpt"
    with pytest.raises(ValueError, match="holds quantizers but not their settings.*`save_weights_only=True`.*prepare"):
        lightning_qinit.load_from_checkpoint(SmallNet, path)
    by_hand = prepare(SmallNet(), weight_bits=2)
    by_hand.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    through_trainer = SmallNet()
    make_trainer(quiet(weight_bits=2)).test(through_trainer, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert same_outputs(by_hand, model) and same_outputs(through_trainer, model)


def test_a_module_that_restores_is_tested_from_weights_alone(make_trainer, tmp_path) -> None:
    keep, path = ModelCheckpoint(tmp_path, save_weights_only=True), tmp_path / "model.safetensors"
    trainer = make_trainer(quiet(export=path), keep, enable_checkpointing=True, max_steps=3)
    trainer.fit(Restoring(), loader())
    after_fit = trainer.test(trainer.model, loader(shuffle=False), verbose=False)
    assert trainer.test(trainer.model, loader(shuffle=False), ckpt_path="best", verbose=False) == after_fit
    assert path.exists()


def test_a_state_without_some_quantizers_is_announced(make_trainer, tmp_path) -> None:
    """As of a module that leaves a frozen part out of its checkpoints."""

    class Partial(SmallNet):
        strict_loading = False

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "stem" not in key}

    path, missing = tmp_path / "partial.ckpt", "no state of stem.weight_quantizer, stem.input_quantizer, which stay in"
    model = trained(make_trainer, path, Partial())
    trainer = make_trainer(quiet())
    trainer.test(model, loader(shuffle=False), ckpt_path=path, verbose=False)  # which has them
    with pytest.warns(UserWarning, match=missing):
        make_trainer(quiet()).test(Partial(), loader(shuffle=False), ckpt_path=path, verbose=False)
    with pytest.warns(UserWarning, match=missing):
        make_trainer(quiet(), max_epochs=2).fit(Partial(), loader(), ckpt_path=path)
    with pytest.warns(UserWarning) as warned:
        lightning_qinit.load_from_checkpoint(Partial, path)
    assert any(missing in str(warning.message) for warning in warned)


def test_a_module_that_renames_its_state_is_not_said_to_lack_any(make_trainer, tmp_path) -> None:
    class Renames(SmallNet):
        def on_save_checkpoint(self, checkpoint: dict) -> None:
            checkpoint["state_dict"] = {f"my.{key}": value for key, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint: dict) -> None:
            checkpoint["state_dict"] = {k.removeprefix("my."): v for k, v in checkpoint["state_dict"].items()}

    path = tmp_path / "renamed.ckpt"
    model, fresh = trained(make_trainer, path, Renames()), Renames()
    make_trainer(quiet()).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert same_outputs(fresh, model) and same_outputs(load_from_checkpoint(Renames, path), model)


def test_the_best_checkpoint_may_be_anywhere(make_trainer, tmp_path) -> None:
    keep, path = ModelCheckpoint("memory://checkpoints"), tmp_path / "model.safetensors"
    model = SmallNet()
    make_trainer(quiet(export=path), keep, enable_checkpointing=True, max_steps=3).fit(model, loader())
    assert keep.best_model_path.startswith("memory://")
    assert same_outputs(load_integers(SmallNet(), path), model)


def test_the_fitted_module_can_be_tested_from_its_checkpoint(make_trainer, tmp_path) -> None:
    """Upstream 12896: `trainer.test(ckpt_path=...)` on the same objects raised, since fit had converted the module."""
    model, keep = SmallNet(), ModelCheckpoint(tmp_path, filename="best")
    trainer = make_trainer(quiet(), keep, enable_checkpointing=True, max_epochs=2)
    trainer.fit(model, loader())
    data = DataLoader(small_data(), 32)
    after_fit = trainer.test(model, data, verbose=False)
    assert trainer.test(model, data, ckpt_path="best", verbose=False) == after_fit
    assert trainer.test(ckpt_path=str(tmp_path / "best.ckpt"), dataloaders=data, verbose=False) == after_fit


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"weight_bits": 4}, "weight_bits: 3 in the checkpoint, 4 in the callback"),
        ({"activation_bits": None}, "activation_bits: 4 in the checkpoint, None in the callback"),
        ({"quantizer": "lsq+"}, r"quantizer: 'lsq' in the checkpoint, 'lsq\+' in the callback"),
        ({"per_channel": False}, "per_channel: True in the checkpoint, False in the callback"),
        ({"skip": ["head"]}, r"skip: \[\] in the checkpoint, \['head'\] in the callback"),
        ({"weight_quantizer": {"name": "lsq", "narrow_range": True}}, "weight_quantizer: None in the checkpoint"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_before_anything_is_loaded(
    make_trainer, tmp_path, other: dict, difference: str
) -> None:
    path = tmp_path / "three.ckpt"
    trained(make_trainer, path, weight_bits=3)
    model = SmallNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for run in ("fit", "test"):
        with pytest.raises(MisconfigurationException, match=difference):
            trainer = make_trainer(quiet(**{"weight_bits": 3, **other}))
            getattr(trainer, run)(model, loader(shuffle=False), ckpt_path=path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_another_initializer_is_no_difference(make_trainer, tmp_path) -> None:
    path = tmp_path / "trained.ckpt"
    model, fresh = trained(make_trainer, path), SmallNet()
    make_trainer(quiet(initializer="minmax")).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert same_outputs(fresh, model)


def test_initializers_that_nobody_can_import_are_not_needed_to_load(make_trainer, tmp_path) -> None:
    def mine(sample: Sample, levels: Tensor) -> Tensor:
        return sample.maximum / levels.max()

    model = SmallNet()
    callback = quiet(
        weight_initializer=mine, overrides={"head": {"activation_initializer": lambda *given: mine(*given)}}
    )
    trainer = make_trainer(callback)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    assert same_outputs(load_from_checkpoint(SmallNet, tmp_path / "trained.ckpt"), model)


def test_a_float_checkpoint_starts_a_quantized_run(make_trainer, tmp_path) -> None:
    path = tmp_path / "float.ckpt"
    trainer = make_trainer(max_epochs=1)
    trainer.fit(SmallNet(), loader())
    trainer.save_checkpoint(path)
    model = SmallNet.load_from_checkpoint(path)
    weight = model.stem.weight.detach().clone()
    callback = quiet()
    make_trainer(callback, max_steps=1).fit(model, loader())
    assert len(callback.report) == 8 and not torch.equal(model.stem.weight, weight)
    with pytest.warns(UserWarning, match="numbers of the float module"):
        make_trainer(quiet()).test(SmallNet(), loader(shuffle=False), ckpt_path=path, verbose=False)
    with pytest.raises(MisconfigurationException, match="one of a float module, whose optimizer knows no steps: load"):
        make_trainer(quiet(), max_epochs=2).fit(SmallNet(), loader(), ckpt_path=path)


@pytest.mark.parametrize("settings", KINDS, ids=["plain", "offset and allocated", "narrow and skipped"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_resumed_runs_continue_bit_for_bit(make_trainer, tmp_path, settings: dict, weight_decay: float) -> None:
    class Scheduled(SmallNet):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 0.01, weight_decay=weight_decay)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    def run(epochs: int, model: pl.LightningModule, resume: Path | None = None) -> pl.LightningModule:
        pl.seed_everything(1, verbose=False)
        trainer = make_trainer(quiet(**settings), max_epochs=epochs)
        trainer.fit(model, loader(shuffle=False), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    start = Scheduled()
    start.dropout.p = 0.0  # each run has random numbers of its own
    straight = run(4, copy.deepcopy(start))
    run(2, copy.deepcopy(start))
    resumed = run(4, copy.deepcopy(start), tmp_path / "2.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_module_saved_while_it_trains_unpickles_elsewhere(make_trainer, tmp_path) -> None:
    """Upstream 1.3: `input_compatible` wrappers could not be saved. Nothing of ours hangs on the user's module."""

    class Saving(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            twin = copy.deepcopy(pl_module)
            twin._trainer = None
            torch.save(twin, tmp_path / "module.pt")
            assert not {"on_load_checkpoint", "configure_model", "forward"} & vars(pl_module).keys()

    model = SmallNet()
    make_trainer(quiet(), Saving(), max_steps=2).fit(model, loader())
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch
from conftest import small_data
model = torch.load({str(tmp_path / "module.pt")!r}, weights_only=False).eval()
torch.save(model(small_data().tensors[0]), {str(tmp_path / "outputs.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), model.eval()(small_data().tensors[0]))


def test_fit_twice_calibrates_once(make_trainer) -> None:
    model, first, second = SmallNet(), quiet(), quiet()
    make_trainer(first, max_steps=2).fit(model, loader())
    steps = {name: q.initial_step.clone() for name, q in named_quantizers(quantized_layers(model)).items()}
    make_trainer(second, max_steps=2).fit(model, loader())
    assert first.report and not second.report
    for name, q in named_quantizers(quantized_layers(model)).items():
        assert torch.equal(q.initial_step, steps[name])


def test_validate_then_fit(make_trainer) -> None:
    model, callback, data = SmallNet(), quiet(), loader(shuffle=False)
    trainer = make_trainer(callback, max_steps=2)
    with pytest.warns(UserWarning, match="numbers of the float module"):
        trainer.validate(model, data, verbose=False)
    trainer.fit(model, data)
    assert len(callback.report) == 8


def test_validate_test_and_predict_change_nothing(make_trainer) -> None:
    """Upstream 8507, 8540: observers learned from validation data. `test_quantization_val_test_predict`, to the bit."""
    states = []
    for validates in (False, True):
        torch.manual_seed(0)
        model = SmallNet()
        model.dropout.p = 0.0  # a loader draws a random number for each pass, in float runs too
        trainer = make_trainer(quiet(), max_epochs=2, num_sanity_val_steps=2 if validates else 0)
        if validates:
            trainer.fit(model, loader(shuffle=False), DataLoader(small_data(), 8))
            trainer.validate(model, DataLoader(small_data(), 8), verbose=False)
            trainer.test(model, DataLoader(small_data(), 8), verbose=False)
            trainer.predict(model, DataLoader(small_data().tensors[0], 8))
        else:
            trainer.fit(model, loader(shuffle=False))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_quantizers_that_the_user_switched_off_stay_off(make_trainer) -> None:
    """Upstream 8540, `test_quantization_disable_observers`: stage hooks reset the user's flags."""
    model = SmallNet()
    trainer = make_trainer(quiet(), max_steps=2, num_sanity_val_steps=1)
    trainer.fit(model, loader(), DataLoader(small_data(), 8))
    flags = {}
    for index, (name, quantizer) in enumerate(named_quantizers(quantized_layers(model)).items()):
        quantizer.enabled = flags[name] = index % 2 == 0
    for run in (trainer.validate, trainer.test):
        run(model, DataLoader(small_data(), 8), verbose=False)
    make_trainer(quiet(), max_steps=2).fit(model, loader())
    assert {name: q.enabled for name, q in named_quantizers(quantized_layers(model)).items()} == flags


@pytest.mark.parametrize(("batches", "expected"), [(1, 1), (3, 3), (100, 4)])
def test_calibration_runs_as_often_as_asked(make_trainer, batches: int, expected: int) -> None:
    """Upstream `test_quantization_triggers`: how often what ran when."""
    calls = []

    class Counting(SmallNet):
        def calibration_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            calls.append(batch_idx)
            self(batch[0])

    model = Counting()
    trainer = make_trainer(quiet(calibration_batches=batches), max_epochs=2, num_sanity_val_steps=2)
    trainer.fit(model, loader(), DataLoader(small_data(), 8))
    trainer.validate(model, DataLoader(small_data(), 8), verbose=False)
    trainer.test(model, DataLoader(small_data(), 8), verbose=False)
    assert calls == list(range(expected))
