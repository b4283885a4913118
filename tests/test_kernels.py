"""Compiled kernels against the chain of operations."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from conftest import SmallNet, loader, quiet
from torch import Tensor, nn
from torch._inductor.codecache import CppCodeCache
from torch.utils.flop_counter import FlopCounterMode

from lightning_qinit import prepare
from lightning_qinit.quantizers import LSQ, PACT, APoT, Codebook, LSQPlus, Quantizer, cpu, kernels
from lightning_qinit.quantizers.chain import Levels
from lightning_qinit.quantizers.formats import FIRST, LAST, is_last, laid_out
from lightning_qinit.quantizers.rounding import Rounding, changes, gradients, rounded, rounded_with_gradients
from lightning_qinit.quantizers.scratch import Scratch
from lightning_qinit.quantizers.straight_through import round_to_levels

KINDS: dict[str, Callable[..., Quantizer]] = {
    "uniform": partial(LSQ, 4),
    "binary": partial(LSQ, 1),
    "clip": partial(PACT, 4),
    "offset": partial(LSQPlus, 4, batch_axis=0),
    "few levels": partial(APoT, 3),
    "many levels": partial(APoT, 7),
    "codebook": partial(Codebook, 2, levels=(-2.0, -0.5, 0.0, 3.0)),
}


def run(quantizer: Quantizer, x: Tensor, upstream: Tensor, **arguments) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = quantizer(x, **arguments)
    return [y.detach(), *torch.autograd.grad(y, (x, *quantizer.parameters()), upstream.to(y.dtype))]


def with_kernels(quantizer: Quantizer, kernels: str) -> Quantizer:
    quantizer.kernels = kernels
    return quantizer


def both(quantizer: Quantizer, x: Tensor, **arguments) -> None:
    upstream = torch.randn(x.shape)
    results = {}
    for quantizer.kernels in ("eager", "compiled"):
        results[quantizer.kernels] = run(quantizer, x, upstream, **arguments)
    plain, fused = results.values()
    for expected, got in zip(plain[:2], fused[:2], strict=True):  # the same operations on every value
        assert got.dtype == expected.dtype and got.stride() == x.stride() and torch.equal(got, expected)
    for expected, got in zip(plain[2:], fused[2:], strict=True):  # sums in another order
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_are_the_chain(kind: str) -> None:
    quantizer = KINDS[kind]()
    quantizer.start(torch.tensor([0.4]), quantizer.n_bits, True, torch.tensor([-0.7]))
    for shape in ((2, 3, 5, 7), (1, 1, 4), (9,), (2, 6)):
        both(quantizer, torch.randn(shape))
    both(quantizer, torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last))
    both(quantizer, torch.randn(5, 3, 4).transpose(0, 2))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", ["uniform", "few levels"])
def test_one_step_per_channel(kind: str, axis: int) -> None:
    quantizer = KINDS[kind](4, axis)
    quantizer.start(torch.tensor([0.1, 0.2, 0.4, 1.0]), quantizer.n_bits, True)
    shape = [3, 5, 2]
    shape[axis] = 4
    x = torch.randn(shape)
    upstream = torch.randn(shape)
    quantizer.kernels = "eager"
    expected = run(quantizer, x, upstream)
    quantizer.kernels = "compiled"
    for got, value in zip(run(quantizer, x, upstream), expected, strict=True):
        assert torch.allclose(got, value, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(quantizer, x, upstream)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_results_of_another(dtype: torch.dtype) -> None:
    quantizer = LSQ(4)
    quantizer.start(torch.tensor([0.3]), 4, True)
    both(quantizer, torch.randn(6, 7).to(dtype))
    both(quantizer, torch.randn(6, 7), dtype=dtype)


def test_values_spread_over_memory_and_not_a_number() -> None:
    quantizer = LSQ(4)
    quantizer.start(torch.tensor([0.3]), 4, True)
    spread = torch.randn(4, 6)[:, ::2]
    repeated = torch.randn(4, 1).expand(4, 5)
    odd = torch.tensor([[math.nan, math.inf, -math.inf, 0.2]])
    results = {}
    for quantizer.kernels in ("eager", "compiled"):
        results[quantizer.kernels] = [quantizer(x) for x in (spread, repeated, odd)]
    for expected, got in zip(*results.values(), strict=True):
        assert torch.equal(got.nan_to_num(99.0), expected.nan_to_num(99.0))
    assert results["compiled"][2][0, 0].isnan()


def test_results_may_be_changed_in_place_and_under_modes() -> None:
    quantizer, x = LSQ(4), torch.randn(8, 8, requires_grad=True)
    quantizer.start(torch.tensor([0.3]), 4, True)
    expected = quantizer(x).relu()
    quantizer.kernels = "compiled"
    assert torch.equal(quantizer(x).relu_(), expected)
    with FlopCounterMode(display=False):
        assert torch.equal(quantizer(x).relu(), expected)
    with torch.inference_mode():
        assert torch.equal(quantizer(x).relu(), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_many_values_in_any_number_of_threads(kind: str, axis: int, layout: torch.memory_format) -> None:
    quantizer = KINDS[kind](8, axis)
    quantizer.start(torch.linspace(0.1, 0.8, 8), quantizer.n_bits, True, torch.linspace(-1.0, 1.0, 8))
    x, upstream = (torch.randn(8, 8, 61, 23).to(memory_format=layout) for _ in range(2))
    exact = run(copy.deepcopy(quantizer), x.double(), upstream.double())
    found = {}
    threads = torch.get_num_threads()
    quantizer.kernels = "compiled"
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found[count] = run(quantizer, x, upstream)
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*found.values(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    quantizer.kernels = "eager"
    for expected, got in zip(run(quantizer, x, upstream)[:2], found[1][:2], strict=True):
        assert torch.equal(got, expected)
    for expected, got in zip(exact[2:], found[1][2:], strict=True):  # sums of 11,000 values that mostly cancel
        assert torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


IMAGES = [(2, 16, 3, 3), (3, 37, 5, 7), (2, 5, 50, 45), (1, 300, 7, 7), (4, 64, 1, 9), (5, 1, 4, 4), (3, 20, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("kind", ["uniform", "offset", "few levels"])
@torch.no_grad()
def test_results_with_channels_last(kind: str, axis: int | None, dtype: torch.dtype) -> None:
    for shape in IMAGES:
        channels = 1 if axis is None else shape[0]
        quantizer = KINDS[kind](channels, axis)
        quantizer.start(torch.linspace(0.2, 0.8, channels), 4, True, torch.linspace(-1.0, 1.0, channels))
        x, grad = torch.randn(shape), torch.randn(shape).to(dtype)
        plain, turned = (with_kernels(quantizer, k).operand(x, dtype).how for k in ("eager", "compiled"))
        turned = turned._replace(format=LAST)
        out, to_input = rounded_with_gradients(grad.to(memory_format=LAST), x, turned, Scratch())
        also = gradients(grad.to(memory_format=LAST), x, turned)
        assert is_last(out) and torch.equal(out, rounded(x, plain)) and torch.equal(out, rounded(x, turned))
        expected = gradients(grad, x, plain)
        for mixed in (grad, grad.transpose(2, 3).contiguous().transpose(2, 3)):  # in an order of its own
            assert torch.equal(rounded_with_gradients(mixed.clone(), x, turned, Scratch())[1][0], expected[0])
        assert (
            to_input[0].is_contiguous() and torch.equal(to_input[0], expected[0]) and torch.equal(also[0], to_input[0])
        )
        for got, same, value in zip(to_input[1:], also[1:], expected[1:], strict=True):
            assert got is None if value is None else torch.equal(got, same) and torch.allclose(got, value, 1e-4, 1e-5)
        for got, value in zip(changes(x, turned), changes(x, plain), strict=True):
            assert got is None if value is None else is_last(got) and torch.equal(got, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_images_laid_out(dtype: torch.dtype) -> None:
    for shape in IMAGES:
        first = torch.randn(shape).to(dtype)
        last = first.to(memory_format=LAST)
        for x, to in ((first, LAST), (last, FIRST), (last, LAST), (first[:, :, ::2], LAST), (first.double(), LAST)):
            for scratch in (None, Scratch()):
                out = laid_out(x, to, "compiled", scratch)
                assert out.is_contiguous(memory_format=to) and torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_numbers_of_half_the_width(dtype: torch.dtype) -> None:
    unit = 2.0**-24  # the least half number: on a grid that fine, rounding changes none
    levels = Levels(torch.tensor([-(2.0**60), 2.0**60]), -(2.0**60), 2.0**60, True)
    how = Rounding(torch.tensor([unit]), None, levels, True, 1.0, torch.float32, "compiled")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[(every.float() % unit == 0) & (every.abs() < 2.0**30)]
    assert len(every) > 12_000 and torch.equal(rounded(every, how), every.float())
    wide = torch.cat([every.float() * factor for factor in (1, 1 + 2.0**-12, 1 + 2.0**-11, 1 + 2.0**-9, 1 + 2.0**-8)])
    wide = torch.cat([wide, torch.tensor([65519.0, 65520.0, 1e6, math.inf, -math.inf, math.nan])])
    results = [rounded(wide, how._replace(dtype=dtype, kernels=kernels)) for kernels in ("eager", "compiled")]
    assert torch.equal(*[result[:-1] for result in results]) and all(result[-1].isnan() for result in results)


@pytest.mark.parametrize("value", [0.0, -3.0, 2.0**17, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["relative_step", "relative_offset"])
def test_parameters_out_of_bounds(name: str, value: float) -> None:
    quantizer = LSQPlus(4, batch_axis=0)
    quantizer.start(torch.tensor([0.4]), 4, True, torch.tensor([0.1]))
    with torch.no_grad():
        getattr(quantizer, name).fill_(value)
    for sign in (1.0, -1.0):
        x, upstream = torch.randn(9, 5), sign * torch.rand(9, 5)
        plain, fused = (run(with_kernels(quantizer, kernels), x, upstream) for kernels in ("eager", "compiled"))
        for expected, got in zip(plain, fused, strict=True):
            assert torch.allclose(got, expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
def test_what_does_not_fit_fails_as_the_operations_do(kernels: str) -> None:
    """Kernels read memory as they are told to."""
    quantizer = with_kernels(LSQ(4, 3, 0), kernels)
    quantizer.start(torch.tensor([0.1, 0.2, 0.3]), 4, True)
    for shape in ((6, 2), (2, 3), ()):
        with pytest.raises((RuntimeError, IndexError)):
            quantizer(torch.randn(shape))
    with pytest.raises((RuntimeError, NotImplementedError)):
        with_kernels(LSQ(4, device="meta"), kernels).apply(lambda q: q._remember(True, True, 4))(torch.randn(5))
    with torch.no_grad():
        negated = torch.view_as_complex(torch.tensor([[1.0, 0.25]])).conj().imag
        quantizer = with_kernels(LSQ(4), kernels)
        quantizer.start(torch.tensor([0.1]), 4, True)
        assert negated.is_neg() and torch.equal(quantizer(negated), torch.tensor([-0.2]))


STEPS = torch.tensor([[0.1], [0.2], [0.3]])


@pytest.mark.parametrize(
    ("step", "offset"),
    [
        (STEPS, torch.tensor([[0.4]])),
        (STEPS[:1], STEPS),
        (STEPS[:, 0], None),
        (STEPS.repeat(1, 2)[:, :1], None),
        (STEPS.double(), STEPS.double()),
    ],
    ids=["one offset", "one step", "fewer axes", "with gaps", "double"],
)
def test_steps_and_offsets_that_kernels_cannot_read(step: Tensor, offset: Tensor | None) -> None:
    class Given(LSQ):
        has_offset = True

        def quantize(self, x: Tensor, scale: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
            how = self._rounding(x, step, offset, None, elements, dtype)
            assert not how.fits(x)
            return round_to_levels(x, how)

    quantizer, x, results = Given(4), torch.randn(3, 3), {}
    quantizer.start(torch.tensor([0.2]), 4, True)
    for setting in ("eager", "compiled"):
        results[setting] = with_kernels(quantizer, setting)(x)
    assert torch.equal(*results.values())


def test_levels_with_gaps() -> None:
    class Gaps(LSQ):
        def level_set(self, bits: int, signed: bool) -> Tensor:
            return torch.linspace(-2, 2, 9)[::4]

    quantizer, x = Gaps(2), torch.tensor([-2.0, -0.4, 1.4])
    quantizer.start(torch.tensor([1.0]), 2, True)
    for setting in ("eager", "compiled"):
        assert torch.equal(with_kernels(quantizer, setting)(x), torch.tensor([-2.0, 0.0, 2.0]))


class TestWithoutCompiler:
    @pytest.fixture(autouse=True)
    def _no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def compiles(source: str) -> None:
            raise FileNotFoundError("no compiler")

        monkeypatch.setattr(CppCodeCache, "load", compiles)
        for cache in (kernels._module, cpu._library):
            cache.cache_clear()
        yield
        for cache in (kernels._module, cpu._library):
            cache.cache_clear()

    def test_falls_back_without_a_word(self) -> None:
        quantizer, x, upstream = LSQ(4), torch.randn(5, 6), torch.randn(5, 6)
        quantizer.start(torch.tensor([0.3]), 4, True)
        got = run(quantizer, x, upstream)
        quantizer.kernels = "eager"
        for value, expected in zip(got, run(quantizer, x, upstream), strict=True):
            assert torch.allclose(value, expected, rtol=1e-5)

    def test_says_so_if_it_was_asked_to_compile(self) -> None:
        quantizer = LSQ(4)
        quantizer.start(torch.tensor([0.3]), 4, True)
        quantizer.kernels = "compiled"
        with pytest.raises(RuntimeError, match="`kernels` = 'compiled'.*no compiler"):
            quantizer(torch.randn(3))


def test_compiles_nothing_in_a_fast_dev_run(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_module", lambda device: 1 / 0)
    make_trainer(quiet(), fast_dev_run=True).fit(SmallNet(), loader())
    make_trainer(quiet(kernels="eager")).fit(SmallNet(), loader())
    with pytest.raises(ZeroDivisionError):
        make_trainer(quiet()).fit(SmallNet(), loader())


def test_names_what_it_accepts() -> None:
    with pytest.raises(ValueError, match="`kernels` must be 'auto', 'compiled' or 'eager', got 'fast'"):
        quiet(kernels="fast")
    with pytest.raises(ValueError, match="`kernels` must be"):
        prepare(nn.Sequential(nn.Linear(2, 2)), kernels="fast")
