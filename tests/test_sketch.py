"""The sketch against the data it stands for."""

from functools import partial

import numpy as np
import pytest
import torch
from distributions import DISTRIBUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qinit.calibration import Sketch
from lightning_qinit.calibration.count import FEW, Counter
from lightning_qinit.functional import optimal_scale, uniform_levels
from lightning_qinit.functional.optimal import solve_rows
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import lsq, minmax, usable


def sketch_of(*batches: torch.Tensor) -> Sketch:
    sketch = Sketch()
    for batch in batches:
        sketch.update(batch)
    return sketch


def solve(sample: Sample, levels: torch.Tensor) -> torch.Tensor:
    """The optimum on a sample, without the guards of the initializer."""
    return solve_rows(sample.rows, levels).scale


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_optimum_on_a_sketch_is_near_the_exact_one(kind: str) -> None:
    x = DISTRIBUTIONS[kind](300_000)
    sketch, data = sketch_of(x), Sample.of_tensor(x)
    for bits in (1, 2, 3, 4, 5, 6, 8):
        levels = uniform_levels(bits, sketch.signed)
        exact = float(optimal_scale(x, levels).error)
        reached = float(data.error(levels, solve(sketch.sample(), levels)))
        assert reached <= exact * (1 + (1e-4 if bits <= 5 else 1e-3)) + 1e-14 * float(data.energy)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_optimum_on_a_sketch_beats_the_others_there(kind: str) -> None:
    sample = sketch_of(DISTRIBUTIONS[kind](50_000)).sample()
    for bits in range(1, 9):
        levels = uniform_levels(bits, signed=True)
        best = float(sample.error(levels, solve(sample, levels)))
        for initializer in (lsq, minmax):
            other = float(sample.error(levels, usable(initializer(sample, levels), sample).step))
            assert best <= other * (1 + 1e-12) + 1e-14 * float(sample.energy)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 5000), max_size=8))
def test_same_bits_however_the_data_is_cut(seed: int, cuts: list[int]) -> None:
    torch.manual_seed(seed)
    x = DISTRIBUTIONS["heavy"](5000)
    whole = sketch_of(x)
    parts = list(x[torch.randperm(5000)].tensor_split(sorted(cuts)))
    in_batches = sketch_of(*parts)
    merged = sketch_of()
    for part in parts:  # as ranks would: each its own sketch, then added
        merged.merge(sketch_of(part))
    for other in (in_batches, merged):
        assert torch.equal(other.table, whole.table)
        assert torch.equal(other.extremes, whole.extremes)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_moments_and_extremes(kind: str) -> None:
    x = DISTRIBUTIONS[kind](20_000)
    sketch, data = sketch_of(x), Sample.of_tensor(x)
    sample = sketch.sample()
    assert sketch.count == 20_000 and float(sample.count) == pytest.approx(20_000, rel=1e-12)
    assert sketch.minimum == float(x.min()) and sketch.maximum == float(x.max())
    assert sketch.signed == bool((x < 0).any() or (x == 0).all())  # zeros say nothing of a sign
    scale = float(x.double().abs().mean()) + 1e-300
    assert float(sample.mean(sample.values)) == pytest.approx(float(x.double().mean()), abs=1e-9 * scale)
    # values of a key are taken to be evenly spread, which is off by a fraction of their variance, 2^-18 / 12
    assert float(sample.energy) == pytest.approx(float(data.energy), rel=1e-7)
    levels = uniform_levels(4, signed=True)
    assert float(minmax(sample, levels)) == float(minmax(data, levels))


def brute_force(x: torch.Tensor) -> torch.Tensor:
    """Count and sum of low bits per key, by numpy on the bit patterns."""
    bits = x.float().flatten().numpy().view(np.uint32)
    keys, low = bits >> 14, (bits & (2**14 - 1)).astype(np.float64)
    return torch.from_numpy(np.stack([np.bincount(keys, w, 2**18) for w in (None, low)]).astype(np.int64))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [FEW, FEW + 1, 4 * FEW + 7])
def test_counts_are_those_of_the_bit_patterns(size: int, threads: int, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    x = torch.randn(size) * torch.logspace(-45, 38, size)  # every exponent
    x[::3] = 0.0
    x[-4:] = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf])
    counter = Counter("cpu")
    for _ in range(2):  # the second time in tables that were used
        sketch = sketch_of()
        sketch.add(counter.count(x))
        assert torch.equal(sketch.table, brute_force(x))
        assert sketch.extremes.tolist() == [-x[:-4].min(), x[:-4].max()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layout_and_dtype_do_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 200, 300).to(dtype)
    expected = brute_force(x)
    for same in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 3), x[..., ::2], x[..., 1::2]):
        assert torch.equal(sketch_of(same).table, expected if same.numel() == x.numel() else brute_force(same))


def test_forty_million_equal_values_are_forty_million() -> None:
    sketch = Sketch()
    batch = torch.tensor(0.3).expand(20_000_000)
    for _ in range(2):
        sketch.update(batch)
    assert sketch.count == 40_000_000
    sample = sketch.sample()
    assert float(sample.count) == 40_000_000
    assert float(sample.values[0, 0]) == float(torch.tensor(0.3))


def test_nonfinite_values_are_counted_and_left_out() -> None:
    clean = torch.randn(100)
    dirty = torch.cat((clean, torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan])))
    sketch, reference = sketch_of(dirty), sketch_of(clean)
    assert sketch.nonfinite == 4 and sketch.count == 100
    assert torch.equal(sketch.extremes, reference.extremes)
    assert torch.equal(sketch.sample().values, reference.sample().values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert torch.equal(sketch_of(x).table, sketch_of(x.float()).table)


def test_memory_is_bounded() -> None:
    sketch = sketch_of(*(DISTRIBUTIONS[kind](10_000) for kind in DISTRIBUTIONS))
    assert sketch.table.nbytes + sketch.extremes.nbytes <= 8 * 2**20


def test_signed_zeros_and_subnormals() -> None:
    assert not sketch_of(torch.tensor([0.0, -0.0, 1.0])).signed
    tiny = torch.tensor([1e-40, -1e-41])
    sample = sketch_of(tiny).sample()
    assert sample.values[0].unique().tolist() == pytest.approx(tiny.double().sort().values.tolist())
