"""What is left of the removed callback's issues and tests; the rest is in the files beside this one."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, loader, quiet, small_data
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_qinit
from lightning_qinit.insertion import quantized_layers


def test_nothing_hangs_on_torch_ao() -> None:
    """Upstream 16609: torch.ao.quantization changed, and the callback died with it."""
    sources = "\n".join(path.read_text() for path in Path(lightning_qinit.__file__).parent.rglob("*.py"))
    assert "torch.ao" not in sources and "torch.quantization" not in sources


def test_nested_backbones(make_trainer) -> None:
    """Upstream 7551, lightning-flash 313: worked for plain modules, not for tasks around a backbone."""

    class Task(pl.LightningModule):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"backbone": backbone})
            self.adapter = nn.ModuleList([nn.Linear(3, 3)])

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.adapter[0](self.model["backbone"](batch[0])), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    task, callback = Task(SmallNet()), quiet()
    make_trainer(callback, max_steps=2).fit(task, loader())
    assert {row.layer for row in callback.report} == {
        "adapter.0",
        *(f"model.backbone.{name}" for name in ("stem", "body", "hidden", "head")),
    }


def test_the_fitted_module_is_called_as_before(make_trainer) -> None:
    """Upstream 10968: after fit the documented call failed inside a wrapper that quantized its input once more."""
    model = SmallNet()
    forward = SmallNet.forward
    make_trainer(quiet(), max_steps=2).fit(model, loader())
    x = small_data().tensors[0]
    assert type(model).forward is forward and "forward" not in vars(model)
    model.eval()
    assert torch.equal(model(x), model(x=x))
    single = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    assert torch.allclose(model(x), single, atol=1e-5)


@pytest.mark.parametrize("bits", [8, None])
def test_eight_bits_train_as_float_does(make_trainer, bits: int | None) -> None:
    """`test_quantization` held the errors of both to within 0.45; eight bits lose a thousandth at most."""
    losses = []
    for callbacks in ([], [quiet(weight_bits=8, activation_bits=bits)]):
        torch.manual_seed(0)
        model = SmallNet(learning_rate=0.005)
        model.dropout.p = 0.0
        trainer = make_trainer(*callbacks, max_epochs=10)
        trainer.fit(model, loader(shuffle=False))
        losses.append(trainer.test(model, DataLoader(small_data(), 32), verbose=False)[0]["test_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_copies_of_a_run_are_independent(make_trainer) -> None:
    model = SmallNet()
    make_trainer(quiet(), max_steps=2).fit(model, loader())
    twin = copy.deepcopy(model)
    x = small_data().tensors[0]
    expected = model.eval()(x)
    make_trainer(quiet(), max_steps=4).fit(twin.train(), loader())
    assert torch.equal(model(x), expected) and not torch.equal(twin.eval()(x), expected)
    layers = zip(quantized_layers(model).values(), quantized_layers(twin).values(), strict=True)
    assert all(a.weight_quantizer is not b.weight_quantizer for a, b in layers)


def test_two_inputs_flags_and_keywords(make_trainer) -> None:
    """Upstream 7926, 7979: a second positional input, a flag, an integer tensor."""

    class Several(SmallNet):
        def forward(self, x: Tensor, ids: Tensor, *, flip: bool = False, scale: Tensor | None = None) -> Tensor:
            out = super().forward(x.flip(-1) if flip else x)
            return out + self.head.weight.sum() * 0 + (0 if scale is None else scale) + ids.float().mean() * 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            scale = torch.zeros(())
            return F.cross_entropy(self(batch[0], batch[1], flip=bool(batch_idx % 2), scale=scale), batch[1])

    callback = quiet()
    make_trainer(callback, max_steps=3).fit(Several(), loader())
    assert len(callback.report) == 8
