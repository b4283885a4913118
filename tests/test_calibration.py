"""Choices of calibration: importance, running order, allocated bits, BatchNorm statistics."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, loader, quiet, small_data
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_qinit import Codebook, QuantInitCallback, Sample, calibrate, prepare
from lightning_qinit.calibration import Sketch, observe
from lightning_qinit.calibration.allocate import allocate_bits
from lightning_qinit.calibration.count import FEW, Counter
from lightning_qinit.functional import fake_quantize, optimal_scale
from lightning_qinit.insertion import insert, named_quantizers, quantized_layers


class Wide(SmallNet):
    """Channels of enough values everywhere, so that the optimum is the plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 6, padding=3)
        self.hidden = nn.Linear(4 * 49, 40)
        self.head = nn.Linear(40, 3)


def batches() -> list[list[Tensor]]:
    return list(itertools.islice(loader(shuffle=False), 3))


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
    for batch in batches():
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


class Twice(nn.Module):
    """Two layers that take the same tensor, which may change in between."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.first, self.second, self.change = nn.Linear(40, 40), nn.Linear(40, 40), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.first(x)
        return y + self.second(x.mul_(2) if self.change else x)


@pytest.mark.parametrize(("change", "inference", "times"), [(False, False, 2), (True, False, 4), (True, True, 4)])
def test_an_input_of_several_layers_is_counted_once(
    change: bool, inference: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    count = Counter.count
    monkeypatch.setattr(Counter, "count", lambda counter, x: counted.append(x) or count(counter, x))
    batches = [torch.randn(FEW // 40 + 1, 40) for _ in range(2)]
    layers = quantized_layers(model := prepare(Twice(change)))
    with torch.inference_mode(inference), observe(layers) as seen:
        for batch in batches:
            model(batch)
            seen.end_batch()
    assert len(counted) == times
    expected, twice = Sketch(), Sketch()
    for batch in batches:
        expected.update(batch)
        twice.update(batch * (2 if change else 1))
    assert torch.equal(seen.inputs["first.input"].table, expected.table)
    assert torch.equal(seen.inputs["second.input"].table, twice.table)
    assert torch.equal(seen.inputs["second.input"].extremes, twice.extremes)


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


def test_sequential_sees_what_quantized_layers_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    data = [torch.randn(16, 40) for _ in range(3)]
    twin = copy.deepcopy(model)
    prepare(model, weight_bits=2, activation_bits=3, first_last_bits=None)
    calibrate(model, iter(data), sequential=True)
    x = torch.cat(data)
    for index in (0, 2, 4):
        quantizers = model[index].quantizers()
        fit = optimal_scale(twin[index].weight, quantizers["weight"].levels, channel_axis=0)
        assert torch.allclose(quantizers["weight"].step.double(), fit.scale, rtol=1e-6)
        levels = quantizers["input"].levels
        error = Sample.of_tensor(x).error(levels, quantizers["input"].step.detach())
        assert float(error) <= float(optimal_scale(x, levels).error) * (1 + 1e-4)
        weight = fake_quantize(
            twin[index].weight.detach(), quantizers["weight"].step.detach(), quantizers["weight"].levels, 0
        )
        x = F.linear(
            fake_quantize(x, quantizers["input"].step.detach(), levels), weight, twin[index].bias.detach()
        ).relu()


def test_sequential_in_a_trainer_leaves_no_trace(make_trainer) -> None:
    results = []
    for sequential in (False, True):
        torch.manual_seed(0)
        model, callback = Wide(), quiet(sequential=sequential, weight_bits=2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = make_trainer(callback, max_steps=1, limit_train_batches=1)
        trainer.fit(model, loader())
        results.append({row.name: row for row in callback.report})
        assert int(model.norm.num_batches_tracked) == int(before["norm.num_batches_tracked"]) + 1
    one, other = results
    assert one.keys() == other.keys()
    assert all(one[f"{name}.weight"] == other[f"{name}.weight"] for name in ("stem", "body", "hidden", "head"))
    assert one["stem.input"] == other["stem.input"] and one["head.input"] != other["head.input"]


def test_batchnorm_statistics_under_quantization_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3), nn.BatchNorm1d(3))
    for norm in (model[1], model[4]):
        norm.num_batches_tracked.fill_(7)
    model[4].eval()  # frozen
    data = [torch.randn(16, 40) for _ in range(3)]
    prepare(model, weight_bits=2, activation_bits=2, first_last_bits=None)
    twin = copy.deepcopy(model)
    calibrate(model, data, recalibrate_batchnorm=True)
    calibrate(twin, data)
    for name, value in twin.state_dict().items():
        changed = name in ("1.running_mean", "1.running_var")
        assert torch.equal(model.state_dict()[name], value) != changed, name
    assert model.training and not model[4].training and model[1].momentum == 0.1
    outputs = [twin[0](x).detach() for x in data]
    assert torch.allclose(model[1].running_mean, torch.stack([x.mean(0) for x in outputs]).mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, torch.stack([x.var(0) for x in outputs]).mean(0), atol=1e-6)


def test_batchnorm_statistics_in_a_trainer(make_trainer) -> None:
    class Stop(Exception):
        pass

    class Halted(SmallNet):
        def on_train_batch_start(self, *args: object) -> None:
            raise Stop

    statistics = []
    for recalibrate in (False, True):
        torch.manual_seed(0)
        model = Halted()
        with pytest.raises(Stop):
            make_trainer(quiet(weight_bits=2, recalibrate_batchnorm=recalibrate)).fit(model, loader(shuffle=False))
        statistics.append((model.norm.running_mean.clone(), int(model.norm.num_batches_tracked)))
    expected = torch.stack([model.stem(x).detach().mean((0, 2, 3)) for x, _ in batches()]).mean(0)
    assert statistics[0][1] == statistics[1][1] == 1 and not statistics[0][0].any()
    assert torch.allclose(statistics[1][0], expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 5), average=st.floats(2, 8))
def test_allocation_is_the_best_of_all(seed: int, layers: int, average: float) -> None:
    torch.manual_seed(seed)
    widths = range(2, 9)
    sizes = torch.randint(1, 1000, (layers,)).tolist()
    errors = [sorted((torch.rand(7).square() * torch.rand(1)).tolist(), reverse=True) for _ in sizes]
    chosen = allocate_bits(errors, sizes, widths, average)

    def total(bits: tuple[int, ...]) -> float:
        return sum(row[b - 2] for row, b in zip(errors, bits, strict=True))

    def fits(bits: tuple[int, ...]) -> bool:
        return sum(b * n for b, n in zip(bits, sizes, strict=True)) <= average * sum(sizes) * (1 + 1e-12)

    best = min(total(bits) for bits in itertools.product(widths, repeat=layers) if fits(bits))
    assert fits(tuple(chosen)) and total(tuple(chosen)) == pytest.approx(best, rel=1e-12)


def test_allocation_of_many_layers_is_quick_and_ties_take_fewer_bits() -> None:
    torch.manual_seed(0)
    errors = [(torch.rand(1) * 4.0 ** -torch.arange(7)).tolist() for _ in range(200)]
    sizes = torch.randint(1000, 1_000_000, (200,)).tolist()
    chosen = allocate_bits(errors, sizes, range(2, 9), 3.5)
    assert 3.49 < sum(b * n for b, n in zip(chosen, sizes, strict=True)) / sum(sizes) <= 3.5
    assert allocate_bits([[0.0] * 7] * 3, [5, 5, 5], range(2, 9), 8.0) == [2, 2, 2]
    with pytest.raises(ValueError, match="`average_bits` must be at least 2, got 1.5"):
        allocate_bits([[0.0] * 7], [5], range(2, 9), 1.5)


def test_average_bits_spends_where_the_error_is(make_trainer) -> None:
    torch.manual_seed(0)
    model, callback = Wide(), quiet(average_bits=3.0, overrides={"body": {"weight_bits": 5}})
    with torch.no_grad():
        model.hidden.weight.sign_().mul_(0.1)  # two bits lose nothing
    trainer = make_trainer(callback, max_steps=1)
    trainer.fit(model, loader())
    bits = {row.name: row.bits for row in callback.report}
    assert bits["stem.weight"] == bits["head.weight"] == 8 and bits["body.weight"] == 5  # set, so not counted
    assert bits["hidden.weight"] == 2 and bits["hidden.input"] == 4
    quantizer = model.hidden.weight_quantizer
    assert quantizer.n_bits == 2 and int(quantizer.bits) == 2

    torch.manual_seed(0)
    model, callback = Wide(), quiet(average_bits=3.5, first_last_bits=None)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(callback, max_steps=1).fit(model, loader())
    chosen = {row.layer: row.bits for row in callback.report if row.what == "weight"}
    sizes = {name: weights[f"{name}.weight"].numel() for name in chosen}
    errors = {}
    for name in chosen:
        levels = [named_quantizers(quantized_layers(model))[f"{name}.weight"].level_set(b, True) for b in range(2, 9)]
        weight = weights[f"{name}.weight"]
        fits = [optimal_scale(weight, level_set, channel_axis=0) for level_set in levels]
        errors[name] = [float(fit.error.sum() / weight.double().square().sum()) for fit in fits]

    def total(bits: tuple[int, ...]) -> float:
        return sum(errors[name][b - 2] for name, b in zip(chosen, bits, strict=True))

    budget = 3.5 * sum(sizes.values())
    best = min(
        (
            bits
            for bits in itertools.product(range(2, 9), repeat=4)
            if sum(map(int.__mul__, bits, sizes.values())) <= budget
        ),
        key=total,
    )
    assert tuple(chosen.values()) == best


def test_average_bits_under_a_criterion_that_some_weights_have_no_importance_for() -> None:
    torch.manual_seed(0)
    # three equal weights; hessian knows nothing of the recurrent one, so it counts with the mean importance
    layers = nn.Sequential(nn.Linear(40, 40), nn.RNN(40, 40, bias=False), nn.Linear(40, 40))
    with torch.no_grad():
        layers[1].weight_ih_l0.copy_(layers[0].weight)
        layers[1].weight_hh_l0.copy_(layers[0].weight)
        layers[2].weight.copy_(layers[0].weight)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        hidden, _ = module[1](x)
        return module[0](x) + module[2](x) + hidden

    prepare(layers, activation_bits=None, first_last_bits=None)
    rows = calibrate(layers, [torch.randn(6, 5, 40)], step=run, criterion="hessian", average_bits=4.0)
    assert {row.bits for row in rows} == {4}


def test_batches_that_the_step_takes_apart_are_whole_in_the_next_pass(make_trainer) -> None:
    class Pops(SmallNet):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            y = batch.pop("y")
            x = batch["x"].add_(1)
            return F.cross_entropy(self(x), y)

    class Named(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = small_data()[index]
            return {"x": x, "y": y}

    steps = []
    for sequential in (False, True):
        torch.manual_seed(0)
        model = Pops()
        callback = quiet(sequential=sequential, recalibrate_batchnorm=True)
        make_trainer(callback, max_steps=1).fit(model, torch.utils.data.DataLoader(Named(), 8))
        steps.append(model.stem.input_quantizer.initial_step)
    assert torch.equal(*steps)


def test_hessian_of_tied_weights_is_that_of_all_their_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 40), nn.Linear(40, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(10, (30,))
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


def test_overrides_are_checked_layer_by_layer() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3))
    four = {"weight_quantizer": {"name": "codebook", "levels": [-1, 0, 0.5, 1]}}
    prepare(copy.deepcopy(model), overrides={"1": {"weight_bits": 2, **four}})
    prepare(copy.deepcopy(model), overrides={"*": {"weight_bits": 2}, "1": four})
    with pytest.raises(ValueError, match="Layer '1': `weight_quantizer` = .* does not take 4 bits for weights"):
        prepare(copy.deepcopy(model), overrides={"1": four})
    prepare(model, weight_bits=2, overrides={"0": {"activation_bits": None}})
    rows = calibrate(model, [torch.randn(9, 40)])
    bits = {row.name: row.bits for row in rows}
    assert bits["0.weight"] == 8 and "0.input" not in bits and bits["1.weight"] == 2  # of its own role alone
    narrow = {"1": {"weight_initializer": "kl"}}
    model = prepare(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)), overrides=narrow)
    with pytest.raises(ValueError, match="`average_bits` tries 2 to 8 bits: `weight_initializer` = 'kl' does not app"):
        calibrate(model, [torch.randn(9, 40)], average_bits=4.0)


def test_settings_that_mean_the_same_are_no_difference(make_trainer, tmp_path: Path) -> None:
    levels = torch.linspace(-1, 1, 5)
    first = quiet(
        quantizer={"name": "lsq"},
        weight_bits=3,
        first_last_bits=None,
        weight_quantizer={"name": Codebook, "levels": levels},
        overrides={"body": {"weight_initializer": "minmax"}},
    )
    trainer = make_trainer(first, max_steps=1)
    trainer.fit(SmallNet(), loader())
    path = tmp_path / "same.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    second = quiet(
        quantizer="lightning_qinit.LSQ",
        weight_bits=3,
        first_last_bits=None,
        weight_quantizer={"name": "codebook", "levels": levels.tolist()},
        overrides={"body": {"weight_initializer": "optimal"}},
    )
    make_trainer(second).test(SmallNet(), loader(shuffle=False), ckpt_path=path, verbose=False)


def test_deterministic_mode_is_put_back() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        Sketch().update(torch.randn(9))
        model = prepare(nn.Sequential(nn.Linear(40, 3)))
        calibrate(model, [torch.randn(5, 40)])
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    Sketch().update(torch.randn(9))
    assert not torch.are_deterministic_algorithms_enabled()


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"criterion": "mae"}, "`criterion` must be 'mse', 'fisher', 'hessian' or 'output', got 'mae'"),
            ({"sequential": 1}, "`sequential` must be True or False, got 1"),
            ({"recalibrate_batchnorm": "yes"}, "`recalibrate_batchnorm` must be True or False"),
            ({"average_bits": "3"}, "`average_bits` must be a number from 2 to 8, or None, got '3'"),
            (
                {"weight_bits": 3, "weight_quantizer": {"name": "codebook", "levels": range(-2, 3)}},
                "`first_last_bits`: `weight_quantizer` = .* does not take 8 bits for weights: a codebook of 5 levels",
            ),
            ({"average_bits": 1.5}, "`average_bits` must be a number from 2 to 8, or None, got 1.5"),
            ({"quantizer": {"name": "nothing"}}, "`quantizer` must be one of .*'apot'.* got {'name': 'nothing'}"),
            ({"quantizer": {"narrow_range": True}}, "`quantizer` must be one of"),
            (
                {"quantizer": {"name": "lsq", "wide": True}},
                "`quantizer` = .*'wide': True.* unexpected keyword",
            ),
            ({"weight_quantizer": "apot", "weight_bits": 1}, "`weight_quantizer` = 'apot' does not take 1 bits for w"),
            (
                {"weight_quantizer": {"name": "codebook", "levels": [-1, 0, 1]}},
                "`weight_quantizer` = .* does not take 4 bits for weights: a codebook of 3 levels has 2 bits, got 4",
            ),
            ({"initializer": "sawb"}, "`initializer` = 'sawb' does not apply to inputs with 4 bits: sawb needs signed"),
            (
                {"weight_initializer": "sawb", "weight_bits": 6},
                "`weight_initializer` = 'sawb' does not apply to w",
            ),
            ({"weight_initializer": "kl", "weight_bits": 2}, "kl needs at least 4 bits"),
            ({"quantizer": "apot", "initializer": "lsq"}, "lsq needs uniform levels"),
            ({"activation_initializer": "none.such"}, "`activation_initializer` must be one of"),
            ({"overrides": {"x": {"own_bits": ["weight"]}}}, r"`overrides\['x'\]` must map some of"),
            ({"average_bits": 3.0, "weight_quantizer": {"name": "codebook", "levels": [0, 1]}}, "does not take"),
        ],
    )
    def test_settings(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            QuantInitCallback(**settings)

    def test_plain_calibration_says_what_it_lacks(self) -> None:
        x = torch.randn(3, 4)
        with pytest.raises(ValueError, match="Linear has no quantizers: call `prepare"):
            calibrate(nn.Linear(4, 4), [x])
        model = prepare(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match="`batches` must hold at least one batch that runs a quantized layer"):
            calibrate(model, [])
        with pytest.raises(ValueError, match="`criterion` = 'fisher' needs a `step` that returns the loss, got None"):
            calibrate(model, [x], criterion="fisher")
        assert not model[0].weight_quantizer.is_calibrated
        with pytest.warns(UserWarning) as warned:
            rows = calibrate(model, [torch.full((3, 4), torch.nan)])
        assert [row.name for row in rows] == ["0.weight"]
        assert "Calibration met NaN or infinite values in 0.input" in str(warned[0].message)
        assert "Calibration saw no data for 0.input, which stay in float" in str(warned[1].message)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"skip": 3}, "`skip` must be a sequence of glob patterns, got 3"),
            ({"skip": [3]}, r"`skip` must be a sequence of glob patterns, got \[3\]"),
            ({"overrides": ["0"]}, r"`overrides` must be a mapping of glob patterns to settings, got \['0'\]"),
            ({"weight_bit": 4}, r"`prepare` has no settings \['weight_bit'\]; those of layers are"),
            ({"own_bits": ("weight",)}, r"`prepare` has no settings \['own_bits'\]"),
        ],
    )
    def test_settings_of_the_plain_interface(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(nn.Sequential(nn.Linear(4, 4)), **settings)

    def test_average_bits_of_a_quantizer_with_one_width(self) -> None:
        callback = {"weight_bits": 2, "first_last_bits": None, "average_bits": 3.0}
        with pytest.raises(ValueError, match="`average_bits` tries 2 to 8 bits: `weight_quantizer` = .* 3 bits"):
            QuantInitCallback(**callback, weight_quantizer={"name": "codebook", "levels": [-1, 0, 1]})


def test_settings_of_weights_and_inputs_apart() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 3))
    callback = quiet(
        weight_quantizer={"name": "apot", "normalize": True},
        activation_quantizer="lsq+",
        weight_initializer="constant",
        first_last_bits=None,
    )
    insert(model, callback.config)
    rows = calibrate(model, [torch.randn(30, 40)])
    assert {row.name for row in rows} == set(named_quantizers(quantized_layers(model)))
    assert type(model[0].weight_quantizer).name == "apot" and type(model[0].input_quantizer).name == "lsq+"
    # of normalized weights the deviation is 1 over the whole weight; here it is taken per channel
    normal = model[0].weight_quantizer.transform(model[0].weight.detach())
    assert torch.allclose(model[0].weight_quantizer.step, 3 * normal.std(1, correction=0), rtol=1e-5)
    offsets = {row.name: row.offset for row in rows}
    assert offsets["0.weight"] is None and offsets["2.input"] < 0
    state = callback.state_dict()
    assert (
        state["weight_quantizer"] == {"name": "apot", "normalize": True} and state["weight_initializer"] == "constant"
    )


def test_checkpoint_brings_offsets_and_allocated_bits(make_trainer, tmp_path: Path) -> None:
    settings = {"activation_quantizer": "lsq+", "weight_quantizer": {"name": "lsq", "narrow_range": True}}
    model = SmallNet()
    trainer = make_trainer(quiet(**settings, average_bits=3.0), max_steps=2)
    trainer.fit(model, loader())
    path = tmp_path / "plus.ckpt"
    trainer.save_checkpoint(path)
    fresh = SmallNet()
    make_trainer(quiet(**settings)).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    x = small_data().tensors[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    other = quiet(**{**settings, "weight_quantizer": "lsq"})
    with pytest.raises(MisconfigurationException, match="weight_quantizer: {.* in the checkpoint, 'lsq' in the callb"):
        make_trainer(other).test(SmallNet(), loader(shuffle=False), ckpt_path=path)
