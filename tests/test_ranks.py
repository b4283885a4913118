"""A fit in two processes: every rank starts from the same steps and logs the same."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_two_ranks_start_from_the_same_steps_and_log_the_same_as_one_process(tmp_path: Path) -> None:
    script = f"""
import sys, warnings; sys.path.insert(0, {str(Path(__file__).parent)!r}); warnings.simplefilter("ignore")
import lightning.pytorch as pl, torch
from conftest import SmallNet, loader
from lightning.pytorch.loggers import CSVLogger
from lightning_qinit import QuantInitCallback
from lightning_qinit.insertion import quantized_layers
ranks = int(sys.argv[1])
pl.seed_everything(0)
trainer = pl.Trainer(
    accelerator="cpu", strategy="ddp" if ranks > 1 else "auto", devices=ranks, max_steps=3,
    logger=CSVLogger(sys.argv[2], name="log", version=ranks), log_every_n_steps=1,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    callbacks=[QuantInitCallback(weight_bits=3, calibration_batches=8, print_report=False)],
)
model = SmallNet()
trainer.fit(model, loader(batch_size=32 // ranks, shuffle=False))  # all of the data in a step
torch.save(model.state_dict(), f"{{sys.argv[2]}}.{{ranks}}.{{trainer.global_rank}}")
"""
    file = tmp_path / "run.py"
    file.write_text(script)
    for ranks in (1, 2):
        subprocess.run([sys.executable, str(file), str(ranks), str(tmp_path / "state")], check=True, timeout=200)
    one, first, second = (torch.load(tmp_path / f"state.{name}") for name in ("1.0", "2.0", "2.1"))
    for name, value in first.items():
        assert torch.equal(value, second[name]) or "running" in name, name  # BatchNorm statistics are each rank's own
        if name.endswith("initial_step"):
            assert torch.allclose(value, one[name], rtol=1e-5), name
    logged = []
    for ranks in (1, 2):
        with open(tmp_path / "state" / "log" / f"version_{ranks}" / "metrics.csv") as rows:
            logged.append(next(row for row in csv.DictReader(rows) if row["quant_error/mean"]))
    compared = 0
    for name, value in logged[0].items():
        # BatchNorm normalizes each rank's half by itself, so what comes after it differs
        if name.startswith("quant") and value and (name.endswith(".weight") or name.endswith("stem.input")):
            tolerance = 0.1 if name == "quant_step_to_optimal/stem.input" else 1e-4  # the mean of two halves' own
            assert float(logged[1][name]) == pytest.approx(float(value), rel=tolerance, abs=1e-7), name
            compared += 1
    assert compared > 30


def test_two_ranks_train_alike_whatever_the_module_does(tmp_path: Path) -> None:
    script = f"""
import sys, warnings; sys.path.insert(0, {str(Path(__file__).parent)!r}); warnings.simplefilter("ignore")
import lightning.pytorch as pl, torch
from conftest import SmallNet, loader
from lightning.pytorch.strategies import DDPStrategy
from lightning_qinit import QuantInitCallback

class Bypassed(SmallNet):  # as Swin's attention: the weight is used, the layer is never called
    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = torch.nn.functional.linear(x.flatten(1), self.hidden.weight, self.hidden.bias)
        return self.head(x) + 0 * sum(p.sum() for p in self.body.parameters(recurse=False))

class Idle(SmallNet):  # a frozen layer that never runs, one that trains only, and its own zeros for what does not run
    def __init__(self):
        super().__init__()
        self.old = torch.nn.Linear(8, 10).requires_grad_(False)
        self.extra = torch.nn.Linear(36, 3)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.training and batch_idx % 2:
            loss = loss + torch.nn.functional.cross_entropy(self.extra(batch[0].flatten(1)), batch[1])
        return loss + 0 * sum(p.sum() for p in self.parameters())

class Branches(SmallNet):  # of which one rank takes one alone
    def __init__(self):
        super().__init__()
        self.side = torch.nn.Linear(8, 3)

    def forward(self, x):
        out = super().forward(x)
        return out + self.side(out.new_ones(len(x), 8)) if self.global_rank == 1 else out

class Late(SmallNet):  # the step of one rank needs what a hook sets up after calibration
    def on_train_start(self):
        self.shift = 0.0

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.shift if self.global_rank == 1 else 0.0)

static = DDPStrategy(static_graph=True)  # which takes the first pass with gradients for the first of training
for name, model, strategy, accumulated, settings in (
    ("output", Bypassed(), "ddp", 2, dict(weight_bits=3, criterion="output")),
    ("everything", Bypassed(), "ddp", 2,
        dict(criterion="fisher", sequential=True, recalibrate_batchnorm=True, average_bits=3.0)),
    ("static", SmallNet(), static, 1, dict(criterion="fisher")),
    ("late", Late(), "ddp", 1, dict()),
    ("idle", Idle(), "ddp", 1, dict()),
    ("branches", Branches(), DDPStrategy(find_unused_parameters=True), 1, dict()),
):
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy, devices=2, max_steps=4, accumulate_grad_batches=accumulated, max_epochs=2,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[QuantInitCallback(**settings, activation_quantizer="lsq+", print_report=False)],
    )
    trainer.fit(model, loader(batch_size=4, shuffle=False))
    assert trainer.global_step == 4, trainer.global_step
    torch.save(model.state_dict(), f"{{sys.argv[1]}}/{{name}}.{{trainer.global_rank}}")
"""
    file = tmp_path / "run.py"
    file.write_text(script)
    subprocess.run([sys.executable, str(file), str(tmp_path)], check=True, timeout=200)
    assert bool(torch.load(tmp_path / "branches.0")["side.weight_quantizer.calibrated"])
    for case in ("output", "everything", "static", "late", "idle", "branches"):
        first, second = (torch.load(tmp_path / f"{case}.{rank}") for rank in (0, 1))
        assert bool(first["stem.weight_quantizer.calibrated"])
        assert bool(first["hidden.weight_quantizer.calibrated"]) == (case not in ("output", "everything"))
        assert float(first["head.input_quantizer.relative_step"]) != 1
        for name, value in first.items():
            assert torch.equal(value, second[name]) or "running" in name, (case, name)
