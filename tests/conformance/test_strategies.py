"""Several processes: DDP launched and spawned, sharded parameters, strategies that restore late. Two on the CPU (gloo).

Lightning's FSDP and DeepSpeed strategies need a GPU, so they are not run here. What is particular to them is: FSDP2's
sharding, through `ModelParallelStrategy`, and restoring after `on_fit_start`, through a strategy that does so.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from conftest import SmallNet, loader
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_qinit import QuantInitCallback
from lightning_qinit.insertion import named_quantizers, quantized_layers

HEAD = """
import sys, warnings; sys.path.insert(0, {tests!r}); warnings.simplefilter("ignore")
import lightning.pytorch as pl, torch
from conftest import SmallNet, loader
from lightning_qinit import QuantInitCallback, prepare
from lightning_qinit.insertion import named_quantizers, quantized_layers
folder = sys.argv[1]

def trainer(strategy, **arguments):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    callback = QuantInitCallback(weight_bits=3, calibration_batches=8, print_report=False)
    defaults = dict(max_epochs=1, devices=2, num_sanity_val_steps=0, callbacks=[callback])
    return pl.Trainer(accelerator="cpu", strategy=strategy, **{{**quiet, **defaults, **arguments}})
"""


def run(folder: Path, body: str) -> subprocess.CompletedProcess:
    script = folder / "run.py"
    script.write_text(HEAD.format(tests=str(Path(__file__).parent.parent)) + body)
    return subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=200)


SPAWN = """
if __name__ == "__main__":
    try:
        trainer("ddp_spawn", devices=1).fit(SmallNet(), loader())
    except Exception as error:
        print(error)
    torch.manual_seed(0)
    model = SmallNet()
    prepare(model, weight_bits=3)
    trainer("ddp_spawn").fit(model, loader(batch_size=8, shuffle=False))
    torch.save(model.state_dict(), folder + "/spawned.pt")
    alone = SmallNet()
    torch.manual_seed(0)
    alone = SmallNet()
    trainer("auto", devices=1, limit_train_batches=4).fit(alone, loader(batch_size=8, shuffle=False))
    torch.save(alone.state_dict(), folder + "/alone.pt")
"""


def test_spawned_processes_train_a_module_that_was_prepared_and_no_other(tmp_path: Path) -> None:
    done = run(tmp_path, SPAWN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "call `lightning_qinit.prepare(module, ...)` with the same settings before `fit`" in done.stdout
    spawned, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("spawned", "alone"))
    assert spawned.keys() == alone.keys()
    for name, value in spawned.items():
        if name.endswith("calibrated"):
            assert bool(value), name
        if name.endswith("initial_step"):  # chosen by two processes on half the data each
            assert torch.allclose(value, alone[name], rtol=1e-5), name
        if name.endswith("relative_step"):
            assert not (value == 1).any(), name


SHARDED = """
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

class Sharded(SmallNet):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for part in (self.hidden, self.head, self):
            fully_shard(part, mesh=mesh)

torch.manual_seed(0)
def strategy():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

run = trainer(strategy(), max_epochs=2, gradient_clip_val=1.0, logger=TensorBoardLogger(folder), log_every_n_steps=1)
model = Sharded()
run.fit(model, loader(batch_size=8, shuffle=False))
steps = {}
for name, quantizer in named_quantizers(quantized_layers(model)).items():
    assert isinstance(quantizer.relative_step, DTensor)
    steps[name] = (quantizer.initial_step, quantizer.relative_step.full_tensor().detach(), quantizer.step.detach())
torch.save(steps, f"{folder}/sharded.{run.global_rank}.pt")
if run.global_rank == 0:
    torch.save(run.callbacks[0].report, folder + "/report.pt")
run.save_checkpoint(folder + "/two.ckpt")
again, fresh = trainer(strategy(), max_epochs=2), Sharded()
again.fit(fresh, loader(batch_size=8, shuffle=False), ckpt_path=folder + "/two.ckpt")
assert again.callbacks[0].report == []
for name, quantizer in named_quantizers(quantized_layers(fresh)).items():
    assert quantizer.is_calibrated and torch.equal(quantizer.step.detach(), steps[name][2]), name
starts = []
for criterion in ("fisher", "hessian"):
    for kind, how in ((SmallNet, "ddp"), (Sharded, strategy())):
        torch.manual_seed(0)
        callback = QuantInitCallback(criterion=criterion, calibration_batches=8, print_report=False)
        part = kind()
        trainer(how, callbacks=[callback], max_epochs=1).fit(part, loader(batch_size=8, shuffle=False))
        starts.append({name: q.initial_step for name, q in named_quantizers(quantized_layers(part)).items()})
    for name, step in starts[-2].items():
        assert torch.allclose(step, starts[-1][name], rtol=1e-5), (criterion, name)
try:
    callback = QuantInitCallback(damp_oscillation=1.0, print_report=False)
    trainer(strategy(), callbacks=[callback]).fit(Sharded(), loader())
except MisconfigurationException as error:
    if run.global_rank == 0:
        print(error)
"""


def test_sharded_parameters(tmp_path: Path) -> None:
    done = run(tmp_path, SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the strategy shards the weight of layer 'stem': use one that does not" in done.stdout
    first, second = (torch.load(tmp_path / f"sharded.{rank}.pt") for rank in (0, 1))
    assert len(first) == len(torch.load(tmp_path / "report.pt", weights_only=False)) == 8
    torch.manual_seed(0)
    alone, callback = SmallNet(), QuantInitCallback(weight_bits=3, calibration_batches=8, print_report=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_steps=1,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(alone, loader(batch_size=8, shuffle=False))
    for name, quantizer in named_quantizers(quantized_layers(alone)).items():
        initial, relative, step = first[name]
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True)), name
        assert torch.allclose(initial, quantizer.initial_step, rtol=1e-5), name
        assert not (relative == 1).any() and torch.equal(step, initial * relative)


class LateRestore(SingleDeviceStrategy):
    """Loads checkpoints after `on_fit_start`, as FSDP, DeepSpeed and ModelParallel do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(*args, **kwargs)
        self.lightning_module.load_state_dict(checkpoint.pop("state_dict"))
        return checkpoint

    def load_model_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass  # loaded by now


def test_strategies_that_restore_late_do_not_calibrate_again(make_trainer, tmp_path: Path) -> None:
    def callback() -> QuantInitCallback:
        return QuantInitCallback(print_report=False, calibration_batches=2)

    states = []
    for strategy in (None, LateRestore):
        torch.manual_seed(0)
        model, first = SmallNet(), callback()
        model.dropout.p = 0.0
        arguments = {} if strategy is None else {"strategy": strategy("cpu")}
        trainer = make_trainer(first, max_epochs=1, **arguments)
        trainer.fit(model, loader(shuffle=False))
        assert len(first.report) == 8
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        fresh, second = SmallNet(), callback()
        fresh.dropout.p = 0.0
        arguments = {} if strategy is None else {"strategy": strategy("cpu")}
        make_trainer(second, max_epochs=2, num_sanity_val_steps=1, **arguments).fit(
            fresh, loader(shuffle=False), ckpt_path=tmp_path / "one.ckpt"
        )
        assert second.report == []
        assert all(q.is_calibrated for q in named_quantizers(quantized_layers(fresh)).values())
        states.append(fresh.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
