"""Importance: what a value counts when its step is calibrated."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, Tied, Wide, loader, quiet
from torch import Tensor, nn

from lightning_qinit import Sample, calibrate, prepare
from lightning_qinit.calibration import Sketch, observe
from lightning_qinit.functional import optimal_scale
from lightning_qinit.insertion import quantized_layers


@pytest.mark.parametrize("per_channel", [True, False])
def test_fisher_is_the_squared_gradient_of_the_loss(make_trainer, per_channel: bool) -> None:
    model = Wide()
    twin = copy.deepcopy(model).eval()
    weights: dict[str, Tensor] = {}
    inputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in twin.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(
                lambda layer, args, name=name: inputs.setdefault(name, []).append(args[0].requires_grad_())
            )
    for batch in itertools.islice(loader(shuffle=False), 3):
        for seen in inputs.values():
            seen.clear()
        loss = F.cross_entropy(twin(batch[0]), batch[1])
        for name in ("stem", "body", "hidden", "head"):
            weight = getattr(twin, name).weight
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            weights[name] = weights.get(name, 0) + gradient.double().square()
    callback = quiet(weight_bits=3, criterion="fisher", per_channel=per_channel, first_last_bits=None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(callback, limit_train_batches=3, max_steps=1).fit(model, loader(shuffle=False))
    for name, importance in weights.items():
        if per_channel:
            importance[importance.flatten(1).sum(1) == 0] = 1  # a dead unit keeps the plain optimum
        quantizer = getattr(model, name).weight_quantizer
        fit = optimal_scale(state[f"{name}.weight"], quantizer.levels, 0 if per_channel else None, importance)
        assert torch.allclose(quantizer.initial_step.double(), fit.scale, rtol=1e-4), name


def test_fisher_of_inputs_and_no_gradient_is_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    twin, data = copy.deepcopy(model), torch.randn(50, 40)
    prepare(model, weight_bits=None, activation_bits=2, first_last_bits=None)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).logsumexp(1).sum()

    calibrate(model, [data[:20], data[20:]], step=loss, criterion="fisher")
    assert all(p.grad is None for p in model.parameters())
    x = data.clone().requires_grad_()
    hidden = twin[1](twin[0](x))
    gradients = torch.autograd.grad(twin[2](hidden).logsumexp(1).sum(), (x, hidden))
    for layer, values, gradient in ((model[0], x, gradients[0]), (model[2], hidden, gradients[1])):
        levels = layer.input_quantizer.levels
        best = optimal_scale(values.detach(), levels, weights=gradient.double().square())
        weighted = Sample.of_values(values.detach().double().reshape(1, -1), gradient.double().square().reshape(1, -1))
        assert float(weighted.error(levels, layer.input_quantizer.step.detach())) <= float(best.error) * (1 + 1e-3)
        plain = optimal_scale(values.detach(), levels)
        assert abs(float(plain.scale) - layer.input_quantizer.step.item()) > 1e-3


def test_fisher_needs_a_loss(make_trainer) -> None:
    class NoLoss(SmallNet):
        def calibration_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self(batch[0])

    message = "'fisher' needs a loss with gradients; `NoLoss.calibration_step` returned none"
    with pytest.raises(ValueError, match=message):
        make_trainer(quiet(criterion="fisher")).fit(NoLoss(), loader())
    model = prepare(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="'fisher' needs a loss with gradients; `step` returned none"):
        calibrate(model, [torch.randn(2, 4)], step=lambda module, batch: None, criterion="fisher")
    assert not model[0].weight_quantizer.is_calibrated


def test_fisher_leaves_out_batches_that_a_step_skips() -> None:
    rows, data = [], [torch.randn(20, 4), torch.randn(20, 4)]
    for batches in (data, data[1:]):
        torch.manual_seed(1)
        model = prepare(nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 40)), weight_bits=3)
        step = lambda module, batch: None if batch is data[0] else module(batch).square().mean()  # noqa: E731
        rows.append(calibrate(model, batches, step=step, criterion="fisher"))
    first, second = ([row.step for row in found if row.what == "weight"] for found in rows)
    assert first == second


def test_fisher_with_manual_optimization(make_trainer) -> None:
    class Manual(SmallNet):
        automatic_optimization = property(lambda self: False, lambda self, value: None)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    model, callback = Manual(), quiet(criterion="fisher", sequential=True, recalibrate_batchnorm=True)
    make_trainer(callback).fit(model, loader())
    assert len(callback.report) == 8 and not any("importance" in row.note for row in callback.report)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(40, 3), (7, 2, 40)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 9, 9)),
        (nn.ConvTranspose1d(6, 4, 8, stride=2, groups=2), (5, 6, 9)),
    ],
)
def test_hessian_is_the_mean_square_of_the_inputs_that_a_weight_meets(layer: nn.Module, shape: tuple) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.rand(shape[-1])
    model = nn.Sequential(copy.deepcopy(layer))
    prepare(model, weight_bits=3, activation_bits=None, first_last_bits=None)
    layers = quantized_layers(model)
    with observe(layers, "hessian") as seen, torch.no_grad():
        model(x)
    # independent: the output is linear in each element of the weight, so E[a^2] is the energy that it alone produces
    importance = torch.zeros_like(layer.weight, dtype=torch.float64)
    probe = copy.deepcopy(layer).double()
    if probe.bias is not None:
        probe.bias = None
    for index in itertools.product(*map(range, layer.weight.shape)):
        probe.weight.data.zero_()
        probe.weight.data[index] = 1
        importance[index] = probe(x.double()).detach().square().sum()
    assert torch.allclose(seen.weight_importance["0.weight"], importance, rtol=1e-5, atol=1e-6)
    rows = calibrate(model, [x], criterion="hessian")
    axis = model[0].output_axis
    if layer.weight.movedim(axis, 0)[0].numel() >= 32:
        fit = optimal_scale(layer.weight.detach(), model[0].weight_quantizer.levels, axis, importance)
        assert torch.allclose(model[0].weight_quantizer.step.double(), fit.scale, rtol=1e-5)
    assert len(rows) == 1


def test_hessian_says_where_it_knows_none(make_trainer) -> None:
    model = prepare(nn.Sequential(nn.GRU(6, 40)), weight_bits=3, first_last_bits=None)
    rows = calibrate(model, [torch.randn(3, 2, 6)], step=lambda module, batch: module(batch), criterion="hessian")
    assert {row.note.split(";")[0] for row in rows if row.what != "input"} == {
        "no hessian importance, so all values count alike"
    }


def test_hessian_of_tied_weights_is_that_of_all_their_uses() -> None:
    torch.manual_seed(0)
    model, ids = Tied(40), torch.randint(10, (30,))
    weight = model.table.weight.detach().clone()
    prepare(model, weight_bits=3, activation_bits=None, first_last_bits=None)
    calibrate(model, [ids], criterion="hessian")
    counts = torch.bincount(ids, minlength=10).double()[:, None]
    importance = counts + weight[ids].double().square().sum(0)
    fit = optimal_scale(weight, model.table.weight_quantizer.levels, 0, importance)
    assert torch.allclose(model.table.weight_quantizer.step.double(), fit.scale, rtol=1e-5)


def test_criteria_on_pruned_and_checkpointed_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    prepare(model, first_last_bits=None)
    rows = calibrate(model, [torch.randn(5, 40)], criterion="hessian")
    assert len(rows) == 4 and not any("importance" in row.note for row in rows if row.what == "weight")

    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    plain = copy.deepcopy(model)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).square().sum()

    def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(module[0], x, use_reentrant=False)
        return module[2](module[1](x)).square().sum()

    x = torch.randn(9, 40)
    for module, step in ((model, checkpointed), (plain, loss)):
        prepare(module, first_last_bits=None)
        calibrate(module, [x], step=step, criterion="fisher")
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-5), name


def test_weighted_sketches_merge_and_repeat() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(3000), torch.randint(0, 4, (3000,)).double()
    whole, parts, repeated = Sketch(weighted=True), Sketch(weighted=True), Sketch()
    whole.update(x, weights)
    for part in (slice(0, 1000), slice(1000, 3000)):
        other = Sketch(weighted=True)
        other.update(x[part], weights[part])
        parts.merge(other)
    repeated.update(x.repeat_interleave(weights.long()))
    assert torch.equal(whole.table, parts.table) and torch.equal(whole.table, repeated.table.double())
