"""Weights are quantized once while they cannot change, and nothing else changes by it."""

import copy
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quiet
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_qinit import LSQ, APoT, load_from_checkpoint, prepare
from lightning_qinit.quantizers import cpu
from lightning_qinit.quantizers.kept import KeptWeight


class Counter(pl.Callback):
    """How often the weight of a layer was really quantized, by stage; also stands in for a run that keeps none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...] = (4, 4, 3, 3)) -> None:
        self.counts = {"train": 0, "validate": 0}
        rounded = cpu.rounded

        def counted(x: Tensor, *arguments: object) -> Tensor:
            if x.shape == shape and torch._C._current_graph_task_id() < 0:  # not in a backward pass
                self.counts["train" if torch.is_grad_enabled() or self.training else "validate"] += 1
            return rounded(x, *arguments)

        self.training = True
        monkeypatch.setattr(cpu, "rounded", counted)

    def on_validation_start(self, *arguments: object) -> None:
        self.training = False

    def on_validation_end(self, *arguments: object) -> None:
        self.training = True


def trained(make_trainer: Callable, callbacks: list[pl.Callback], **arguments: object) -> dict[str, Tensor]:
    pl.seed_everything(3, verbose=False)
    module = SmallNet()
    make_trainer(*callbacks, **arguments).fit(module, loader(shuffle=False), loader(shuffle=False))
    return module.state_dict()


def test_once_per_optimizer_step_and_per_evaluation(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch)
    states = []
    with monkeypatch.context() as patch:
        patch.setattr(KeptWeight, "switch", lambda self, on: None)
        states.append(trained(make_trainer, [quiet(log_quantizers=False), counter], accumulate_grad_batches=2))
        assert counter.counts == {"train": 4, "validate": 4}
    counter.counts = dict.fromkeys(counter.counts, 0)
    states.append(trained(make_trainer, [quiet(log_quantizers=False), counter], accumulate_grad_batches=2))
    assert counter.counts == {"train": 2, "validate": 1}
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_nothing_is_kept_in_between(make_trainer: Callable) -> None:
    module = SmallNet()
    make_trainer(quiet(), max_epochs=2).fit(module, loader(), loader(shuffle=False))
    assert not any(child.kept.on or child.kept._last for child in module.modules() if isinstance(child, LSQ))


def test_averaged_weights_are_those_evaluated(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for keeps in (True, False):
        with monkeypatch.context() as patch:
            if not keeps:
                patch.setattr(KeptWeight, "switch", lambda self, on: None)
            pl.seed_everything(3, verbose=False)
            trainer = make_trainer(quiet(), EMAWeightAveraging(), max_epochs=2, accumulate_grad_batches=2)
            trainer.fit(SmallNet(), loader(shuffle=False), loader(shuffle=False))
            losses.append(float(trainer.callback_metrics["val_loss"]))
    assert losses[0] == losses[1]


def test_a_change_in_place_is_seen() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 3)), activation_bits=None, first_last_bits=None)
    quantizer, weight = model[0].weight_quantizer, model[0].weight
    quantizer.start(torch.tensor([0.1, 0.2, 0.3]), 4, True)
    quantizer.kept.switch(True)
    first = quantizer(weight)
    assert quantizer(weight).data_ptr() == first.data_ptr()
    with torch.no_grad():
        weight.neg_()
    assert not torch.equal(quantizer(weight), first)
    with torch.no_grad():
        quantizer.relative_step.mul_(2)
    changed = quantizer(weight).detach()
    quantizer.kept.switch(False)
    assert torch.equal(quantizer(weight), changed)
    quantizer.kept.switch(True)
    assert torch.equal(quantizer(weight.detach()), changed) and not quantizer.kept._last  # only parameters are kept
    quantizer.start(torch.tensor([0.5, 0.2, 0.3]), 2, True)
    kept = quantizer(weight)
    quantizer.kept.switch(False)
    assert torch.equal(kept, quantizer(weight))


@pytest.mark.parametrize("count", [1, 5])
def test_a_change_of_a_few_values_through_data_is_seen_on_a_cpu(count: int) -> None:
    layer = nn.Sequential(nn.Linear(40, 40))
    prepare(layer, weight_bits=8, activation_bits=None)
    quantizer = layer[0].weight_quantizer
    quantizer.start(torch.tensor([0.01]), 8, True)
    quantizer.kept.switch(True)
    x = torch.randn(3, 40)
    with torch.no_grad():
        before = layer(x)
        layer[0].weight.data.flatten()[7 : 7 + count].mul_(-5)  # between those that are looked at one by one
        changed = layer(x)
        quantizer.kept.switch(False)
        assert torch.equal(changed, layer(x)) and not torch.equal(changed, before)


def test_a_step_put_in_through_data_and_an_expanded_weight() -> None:
    quantizer = LSQ(4)
    quantizer.start(torch.tensor([0.1]), 4, True)
    quantizer.kept.switch(True)
    weight = nn.Parameter(torch.randn(1, 4).expand(3, 4))
    before = quantizer(weight).detach()
    quantizer.relative_step.data.mul_(1.5)
    after = quantizer(weight).detach()
    quantizer.kept.switch(False)
    assert torch.equal(quantizer(weight), after) and not torch.equal(before, after)


def test_weights_that_a_step_puts_in_through_data_are_those_evaluated(make_trainer: Callable) -> None:
    class Averaged(SmallNet):  # as modules that evaluate an average beside their weights do
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            kept = [p.detach().clone() for p in self.parameters()]
            first = self(batch[0])
            for parameter in self.parameters():
                parameter.data.mul_(0.5)
            assert torch.equal(self(batch[0]), copy.deepcopy(self)(batch[0]))
            for parameter, value in zip(self.parameters(), kept, strict=True):
                parameter.data.copy_(value)
            assert torch.equal(self(batch[0]), first)

    make_trainer(quiet()).fit(Averaged(), loader(), loader(shuffle=False))


def test_a_module_made_in_inference_mode_predicts(make_trainer: Callable, tmp_path: Path) -> None:
    model = SmallNet()
    trainer = make_trainer(quiet())
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    with torch.inference_mode():
        loaded = load_from_checkpoint(SmallNet, tmp_path / "trained.ckpt")
    loaded.predict_step = lambda batch, batch_idx: loaded(batch[0])
    model.predict_step = lambda batch, batch_idx: model(batch[0])
    found, expected = (make_trainer(quiet()).predict(m, loader(shuffle=False)) for m in (loaded, model))
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_another_offset_is_seen() -> None:
    class Moved(LSQ):
        has_offset = True

    weight, quantizer = nn.Parameter(torch.randn(20, 10)), Moved(3)
    quantizer.start(torch.tensor([0.5]), 3, True, torch.tensor([0.25]))
    quantizer.kept.switch(True)
    before = quantizer(weight)
    with torch.no_grad():
        quantizer.relative_offset.add_(0.5)
    after = quantizer(weight)
    quantizer.kept.switch(False)
    assert torch.equal(after, quantizer(weight)) and not torch.equal(after, before)


def test_other_levels_are_seen() -> None:
    """States that are loaded by assignment come without a change that torch counts."""
    weight, few, more = nn.Parameter(torch.randn(20, 10)), APoT(3), APoT(4)
    for quantizer in (few, more):
        quantizer.start(torch.tensor([2.0]), quantizer.n_bits, True)
    few.kept.switch(True)
    assert not torch.equal(few(weight), more(weight))
    few.load_state_dict(more.state_dict(), assign=True)
    assert torch.equal(few(weight), more(weight))
