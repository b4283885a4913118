"""Precision and compilation: the modes that the CPU has. Steps keep float32 in all of them."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quiet, small_data
from torch import nn
from torch.utils.data import DataLoader

from lightning_qinit import load_from_checkpoint
from lightning_qinit.functional import fake_quantize
from lightning_qinit.insertion import named_quantizers, quantized_layers


@pytest.mark.parametrize("settings", [{}, {"quantizer": "lsq+", "criterion": "fisher"}, {"quantizer": "apot"}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_steps_keep_float32_and_train(make_trainer, tmp_path, precision: str, settings: dict) -> None:
    model, callback = SmallNet(), quiet(weight_bits=3, **settings)
    trainer = make_trainer(callback, precision=precision, max_epochs=2)
    trainer.fit(model, loader())
    wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert model.stem.weight.dtype == wanted
    quantizers = named_quantizers(quantized_layers(model))
    for name, quantizer in quantizers.items():
        assert all(p.dtype == torch.float32 for p in quantizer.parameters()), name
        assert not torch.equal(quantizer.step, quantizer.initial_step), name
    # what a layer computes with is on its levels, whatever the precision around it
    weight, quantizer = model.body.weight.detach(), model.body.weight_quantizer
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    expected = fake_quantize(wide, quantizer.step.detach(), quantizer.levels, 0)
    assert torch.allclose(quantizer(weight).detach(), expected.to(weight.dtype), rtol=1e-6)
    path = tmp_path / "trained.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_from_checkpoint(SmallNet, path)
    assert torch.equal(loaded.body.weight_quantizer.step, model.body.weight_quantizer.step)
    results = make_trainer(quiet(weight_bits=3, **settings), precision=precision).test(
        model, DataLoader(small_data(), 32), verbose=False
    )
    assert results[0]["test_loss"] < 5


def test_calibration_sees_the_same_in_mixed_precision(make_trainer) -> None:
    steps = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        model = SmallNet()
        make_trainer(quiet(), precision=precision, max_steps=1).fit(model, loader(shuffle=False))
        steps[precision] = {n: q.initial_step for n, q in named_quantizers(quantized_layers(model)).items()}
    for name, step in steps["32-true"].items():
        # weights are the same; activations carry bfloat16's 8 bits of mantissa, and an optimum at 8 bits is flat
        assert torch.allclose(step, steps["bf16-mixed"][name], rtol=0 if name.endswith("weight") else 0.1), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # self.log, traced
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_module(make_trainer, fullgraph: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    start = SmallNet()
    start.dropout.p = 0.0
    eager, module = copy.deepcopy(start), copy.deepcopy(start)
    make_trainer(quiet(), max_epochs=1).fit(eager, loader(shuffle=False))
    if fullgraph:
        module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
        compiled = module
    else:
        compiled = torch.compile(module, backend="aot_eager")
    make_trainer(quiet(), max_epochs=1).fit(compiled, loader(shuffle=False))
    for name, value in eager.state_dict().items():
        assert torch.allclose(value, module.state_dict()[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_fitted_module_exports(make_trainer) -> None:
    """Upstream `test_quantize_torchscript`: the module could not be scripted. Scripts are no more; export is."""
    model = SmallNet()
    make_trainer(quiet(), max_steps=2).fit(model, loader())
    model.eval()
    x = small_data().tensors[0][:4]
    net = nn.ModuleDict({name: child for name, child in model.named_children()})

    class Plain(nn.Module):  # the network without the trainer that a LightningModule refers to
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.net["norm"](self.net["stem"](x)).relu()
            x = (x + self.net["body"](x)).relu()
            return self.net["head"](self.net["dropout"](self.net["hidden"](x.flatten(1)).relu()))

    exported = torch.export.export(Plain().eval(), (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


def test_half_precision_inputs_of_a_module_on_its_own() -> None:
    from lightning_qinit import calibrate, prepare

    model = prepare(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).to(torch.float16))
    calibrate(model, [torch.randn(8, 40, dtype=torch.float16)])
    out = model(torch.randn(8, 40, dtype=torch.float16))
    assert out.dtype == torch.float16 and bool(out.isfinite().all())


def test_callbacks_of_lightning_accept_ours_in_the_other_namespace(make_trainer) -> None:
    """`pytorch_lightning` is a copy of `lightning.pytorch` with classes of its own."""
    other = pytest.importorskip("pytorch_lightning")

    class Net(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(36, 40), nn.Linear(40, 3)
            self.averaged = []

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.head(self.body(batch[0].flatten(1)).relu()), batch[1])
            self.log("loss", loss)
            return loss

        def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("test_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    callback, model = quiet(), Net()
    quietly = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = other.Trainer(callbacks=[callback], max_epochs=1, enable_model_summary=False, **quietly)
    trainer.fit(model, loader())
    assert len(callback.report) == 4
    assert all(not torch.equal(q.step, q.initial_step) for q in named_quantizers(quantized_layers(model)).values())
    from pytorch_lightning.callbacks import EarlyStopping, WeightAveraging

    with pytest.raises(Exception, match="put QuantInitCallback before WeightAveraging"):
        other.Trainer(callbacks=[WeightAveraging(), quiet()], max_epochs=1, **quietly).fit(Net(), loader())
    stop = EarlyStopping("quant_error/mean", check_on_train_epoch_end=True)
    other.Trainer(callbacks=[quiet(), stop], max_epochs=1, log_every_n_steps=1, **quietly).fit(Net(), loader())
    assert isinstance(model, other.LightningModule) and not isinstance(model, pl.LightningModule)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_wide_layers_are_measured_in_half_precision(make_trainer, precision: str) -> None:
    """Lightning makes half precision torch's default then, which counts to 2048 or to 256."""

    class Wide(SmallNet):
        def __init__(self) -> None:
            super().__init__(learning_rate=0.0)
            self.hidden, self.head = nn.Linear(144, 2100), nn.Linear(2100, 3)

    counted: list[float] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *arguments: object) -> None:
            counted.append(float(callback._monitor.counts["hidden.weight"].sum()))

    callback = quiet(log_costly_every=1)
    make_trainer(callback, Count(), precision=precision, max_steps=2, log_every_n_steps=1).fit(Wide(), loader())
    assert counted == [144 * 2100] * 2
