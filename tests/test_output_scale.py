"""The step of least output error against brute force, and against the outputs of real layers."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import SmallNet, loader, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qinit import calibrate, prepare
from lightning_qinit.functional import apot_levels, optimal_output_scale, optimal_scale, uniform_levels
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import optimal
from lightning_qinit.insertion import quantized_layers

HAIR = 2.0**-22  # steps nearer than this to a breakpoint do not count, relative


def cost(x: Tensor, levels: Tensor, steps: Tensor, rho: float, outputs: Tensor) -> Tensor:
    """The definition at every step: nearest points, of two the upper one, in float64."""
    middles = steps[:, None] * (levels[1:] + levels[:-1]) / 2
    nearest = (x[None, :, None] >= middles[:, None, :]).sum(2)
    error = x - (steps[:, None] * levels).gather(1, nearest)
    sums = torch.zeros(len(steps), int(outputs.max()) + 1, dtype=torch.float64).index_add_(1, outputs, error)
    return (1 - rho) * error.square().sum(1) + rho * sums.square().sum(1)


def candidates(x: Tensor, levels: Tensor) -> Tensor:
    """A dense grid, and for every pair of neighbouring breakpoints their middle and both ends, a hair inside."""
    at = (x[:, None] / ((levels[1:] + levels[:-1]) / 2)).flatten()
    at = at[at.isfinite() & (at > 0)].unique()
    if not len(at):
        return torch.logspace(-8, 8, 5001, base=2, dtype=torch.float64)
    low, high = torch.cat((at[:1] / 2, at)), torch.cat((at, at[-1:] * 2))
    wide = high * (1 - HAIR) > low * (1 + HAIR)
    low, high = low[wide], high[wide]
    grid = torch.logspace(math.log2(at[0]) - 9, math.log2(at[-1]) + 9, 1000, base=2, dtype=torch.float64)
    grid = grid[(grid[:, None] / at - 1).abs().amin(1) > HAIR]
    return torch.cat((low * (1 + HAIR), (low + high) / 2, high * (1 - HAIR), grid))


values = st.one_of(st.floats(-100, 100, width=32), st.integers(-8, 8).map(float))


@settings(max_examples=200, deadline=None)
@given(
    x=st.lists(values, min_size=1, max_size=14),
    outputs=st.lists(st.integers(0, 2), min_size=14, max_size=14),
    rho=st.sampled_from([0.0, 0.01, 1 / math.pi, 0.75, 0.99]),
    levels=st.sampled_from([uniform_levels(b, True) for b in (1, 2, 3, 4)] + [apot_levels(b, True) for b in (2, 3, 4)]),
    alone=st.booleans(),
)
def test_no_step_is_better(x: list[float], outputs: list[int], rho: float, levels: Tensor, alone: bool) -> None:
    values = torch.tensor(x, dtype=torch.float64)
    fed = torch.zeros(len(x), dtype=torch.int64) if alone else torch.tensor(outputs[: len(x)])
    fit = optimal_output_scale(values, levels, rho, outputs=None if alone else fed)
    scale = float((1 - rho) * values.square().sum() + rho * values.sum().square()) + float(values.square().sum())
    there = float(cost(values, levels, fit.scale[None], rho, fed))
    assert float(fit.error) == pytest.approx(there, rel=1e-9, abs=1e-12 * scale)
    if values.any() or 0 in levels:
        assert (
            float(fit.error) <= float(cost(values, levels, candidates(values, levels), rho, fed).min()) + 1e-12 * scale
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_between_breakpoints_that_are_equal_but_for_rounding_there_is_no_step(dtype: torch.dtype) -> None:
    levels, together = uniform_levels(3, True), torch.zeros(16, dtype=torch.int64)
    for _ in range(40):
        x = torch.randn(8, dtype=dtype)
        x = torch.cat((x, 3 * x)).double()  # x / 0.5 and 3 x / 1.5
        fit = optimal_output_scale(x, levels, 0.9)
        reached = cost(x, levels, fit.scale[None].float().double(), 0.9, together)
        assert float(reached) <= float(cost(x, levels, candidates(x, levels), 0.9, together).min()) * (1 + 1e-5)


@pytest.mark.parametrize("axis", [None, 0])
def test_without_correlation_it_is_the_plain_optimum(axis: int | None) -> None:
    x, levels = torch.randn(6, 300), uniform_levels(4, True)
    assert torch.equal(optimal_output_scale(x, levels, 0.0, axis).scale, optimal_scale(x, levels, axis).scale)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bracketing_changes_nothing(bits: int, axis: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, levels, outputs = torch.randn(3, 12_000 // bits), uniform_levels(bits, True), torch.arange(3)[:, None]
    monkeypatch.setattr("lightning_qinit.functional.optimal.MANY", 0)
    by_grid = optimal_output_scale(x, levels, 0.4, axis, outputs)
    monkeypatch.setattr("lightning_qinit.functional.optimal.SHORT", 0)
    by_cells = optimal_output_scale(x, levels, 0.4, axis, outputs)
    monkeypatch.setattr("lightning_qinit.functional.optimal.RESOLUTIONS", ())
    monkeypatch.setattr("lightning_qinit.functional.sweep.MAX_BREAKPOINTS", 2**12)  # swept in parts
    swept = optimal_output_scale(x, levels, 0.4, axis, outputs)
    for bracketed in (by_grid, by_cells):
        assert torch.allclose(bracketed.error, swept.error, rtol=1e-6)
        assert (bracketed.lower >= swept.lower).all() and (bracketed.upper < swept.upper).all()


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A small network trained on digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("levels", [uniform_levels(2, True), uniform_levels(4, True), apot_levels(3, True)], ids=len)
def test_never_above_the_plain_optimum_nor_a_grid_around_it(levels: Tensor, trained: nn.Sequential) -> None:
    gained = 0
    for layer in (trained[0], trained[2]):
        weight = layer.weight.detach()
        fit = optimal_output_scale(weight, levels, 1 / math.pi, 0)
        plain = optimal_scale(weight, levels, 0).scale
        for row, start, best in zip(weight.double(), plain, fit.error, strict=True):
            steps = torch.cat((torch.ones(1), torch.linspace(0.6, 2, 141))).double() * start
            others = cost(row, levels, steps, 1 / math.pi, torch.zeros(len(row)).long())
            assert float(best) <= float(others.min()) * (1 + 1e-5)
            gained += float(best) < 0.99 * float(others[0])
    assert gained > 29  # of 58


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (partial(nn.Linear, 96, 12), (200, 96)),
    (partial(nn.Conv2d, 16, 8, 3), (4, 16, 9, 9)),
    (partial(nn.Conv2d, 32, 8, 3, groups=2), (4, 32, 9, 9)),
    (partial(nn.ConvTranspose2d, 48, 8, 4, stride=2, groups=2), (4, 48, 9, 9)),
]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("make", "shape"), LAYERS, ids=["linear", "convolution", "grouped", "transposed"])
def test_outputs_of_inputs_after_a_relu_are_less_in_error(make: Callable, shape: tuple, per_channel: bool) -> None:
    layer, x, errors = make(), torch.randn(shape).relu(), []
    for criterion in ("mse", "output"):
        model = nn.Sequential(copy.deepcopy(layer))
        with torch.no_grad():
            exact = model.double()(x.double())
            prepare(model.float(), weight_bits=2, activation_bits=None, per_channel=per_channel, first_last_bits=None)
            calibrate(model, [x], criterion=criterion)
            errors.append(float((model.double()(x.double()) - exact).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(4, 6, 5, stride=2, groups=2),
        nn.ConvTranspose2d(2, 3, 3, stride=(2, 1), dilation=(1, 2)),
        nn.ConvTranspose1d(2, 2, 4, stride=4, dilation=3),
        nn.ConvTranspose1d(2, 2, 4, stride=4, dilation=2),
    ],
    ids=str,
)
def test_elements_of_one_output_are_those_that_reach_the_same_places(layer: nn.Module) -> None:
    size = (12,) * (layer.weight.dim() - 2)
    model = prepare(nn.Sequential(copy.deepcopy(layer)), first_last_bits=None)
    fed = model[0].outputs_fed(layer.weight).expand_as(layer.weight).flatten()
    probe, reached = copy.deepcopy(layer).requires_grad_(False), []
    probe.bias = None
    for index in range(layer.weight.numel()):
        probe.weight.zero_().view(-1)[index] = 1
        reached.append(probe(torch.ones(1, layer.in_channels, *size)).flatten() != 0)
    reached = torch.stack(reached).float()
    assert torch.equal(reached @ reached.T > 0, fed[:, None] == fed)


def test_correlation_is_that_of_the_inputs_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 5))
    data, weights = torch.randn(90, 40) + 0.7, [model[i].weight.detach().clone() for i in (0, 2)]
    inputs = [data, model[:2](data).detach()]
    prepare(model, weight_bits=2, activation_bits=3, first_last_bits=None, overrides={"2": {"per_channel": False}})
    plain = copy.deepcopy(model)
    calibrate(plain, [data])
    broken = torch.cat((data[:40], torch.full((1, 40), math.nan)))
    with pytest.warns(UserWarning, match="met NaN or infinite values in 0.input, 2.input; they were left out"):
        calibrate(model, [broken, data[40:]], criterion="output")
    for i, x, weight in zip((0, 2), inputs, weights, strict=True):
        x = x.double()
        rho = float(x.mean().square() / x.square().mean())
        axis, outputs = (0, None) if i == 0 else (None, torch.arange(5)[:, None])
        best = optimal_output_scale(weight, model[i].weight_quantizer.levels, rho, axis, outputs)
        assert torch.allclose(model[i].weight_quantizer.step.double(), best.scale, rtol=1e-5)
        assert not torch.allclose(model[i].weight_quantizer.step, plain[i].weight_quantizer.step, rtol=1e-2)
        # inputs keep the plain optimum
        assert torch.equal(model[i].input_quantizer.step, plain[i].input_quantizer.step)


def test_every_weight_of_a_layer_meets_its_own_input() -> None:
    attention, lstm = nn.MultiheadAttention(40, 2, batch_first=True), nn.LSTM(40, 40, num_layers=2)
    model = nn.ModuleDict({"attention": attention, "lstm": lstm, "table": nn.Embedding(9, 40)})
    packed, first, table = attention.in_proj_weight, lstm.weight_ih_l0, model["table"].weight
    packed, first, table = (weight.detach().clone() for weight in (packed, first, table))
    query, key, value = torch.randn(3, 4, 40), torch.randn(3, 4, 40).abs(), torch.rand(3, 4, 40) + 1
    sequence = torch.rand(7, 2, 40)

    def step(module: nn.ModuleDict, batch: None) -> None:
        module["attention"](query, key, value)
        module["lstm"](nn.utils.rnn.pack_padded_sequence(sequence, [7, 7]))
        module["table"](torch.arange(9))

    prepare(model, weight_bits=2, activation_bits=None, first_last_bits=None)
    rows = calibrate(model, [None], step, criterion="output")
    rho = [float(x.double().mean().square() / x.double().square().mean()) for x in (query, key, value, sequence)]
    levels = uniform_levels(2, True)
    for part, (weight, correlation) in enumerate(zip(packed.chunk(3), rho, strict=False)):
        best = optimal_output_scale(weight, levels, correlation, 0).scale
        found = attention.weight_quantizer.step.chunk(3)[part]
        assert torch.allclose(found.double(), best, rtol=1e-5)
    best = optimal_output_scale(first, levels, rho[3], 0).scale
    assert torch.allclose(lstm.weight_quantizer["weight_ih_l0"].step.double(), best, rtol=1e-5)
    assert torch.allclose(model["table"].weight_quantizer.step.double(), optimal_scale(table, levels, 0).scale)
    unknown = {f"{row.layer}.{row.what}" for row in rows if row.note.startswith("no sum over inputs known")}
    assert unknown == {"lstm.weight_hh_l0", "lstm.weight_ih_l1", "lstm.weight_hh_l1", "table.weight"}


def test_tied_weights_count_where_they_are_multiplied() -> None:
    model = nn.Sequential(nn.Embedding(10, 40), nn.ReLU(), nn.Linear(40, 10, bias=False))
    model[2].weight = model[0].weight
    weight, ids = model[0].weight.detach().clone(), torch.arange(10)
    x = weight.relu().double()
    prepare(model, weight_bits=2, activation_bits=None, first_last_bits=None)
    calibrate(model, [ids], criterion="output")
    rho = float(x.mean().square() / x.square().mean())
    best = optimal_output_scale(weight, uniform_levels(2, True), rho, 0).scale
    assert torch.allclose(model[0].weight_quantizer.step.double(), best, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"quantizer": "lsq+", "sequential": True, "average_bits": 3.0}, {"quantizer": "apot"}], ids=str
)
def test_trains_in_a_trainer(settings: dict, make_trainer) -> None:
    steps = []
    for criterion in ("mse", "output"):
        torch.manual_seed(0)
        model, callback = SmallNet(), quiet(weight_bits=2, criterion=criterion, first_last_bits=None, **settings)
        make_trainer(callback).fit(model, loader(shuffle=False))
        assert len(callback.report) == 8
        layers = quantized_layers(model).values()
        steps.append(torch.cat([layer.weight_quantizer.initial_step for layer in layers]))
    assert steps[1].isfinite().all() and (steps[1] != steps[0]).float().mean() > 0.5


def test_guards_hold_for_outputs_too() -> None:
    x, levels = torch.cat((torch.randn(1, 500) * 1e-3, torch.tensor([[1e3]])), dim=1), uniform_levels(2, True)
    rows = Sample.of_tensor(x, 0)
    found = optimal(Sample(x.double(), rows.weights * 0.7, rows.minimum, rows.maximum, rows.weights * 0.3**0.5), levels)
    assert "to zero in 1 of 1" in found.note
    alone = optimal_output_scale(x[:, :-1], levels, 0.3, 0).scale
    assert float(found.step) == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, math.nan], 0.5), "`x` must be finite, got 1 NaN or infinite"),
        (([1.0], 1.0), "`correlation` must be at least 0 and below 1, got 1.0"),
        (([1.0], -0.1), "`correlation` must be at least 0 and below 1, got -0.1"),
        (([1.0], math.nan), "`correlation` must be at least 0 and below 1, got nan"),
    ],
)
def test_bad_input_is_named(arguments: tuple, message: str) -> None:
    x, correlation = arguments
    with pytest.raises(ValueError, match=message):
        optimal_output_scale(torch.tensor(x), uniform_levels(2, True), correlation)
