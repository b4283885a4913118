"""The optimum against brute force, closed forms, and its own claims."""

import math

import pytest
import torch
from distributions import DISTRIBUTIONS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qinit.functional import optimal, optimal_scale, uniform_levels
from lightning_qinit.functional.bracket import gather
from lightning_qinit.functional.chords import scan
from lightning_qinit.functional.rows import Rows, squared_error
from lightning_qinit.functional.sample import Sample
from lightning_qinit.functional.sweep import best_in, outer_bracket
from lightning_qinit.initializers import lsq, minmax, usable

LEVEL_SETS = [
    [-1.0, 0.0, 1.0],
    [-1.0, 1.0],
    [-1.5, -0.5, 0.5, 1.5],
    [0.0, 1.0, 2.0, 3.0],
    [-3.0, 0.0],
    [-1.0, 3.0],
    [-8.0, -7.0, -1.0, 0.0, 0.5, 9.0],
    [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0],
]


def error_at(x: Tensor, levels: Tensor, scale: float, weights: Tensor | None = None) -> float:
    """The definition: distance to the nearest point, squared and summed, in float64."""
    distance = (x.double()[:, None] - scale * levels).abs().amin(1).square()
    return float((distance if weights is None else weights.double() * distance).sum())


def brute_force(x: Tensor, levels: Tensor, weights: Tensor | None = None) -> float:
    """The least error over every assignment that some step makes, each at its own least-squares step.

    Between two neighbouring breakpoints the assignment does not change, so one step inside each interval shows
    them all. Independent of the package: no sweep, no cumulative sums.
    """
    x, w = x.double(), torch.ones(len(x)).double() if weights is None else weights.double()
    thresholds = (levels[1:] + levels[:-1]) / 2
    breakpoints = (x[:, None] / thresholds).flatten()
    breakpoints = breakpoints[breakpoints.isfinite() & (breakpoints > 0)].unique()
    if not len(breakpoints):
        breakpoints = torch.ones(1).double()
    inside = torch.cat((breakpoints[:1] / 2, (breakpoints[1:] + breakpoints[:-1]) / 2, breakpoints[-1:] * 2))
    best = math.inf
    for scale in inside.tolist():
        code = levels[(x[:, None] - scale * levels).abs().argmin(1)]
        a, b = float((w * x * code).sum()), float((w * code * code).sum())
        best = min(best, error_at(x, levels, a / b if a > 0 and b > 0 else scale, weights))
    return best


def assert_optimal(x: Tensor, levels: Tensor, weights: Tensor | None = None) -> None:
    fit = optimal_scale(x, levels, weights=weights)
    energy = float((x.double().square() * (1 if weights is None else weights)).sum())
    assert fit.scale > 0 and fit.scale.isfinite()
    there = error_at(x, levels, float(fit.scale), weights)
    assert float(fit.error) == pytest.approx(there, rel=1e-9, abs=1e-14 * energy)
    if energy == 0 and 0 not in levels:  # the smaller the step, the better: there is no optimum
        assert fit.scale == 1
        return
    assert float(fit.error) <= brute_force(x, levels, weights) * (1 + 1e-9) + 1e-14 * energy


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_matches_brute_force(kind: str, levels: list[float]) -> None:
    for n in (1, 2, 3, 5, 40):
        assert_optimal(DISTRIBUTIONS[kind](n), torch.tensor(levels, dtype=torch.float64))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_matches_brute_force_uniform(bits: int, signed: bool) -> None:
    for n in (1, 4, 12):
        assert_optimal(torch.randn(n), uniform_levels(bits, signed))


values = st.floats(-100, 100, allow_nan=False, width=32)


@settings(max_examples=150, deadline=None)
@given(
    x=st.lists(values, min_size=1, max_size=12),
    weights=st.lists(st.floats(0, 10, width=32), min_size=12, max_size=12),
    levels=st.sets(st.integers(-20, 20), min_size=1, max_size=9),
)
@example(x=[2.0**-126, -1.0], weights=[1.0, 1.0] + [0.0] * 10, levels={0})  # the one useful step has no float32 inverse
def test_matches_brute_force_on_anything(x: list[float], weights: list[float], levels: set[int]) -> None:
    level_set = torch.tensor(sorted(levels | {0, 1}), dtype=torch.float64)
    for many in (optimal.MANY, -1):  # few are sorted at once; on a grid of steps first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimal, "MANY", many)
            assert_optimal(torch.tensor(x), level_set, torch.tensor(weights[: len(x)]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 300), st.booleans(), st.booleans())
def test_a_grid_of_steps_never_excludes_the_best(seed: int, bits: int, count: int, weighted: bool, idle: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, count, generator=generator, dtype=torch.float64) ** 3
    if idle:  # a channel of zeros, and one without a level on its side
        x = x.abs() * torch.tensor([[0.0], [-1.0], [1.0]])
    w = torch.rand(3, count, generator=generator).double() if weighted else torch.ones(3, 1).double().expand(3, count)
    rows, levels = Rows(x, w), uniform_levels(bits, signed=not idle)
    bracket = outer_bracket(x, levels)
    step, score = best_in(rows, levels, bracket)
    row, narrowed = scan(rows, levels, bracket)
    assert sorted(row.unique().tolist()) == [0, 1, 2] and (row.diff() >= 0).all()
    assert (narrowed.lower >= bracket.lower[row]).all() and (narrowed.upper <= bracket.upper[row]).all()
    assert (narrowed.upper[1:] < narrowed.lower[:-1])[row.diff() == 0].all()  # apart, from the largest step down
    found = best_in(rows.take(row), levels, narrowed)[1]
    for i in range(3):
        assert torch.isclose(found[row == i].max(), score[i], rtol=1e-12)
    inside = (narrowed.lower <= step[row] * (1 + 1e-9)) & (step[row] <= narrowed.upper * (1 + 1e-9)) & (score[row] > 0)
    assert row[inside].tolist() == ([2] if idle else [0, 1, 2])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_never_above_another_initializer_nor_a_fine_grid(kind: str, bits: int) -> None:
    for signed in (True, False):
        if kind == "zeros" and signed and bits == 1:
            continue  # without a level 0 there is no best step for zeros
        x, levels = DISTRIBUTIONS[kind](20_000), uniform_levels(bits, signed)
        fit, sample = optimal_scale(x, levels), Sample.of_tensor(x)
        bound = float(fit.error) * (1 - 1e-12) - 1e-14 * float(sample.energy)
        for initializer in (lsq, minmax):
            assert bound <= float(sample.error(levels, usable(initializer(sample, levels), sample).step))
        for factor in torch.logspace(-3, 1, 200, base=2).tolist():
            assert bound <= float(sample.error(levels, fit.scale[None] * factor))


def test_gaussian_four_bits_known_step_and_distortion() -> None:
    # a million midpoints of equal probability stand for N(0, 1) better than a million draws
    p = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    fit = optimal_scale(math.sqrt(2) * torch.erfinv(2 * p - 1), uniform_levels(4, signed=True))
    assert float(fit.scale) == pytest.approx(0.3386, abs=1e-4)  # the digits that methods.md and Max (1960) give
    assert float(fit.error) / 1e6 == pytest.approx(0.011864, abs=1e-6)


def test_laplace_ternary_closed_form() -> None:
    p = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    x = torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log())
    fit = optimal_scale(x, torch.tensor([-1.0, 0.0, 1.0]))
    assert float(fit.scale) == pytest.approx(
        2, abs=2e-5
    )  # the midpoints end at 14.5, where 1e-6 of the mean is missing
    assert float(fit.error) / 2e6 == pytest.approx(2 - 4 / math.e, abs=2e-5)


def test_binary_is_the_mean_magnitude() -> None:
    x = torch.randn(1000)
    assert float(optimal_scale(x, torch.tensor([-1.0, 1.0])).scale) == pytest.approx(float(x.double().abs().mean()))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outliers", "one_sided"])
def test_bracketing_changes_nothing(kind: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, levels = DISTRIBUTIONS[kind](30_000), uniform_levels(bits, signed=True)
    bracketed = optimal_scale(x, levels)
    monkeypatch.setattr(optimal, "RESOLUTIONS", ())
    swept = optimal_scale(x, levels)
    assert float(bracketed.scale) == pytest.approx(float(swept.scale), rel=1e-12)
    assert float(bracketed.error) == pytest.approx(float(swept.error), rel=1e-9)
    assert swept.lower <= bracketed.lower <= bracketed.scale <= bracketed.upper <= swept.upper
    if bits > 2:  # else there are so few breakpoints that sorting them all costs less
        assert bracketed.upper / bracketed.lower < swept.upper / swept.lower


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(1, 8), resolution=st.sampled_from([1, 4, 6, 9]))
def test_nodes_bound_the_error_from_below(seed: int, bits: int, resolution: int) -> None:
    torch.manual_seed(seed)
    kinds = [k for k in DISTRIBUTIONS if k not in ("minute", "huge", "zeros")]
    x = DISTRIBUTIONS[kinds[seed % len(kinds)]](200).double()
    x = (x / x.abs().max().clamp(min=1e-9))[None]
    rows = Rows(x, torch.rand_like(x))
    nodes, levels = gather(rows, resolution), uniform_levels(bits, signed=True)
    for scale in torch.logspace(-8, 1, 30, base=2, dtype=torch.float64).split(1):
        below = squared_error(nodes.rows, levels, scale) - nodes.gap
        assert float(below) <= float(squared_error(rows, levels, scale)) + 1e-12


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_channel_is_each_channel_alone(bits: int) -> None:
    x = torch.randn(7, 3, 50) * torch.logspace(-3, 3, 7)[:, None, None]
    x[2] = 0
    levels = uniform_levels(bits, signed=True)
    for axis in (0, 1, -1):
        fit = optimal_scale(x, levels, channel_axis=axis)
        alone = [optimal_scale(part, levels) for part in x.unbind(axis)]
        assert torch.allclose(fit.scale, torch.stack([f.scale for f in alone]), rtol=1e-12, atol=0)
        assert torch.allclose(fit.error, torch.stack([f.error for f in alone]), rtol=1e-9, atol=1e-20)


def test_weights_count_like_repeats() -> None:
    x, counts = torch.randn(300), torch.randint(0, 5, (300,))
    levels = uniform_levels(4, signed=True)
    weighted = optimal_scale(x, levels, weights=counts)
    repeated = optimal_scale(x.repeat_interleave(counts), levels)
    assert float(weighted.scale) == pytest.approx(float(repeated.scale), rel=1e-12)
    assert float(weighted.error) == pytest.approx(float(repeated.error), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-60, 60), bits=st.integers(1, 6))
def test_follows_the_scale_of_the_data_and_ignores_its_order(seed: int, exponent: int, bits: int) -> None:
    torch.manual_seed(seed)
    x, levels = torch.randn(64, dtype=torch.float64), uniform_levels(bits, signed=True)
    fit = optimal_scale(x, levels)
    assert float(optimal_scale(x * 2.0**exponent, levels).scale) == float(fit.scale) * 2.0**exponent
    assert float(optimal_scale(x[torch.randperm(64)], levels).scale) == pytest.approx(float(fit.scale), rel=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_unit_of_the_weights_does_not_matter(bits: int) -> None:
    x, weights = torch.randn(8, 600) / torch.randn(8, 600), torch.rand(8, 600, dtype=torch.float64)
    levels = uniform_levels(bits, signed=True)
    fit = optimal_scale(x, levels, 0, weights)
    for unit in (2.0**-126, 2.0**-133, 2.0**-140, 2.0**-149, 2.0**200, 2.0**-550, 2.0**540):  # some beyond float32
        same = optimal_scale(x, levels, 0, weights * unit)
        assert torch.equal(same.scale, fit.scale) and torch.equal(same.error, fit.error * unit)


@pytest.mark.parametrize("levels", [[-1.0, 1.0], [-1.0, 1e-6], [-1.5, -0.5, 0.5, 1.5], [0.0, 1e-5, 1.0]])
@pytest.mark.parametrize("length", [2, 2**15])
def test_the_bracket_holds_the_optimum(levels: list[float], length: int) -> None:
    x = torch.tensor([0.3, 0.6]).repeat(length // 2)
    fit = optimal_scale(x, torch.tensor(levels, dtype=torch.float64))
    assert fit.lower <= fit.scale <= fit.upper


def test_of_equal_optima_the_larger_step() -> None:
    for value in (0.3, 5.0, 1e-20):  # every step value / k is lossless
        for n in (1, 1000, 3_000_000):
            fit = optimal_scale(torch.tensor(value).expand(n), uniform_levels(4, signed=True))
            assert float(fit.scale) == pytest.approx(float(torch.tensor(value)), rel=1e-12)


def test_degenerate_data_has_a_step() -> None:
    levels = uniform_levels(4, signed=False)
    for x in (torch.zeros(5), torch.empty(0), -torch.rand(5)):
        assert optimal_scale(x, levels).scale == 1
    assert optimal_scale(torch.zeros(3, 4), levels, channel_axis=0).scale.tolist() == [1, 1, 1]
    assert optimal_scale(torch.zeros(0, 4), levels, channel_axis=0).scale.tolist() == []
    tiny = torch.tensor([3.0, 5.0, 15.0], dtype=torch.float64) * 2.0**-1074  # whose inverse is no number
    assert float(optimal_scale(tiny, levels).scale) == 2.0**-1074


def test_dtypes_and_devices_of_the_answer() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32):
        fit = optimal_scale(torch.tensor([1, -2, 3]).to(dtype), uniform_levels(3, signed=True))
        assert fit.scale.dtype == fit.error.dtype == torch.float64
        assert fit.scale.shape == ()


@pytest.mark.parametrize(
    ("x", "levels", "weights", "message"),
    [
        ([1.0, math.nan], [0.0, 1.0], None, "`x` must be finite, got 1 NaN or infinite"),
        ([1.0, math.inf], [0.0, 1.0], None, "`x` must be finite"),
        ([1.0], [0.0, 0.0, 1.0], None, "`levels` must be a 1-D tensor .* strictly increasing"),
        ([1.0], [1.0], None, "at least two"),
        ([1.0], [1.0, 2.0], None, "hold 0 or lie on both sides"),
        ([1.0], [0.0, 1.0], [-1.0], "`weights` must be finite and nonnegative"),
    ],
)
def test_bad_input_is_named(x: list[float], levels: list[float], weights: list[float] | None, message: str) -> None:
    given = None if weights is None else torch.tensor(weights)
    with pytest.raises(ValueError, match=message):
        optimal_scale(torch.tensor(x), torch.tensor(levels), weights=given)


def test_an_axis_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="`channel_axis` must be one of the 2 axes of `x`, got 2"):
        optimal_scale(torch.ones(2, 3), torch.tensor([0.0, 1.0]), channel_axis=2)
