"""Faults: what a run leaves behind when it is killed, interrupted or when the user's step raises."""

import copy
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader
from torch import Tensor

from lightning_qinit import QuantInitCallback
from lightning_qinit.insertion import named_quantizers, quantized_layers

SCRIPT = """
import sys, time, warnings; sys.path.insert(0, {tests!r}); warnings.simplefilter("ignore")
import lightning.pytorch as pl, torch
from pathlib import Path
from conftest import SmallNet, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_qinit import QuantInitCallback

folder, where, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"

def wait(place):
    if place == where and not resume:
        (folder / "reached").touch()
        time.sleep(100)

class Net(SmallNet):
    def __init__(self):
        super().__init__()
        self.dropout.p = 0.0

    def training_step(self, batch, batch_idx):
        if torch.is_grad_enabled():
            if self.current_epoch == 1 and batch_idx == 2:
                wait("epoch")
        elif batch_idx == 1:
            wait("calibration")
        return super().training_step(batch, batch_idx)

class Slow(pl.Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.current_epoch == 1:
            wait("checkpoint")

pl.seed_everything(0)
trainer = pl.Trainer(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
    callbacks=[
        QuantInitCallback(weight_bits=3, print_report=False), Slow(),
        ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_epochs=1),
    ],
)
last = folder / "checkpoints" / "last.ckpt"
model = Net()
trainer.fit(model, loader(shuffle=False), ckpt_path=last if resume and last.exists() else None)
torch.save(model.state_dict(), folder / "final.pt")
"""


def start(folder: Path, where: str, resume: bool) -> subprocess.Popen:
    script = folder / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent.parent)))
    command = [sys.executable, str(script), str(folder), where, "resume" if resume else "start"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors.decode()[-2000:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(folder, "nowhere", resume=False))
    return torch.load(folder / "final.pt")


@pytest.mark.parametrize("where", ["calibration", "epoch", "checkpoint"])
def test_a_killed_run_resumes_to_the_same_end(tmp_path: Path, uninterrupted: dict[str, Tensor], where: str) -> None:
    process = start(tmp_path, where, resume=False)
    deadline = time.monotonic() + 60
    while not (tmp_path / "reached").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() == (where != "calibration")
    finish(start(tmp_path, where, resume=True))
    final = torch.load(tmp_path / "final.pt")
    for name, value in uninterrupted.items():
        assert torch.equal(value, final[name]), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_calibration_leaves_the_module_as_it_was(make_trainer, error: type[BaseException]) -> None:
    class Interrupted(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.norm.running_mean += 1
            self.learning_rate = 99.0
            if batch_idx == 1:
                raise error("enough")
            return super().training_step(batch, batch_idx)

    model = Interrupted()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError, MemoryError)):
        make_trainer(QuantInitCallback(print_report=False, sequential=True)).fit(model, loader(shuffle=False))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    if error is not MemoryError:  # the step may fail once more, when training has begun
        assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.learning_rate == 0.05
    assert not {"log", "optimizers", "manual_backward", "on_load_checkpoint", "training_step"} & vars(model).keys()
    assert not any(q.is_calibrated for q in named_quantizers(quantized_layers(model)).values())


def test_a_run_interrupted_in_training_keeps_its_quantizers(make_trainer) -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, *args: object) -> None:
            raise KeyboardInterrupt

    model, callback = SmallNet(), QuantInitCallback(print_report=False)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(callback, Interrupt()).fit(model, loader())
    assert len(callback.report) == 8
    assert all(q.is_calibrated for q in named_quantizers(quantized_layers(model)).values())
    second = QuantInitCallback(print_report=False)
    make_trainer(second, max_steps=1).fit(model, loader())
    assert second.report == []
