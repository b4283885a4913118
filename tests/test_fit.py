"""The callback in a real Trainer: what must hold at every hook."""

import copy
import csv
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Recorder, SmallNet, loader, quantizers, quiet, small_data
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset

from lightning_qinit import QuantInitCallback, Sample, calibrate, load_from_checkpoint, prepare, restore
from lightning_qinit.functional import optimal_scale
from lightning_qinit.insertion import insert, remove


def test_every_step_is_the_optimum_of_its_data_and_trains(make_trainer) -> None:
    model = SmallNet()
    before = copy.deepcopy(model)
    callback = quiet(weight_bits=3, activation_bits=3)
    trainer = make_trainer(callback, max_epochs=1, limit_train_batches=1)
    trainer.fit(model, loader(shuffle=False))
    assert {row.name: row.bits for row in callback.report} == {
        f"{layer}.{what}": bits
        for layer, bits in (("stem", 8), ("body", 3), ("hidden", 3), ("head", 8))
        for what in ("weight", "input")
    }
    seen: dict[str, list[Tensor]] = {}
    before.eval()
    for name, layer in before.named_children():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
    for x, _ in list(loader(shuffle=False))[:1]:
        before(x)
    for name, quantizer in quantizers(model).items():
        layer, what = name.rsplit(".", 1)
        if what == "weight":
            weight = getattr(before, layer).weight
            if weight[0].numel() >= 32:  # else the optimum is shaped by the whole tensor
                fit = optimal_scale(weight, quantizer.levels, channel_axis=0)
                assert torch.allclose(quantizer.initial_step.double(), fit.scale, rtol=1e-6)
        else:
            x = torch.cat(seen[layer])
            assert quantizer.is_signed == bool((x < 0).any())
            error = Sample.of_tensor(x).error(quantizer.levels, quantizer.initial_step)
            best = optimal_scale(x, quantizer.levels).error
            assert float(error) <= float(best) * (1 + 1e-3) + 1e-12, name
        assert not torch.equal(quantizer.step, quantizer.initial_step)


def test_first_and_last_are_by_running_order(make_trainer) -> None:
    class Backwards(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.defined_last_runs_first = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.defined_last_runs_first(x))

    callback = quiet(overrides={"head": {"weight_bits": 5}, "hid*": {"initializer": "minmax", "per_channel": False}})
    model = Backwards()
    make_trainer(callback, fast_dev_run=1).fit(model, loader())
    bits = {row.name: (row.bits, row.steps) for row in callback.report}
    assert bits["defined_last_runs_first.weight"] == (8, 1)
    assert bits["stem.weight"] == (4, 4)
    assert bits["head.weight"][0] == 5 and bits["head.input"][0] == 8  # bits that an override sets hold here too
    assert bits["hidden.weight"] == (4, 1)
    row = next(row for row in callback.report if row.name == "hidden.weight")
    assert row.error == pytest.approx(row.alternatives["minmax"], rel=1e-6)


@pytest.mark.parametrize("kind", ["shuffle", "generator", "workers"])
def test_calibration_leaves_no_trace(make_trainer, tmp_path: Path, kind: str) -> None:
    class Disable(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for quantizer in quantizers(pl_module).values():
                quantizer.enabled = False

    def run(*callbacks: pl.Callback) -> Recorder:
        pl.seed_everything(1)
        arguments = {"generator": torch.Generator().manual_seed(5)} if kind == "generator" else {}
        if kind == "workers":
            arguments = {"num_workers": 1, "persistent_workers": True}
        data = DataLoader(small_data(), 8, shuffle=True, **arguments)
        model = Recorder()
        logger = CSVLogger(tmp_path, name=str(len(callbacks)))
        make_trainer(*callbacks, max_epochs=2, logger=logger).fit(model, data)
        return model

    plain, calibrated = run(), run(quiet(), Disable())
    assert len(plain.batches) == len(calibrated.batches) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain.batches, calibrated.batches, strict=True))
    assert plain.outputs == calibrated.outputs
    assert float(plain.metric.compute()) == float(calibrated.metric.compute())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, calibrated.state_dict()[name]), name
    rows = [(tmp_path / str(n) / "version_0" / "metrics.csv").read_text() for n in (0, 2)]
    assert rows[0].count("\n") == rows[1].count("\n")


def test_same_steps_for_any_batch_size_and_order(make_trainer) -> None:
    observed = []
    for batch_size, shuffle in ((8, False), (16, True), (32, False)):
        torch.manual_seed(0)
        callback, model = quiet(calibration_batches=99), SmallNet()
        make_trainer(callback, max_steps=1).fit(model, loader(batch_size=batch_size, shuffle=shuffle))
        observed.append({name: q.initial_step for name, q in quantizers(model).items()})
    for steps in observed[1:]:
        # the module's own float arithmetic differs in the last bit with the batch size; the sketches do not
        assert all(torch.allclose(steps[name], step, rtol=1e-5) for name, step in observed[0].items())


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(make_trainer, tmp_path: Path) -> None:
    def run(epochs: int, model: SmallNet, path: str | None = None) -> tuple[SmallNet, pl.Trainer, QuantInitCallback]:
        callback = quiet(weight_bits=2, activation_bits=2)
        trainer = make_trainer(callback, max_epochs=epochs)
        pl.seed_everything(3)
        trainer.fit(model, loader(shuffle=False), ckpt_path=path)
        return model, trainer, callback

    class NoDropout(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.0)

    pl.seed_everything(0)
    start = NoDropout()
    straight, _, _ = run(4, copy.deepcopy(start))
    half, trainer, _ = run(2, copy.deepcopy(start))
    path = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(path)
    resumed, _, callback = run(4, copy.deepcopy(start), path)
    assert callback.report == []  # no second calibration
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoints_on_the_same_object_and_in_a_fresh_process(make_trainer, tmp_path: Path) -> None:
    model = SmallNet()
    keep = ModelCheckpoint(tmp_path, monitor="quant_error/max", filename="best")
    trainer = make_trainer(quiet(weight_bits=2), keep, max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, loader(), DataLoader(small_data(), 32))
    expected = trainer.test(model, DataLoader(small_data(), 32), ckpt_path="best", verbose=False)[0]["test_loss"]
    torch.load(keep.best_model_path, weights_only=True)
    script = f"""
import sys, warnings; sys.path.insert(0, {str(Path(__file__).parent)!r}); warnings.simplefilter("ignore")
import lightning.pytorch as pl
from conftest import SmallNet, small_data
from torch.utils.data import DataLoader
from lightning_qinit import QuantInitCallback
trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[QuantInitCallback(2)])
result = trainer.test(SmallNet(), DataLoader(small_data(), 32), ckpt_path={keep.best_model_path!r}, verbose=False)
print("loss", repr(result[0]["test_loss"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert f"loss {expected!r}" in done.stdout


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_built_late(make_trainer, hook: str) -> None:
    class Late(SmallNet):
        def build(self, stage: str | None = None) -> None:
            if not hasattr(self, "extra"):
                self.extra = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(super().forward(x))

    setattr(Late, hook, Late.build)
    model, callback = Late(), quiet(overrides={"extra": {"weight_bits": 6}})
    trainer = make_trainer(callback)
    trainer.fit(model, loader())
    assert {row.name: row.bits for row in callback.report}["extra.weight"] == 6
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert all(held.count(id(q.relative_step)) == 1 for q in quantizers(model).values())
    assert "configure_model" not in vars(model)


def test_optimizer_built_before_the_trainer_adopts_the_steps(make_trainer) -> None:
    model = SmallNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.configure_optimizers = lambda: optimizer
    make_trainer(quiet()).fit(model, loader())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for quantizer in quantizers(model).values():
        assert held.count(id(quantizer.relative_step)) == 1
        assert not torch.equal(quantizer.step, quantizer.initial_step)


def test_manual_optimization_is_calibrated_without_a_step(make_trainer) -> None:
    class Manual(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            with optimizer.toggle_model():
                loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    model, callback = Manual(), quiet()
    trainer = make_trainer(callback)
    trainer.fit(model, loader())
    assert len(callback.report) == 8 and trainer.global_step == 4


def test_data_that_can_be_read_once(make_trainer) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __init__(self) -> None:
            self.items = iter(small_data())

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.items)

    class Shared:
        """Not an iterator itself, but it has one only."""

        def __init__(self) -> None:
            self.batches = iter(list(loader()))

        def __iter__(self) -> Iterator[list[Tensor]]:
            return self.batches

    for data in (DataLoader(Stream(), 8), Shared()):
        callback = quiet()
        trainer = make_trainer(callback)
        trainer.fit(SmallNet(), data)
        assert len(callback.report) == 8 and trainer.global_step == 4


def test_logged_values_are_those_of_the_step(make_trainer, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Independent(pl.Callback):
        """Measures every batch by itself; the last before a log entry is the one that it must show."""

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for name, quantizer in quantizers(pl_module).items():
                quantizer.register_forward_hook(lambda q, args, out, name=name: self.measure(q, args[0], out, name))

        def measure(self, quantizer, x: Tensor, out: Tensor, name: str) -> None:
            x, out = x.detach().double(), out.detach().double()
            seen[-1][f"quant_error/{name}"] = float((out - x).square().sum() / x.square().sum())
            seen[-1][f"quant_step/{name}"] = float(quantizer.step.detach().mean())

        def on_train_batch_start(self, *args: object) -> None:
            seen.append({})

    logger = CSVLogger(tmp_path, name="log")
    trainer = make_trainer(quiet(weight_bits=2), Independent(), logger=logger, log_every_n_steps=2, max_epochs=1)
    trainer.fit(SmallNet(), loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    logged = {int(row["step"]): row for row in rows if "quant_error/mean" in row}
    assert sorted(logged) == [1, 3]
    for step, row in logged.items():
        expected = seen[step]
        assert len(expected) == 16
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4), name
        errors = [value for name, value in expected.items() if name.startswith("quant_error/")]
        assert row["quant_error/mean"] == pytest.approx(sum(errors) / 8, rel=1e-4)
        assert row["quant_error/max"] == pytest.approx(max(errors), rel=1e-4)
        ratio = -10 * torch.tensor(expected["quant_error/body.weight"]).log10()
        assert row["quant_sqnr_db/body.weight"] == pytest.approx(float(ratio), rel=1e-4)


def test_report_reaches_tensorboard_and_the_terminal(make_trainer, tmp_path: Path, capsys) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb")
    make_trainer(QuantInitCallback(), logger=logger, log_every_n_steps=1).fit(SmallNet(), loader())
    printed = capsys.readouterr().out
    events = EventAccumulator(logger.log_dir).Reload()
    text = events.Tensors("quantization/text_summary")[0].tensor_proto.string_val[0].decode()
    for name in ("stem.weight", "body.input", "minmax", "lsq"):
        assert name in printed and name in text
    assert {"quant_step/body.weight", "quant_error/body.input", "quant_error/max"} <= set(events.Tags()["scalars"])


def test_layers_without_data_and_float_tensors_are_named(make_trainer, capsys) -> None:
    class Unused(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.table = nn.Parameter(torch.zeros(5, 2))

    model, again = Unused(), quiet()
    with pytest.warns(UserWarning, match="saw no data for unused.weight, unused.input"):
        make_trainer(QuantInitCallback()).fit(model, loader())
    printed = capsys.readouterr().out
    assert "No data seen, left in float: unused.weight, unused.input." in printed
    assert "Not quantized: table." in printed
    with pytest.warns(UserWarning, match="saw no data for unused.weight, unused.input"):
        make_trainer(again).fit(model, loader())  # where it might have run
    assert again.report == []


def test_uncalibrated_numbers_are_announced(make_trainer) -> None:
    with pytest.warns(UserWarning, match="numbers of the float module"):
        make_trainer(quiet()).test(SmallNet(), loader(shuffle=False), verbose=False)


def test_calibration_step_is_run_instead(make_trainer) -> None:
    class Penalty(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            (gradient,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
            return gradient.square().mean()

        def calibration_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self(batch[0])

    callback = quiet()
    make_trainer(callback).fit(Penalty(), loader())
    assert len(callback.report) == 8


def test_insert_and_remove_restore_the_float_module() -> None:
    model, x = SmallNet().eval(), torch.randn(2, 1, 6, 6)
    expected, keys, weight = model(x), list(model.state_dict()), model.stem.weight
    insert(model, quiet().config)
    assert torch.equal(model(x), expected)  # identity until calibrated
    assert model.stem.weight is weight and set(keys) < set(model.state_dict())
    remove(model)
    assert type(model.stem) is nn.Conv2d and list(model.state_dict()) == keys


def test_untrained_batchnorm_is_calibrated_on_the_statistics_of_the_batch(make_trainer) -> None:
    model = SmallNet()
    model.norm.reset_running_stats()
    with torch.no_grad():
        model.stem.weight.mul_(1000)  # in eval mode everything behind would look a thousand times too large
    seen: list[Tensor] = []
    twin = copy.deepcopy(model).train()
    twin.body.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    twin(next(iter(loader(shuffle=False)))[0])
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    prepared = prepare(copy.deepcopy(model), weight_bits=3, activation_bits=3)
    calibrate(prepared, [next(iter(loader(shuffle=False)))[:1]])
    callback = quiet(weight_bits=3, activation_bits=3, calibration_batches=1)
    make_trainer(callback, limit_train_batches=1).fit(model, loader(shuffle=False))
    for module in (prepared, model):
        quantizer = module.body.input_quantizer
        error = Sample.of_tensor(seen[0]).error(quantizer.levels, quantizer.initial_step)
        assert float(error) <= float(optimal_scale(seen[0], quantizer.levels).error) * (1 + 1e-4)
    for name, value in buffers.items():
        assert torch.equal(prepared.state_dict()[name], value), name
    assert int(model.norm.num_batches_tracked) == 1  # of training, none of calibration


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_of_zero_start_at_the_size_they_will_have(make_trainer, per_channel: bool) -> None:
    model, callback = SmallNet(), quiet(per_channel=per_channel, first_last_bits=None)
    nn.init.zeros_(model.head.weight)
    with pytest.warns(UserWarning, match="saw only zeros in head.weight: their steps"):
        make_trainer(callback, max_epochs=4).fit(model, loader())
    (row,) = [row for row in callback.report if row.name == "head.weight"]
    assert row.step == pytest.approx(8**-0.5 / 8) and row.note == "no nonzero data"
    assert bool((model.head.weight_quantizer(model.head.weight) != 0).any())


@pytest.mark.parametrize("before", ["nothing", "validate", "prepare"])
def test_layers_that_are_new_in_a_calibrated_module_are_calibrated(before, make_trainer) -> None:
    model = SmallNet()
    make_trainer(quiet(), max_epochs=1).fit(model, loader())
    model.head = nn.Linear(8, 3)
    steps = {q: q.step.clone() for q in quantizers(model).values()}
    if before == "validate":
        make_trainer(quiet()).validate(model, loader(shuffle=False), verbose=False)
    elif before == "prepare":
        prepare(model)
    callback, model.learning_rate = quiet(), 0.0
    make_trainer(callback, max_steps=1).fit(model, loader())
    assert [row.name for row in callback.report] == ["head.weight", "head.input"]
    assert {row.bits for row in callback.report} == {8}  # the last layer
    assert len(steps) == 6 and all(torch.equal(quantizer.step, step) for quantizer, step in steps.items())


def test_steps_of_weights_that_a_hook_recomputes_are_trained(make_trainer) -> None:
    model = SmallNet()
    nn.utils.spectral_norm(model.hidden)
    prune.l1_unstructured(model.body, "weight", 0.5)
    nn.utils.spectral_norm(model.head).requires_grad_(False)
    for x, _ in 5 * list(loader()):
        model(x)  # the norm is found by iteration
    make_trainer(quiet(), max_steps=2).fit(model, loader())
    moved = {name for name, q in quantizers(model).items() if not q.step.equal(q.initial_step)}
    assert moved == {f"{name}.{what}" for name in ("stem", "body", "hidden") for what in ("weight", "input")}


class Shuffled(torch.utils.data.Sampler):
    def __init__(self, size: int) -> None:
        self.size, self.rng, self.order = size, np.random.default_rng(5), []

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.order = self.rng.permutation(self.size).tolist()  # of the last epoch
        return iter(self.order)


def test_calibration_gives_a_generator_of_the_module_back(make_trainer) -> None:
    class Noisy(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)
            self.others = [random.Random(3), np.random.default_rng(3), np.random.RandomState(3)]
            self.drawn: list[float] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.drawn.append(float(torch.randn((), generator=self.generator)))
            self.drawn += [float(other.random()) for other in self.others]
            return super().training_step(batch, batch_idx)

    runs = []
    for callbacks in ([], [quiet()]):
        model = Noisy()
        data = small_data()
        data.generator = torch.Generator().manual_seed(4)  # a dataset and a sampler may have their own, too
        sampler = Shuffled(len(data))
        make_trainer(*callbacks, max_steps=3).fit(model, DataLoader(data, 8, sampler=sampler))
        runs.append([*model.drawn, *sampler.order])
    assert runs[0] == runs[1]


def test_what_a_subclass_trained_is_loaded(make_trainer, tmp_path: Path) -> None:
    class Mine(QuantInitCallback):
        pass

    class Restoring(SmallNet):
        def on_load_checkpoint(self, checkpoint: dict) -> None:
            restore(self, checkpoint)

    model = Restoring()
    trainer = make_trainer(Mine(print_report=False, kernels="eager"), max_steps=1)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = load_from_checkpoint(SmallNet, tmp_path / "mine.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    resumed = Restoring()
    make_trainer(quiet(kernels="eager"), max_steps=2).fit(resumed, loader(), ckpt_path=tmp_path / "mine.ckpt")
    assert {q.kernels for q in quantizers(resumed).values()} == {"eager"}


def test_a_callback_that_is_used_again_brings_nothing_along(make_trainer) -> None:
    def train(callback: QuantInitCallback, net: pl.LightningModule) -> dict[str, Tensor]:
        make_trainer(callback, max_steps=2).fit(net, loader(shuffle=False))
        return net.state_dict()

    settings = {"freeze_oscillating": 1e-4, "weight_bits": 2, "first_last_bits": None}
    used, model = quiet(**settings), SmallNet(learning_rate=2.0)
    make_trainer(used, max_epochs=4).fit(model, loader())
    assert any(bool((frozen >= 0).any()) for frozen in used.state_dict()["oscillation"]["frozen"].values())
    again, fresh = SmallNet(), SmallNet()
    again.dropout.p = fresh.dropout.p = 0.0
    fresh.load_state_dict(again.state_dict())
    expected = train(quiet(**settings), fresh)
    assert all(torch.equal(value, expected[name]) for name, value in train(used, again).items())

    class Other(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.last = self.head
            del self.head

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            return self.last(self.hidden((x + self.body(x)).relu().flatten(1)).relu())

    train(used, Other())
    assert {row.name.split(".")[0] for row in used.report} == {"stem", "body", "hidden", "last"}


def test_a_stream_of_what_cannot_be_copied(make_trainer) -> None:
    scale = torch.ones(1, requires_grad=True)
    batches = ([torch.randn(8, 1, 6, 6) * scale, torch.arange(8) % 3] for _ in range(3))
    model, callback = SmallNet(), quiet()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(model, batches)
    assert trainer.global_step == 3 and len(callback.report) == 8


def test_a_batch_that_can_be_read_once_is_trained_on_as_it_came(make_trainer) -> None:
    class Once(IterableDataset):
        def __init__(self) -> None:
            self.batches = iter([{"x": torch.randn(8, 1, 6, 6), "y": torch.arange(8) % 3} for _ in range(3)])

        def __iter__(self) -> "Once":
            return self

        def __next__(self) -> dict[str, Tensor]:
            return next(self.batches)

    class Takes(SmallNet):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch["x"].div_(2)), batch.pop("y"))

    model, callback = Takes(), quiet()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(model, DataLoader(Once(), batch_size=None))
    assert trainer.global_step == 3 and len(callback.report) == 8
