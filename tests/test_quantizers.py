"""Every quantizer against its formulas, torch's own operators, and what a module must survive."""

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qinit import calibrate, prepare
from lightning_qinit.functional import fake_quantize, uniform_range
from lightning_qinit.functional.levels import apot_levels
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import INITIALIZERS, initialize
from lightning_qinit.quantizers import LSQ, PACT, APoT, Codebook, LSQPlus, Quantizer
from lightning_qinit.quantizers.relative import MAX_DRIFT

BITS = (1, 2, 3, 4, 8)
Kind = Callable[..., Quantizer]


def codebook(bits: int = 4, *args, levels: tuple[float, ...] | None = None, **state) -> Quantizer:
    """As many levels as the bits can number, wider apart towards the ends, on one side further than on the other."""
    grid = torch.arange(2**bits, dtype=torch.float64) - (2 ** (bits - 1) - 1)
    spread = (grid * (1 + grid.abs() / 4) / 4).tolist() if bits > 1 else (-1.0, 1.5)
    return Codebook(bits, *args, levels=levels or spread, **state)


KINDS: dict[str, Kind] = {
    "lsq": LSQ,
    "lsq, narrow": partial(LSQ, narrow_range=True),
    "lsq+, weight": LSQPlus,
    "lsq+, input": partial(LSQPlus, batch_axis=0),
    "pact": PACT,
    "apot": APoT,
    "apot, normalized": partial(APoT, normalize=True),
    "codebook": codebook,
}
OFFSET = {"lsq+, input"}
ONE_SET = {"codebook"}  # levels do not depend on the sign of the data
PLAIN = [name for name in KINDS if name != "apot, normalized"]  # that work on the values as they are


def widths(name: str) -> tuple[int, ...]:
    return BITS[1:] if name.startswith("apot") else BITS


def settings_of(names: Iterable[str]) -> list[tuple[str, int, bool]]:
    signs = {name: (True,) if name in OFFSET | ONE_SET else (True, False) for name in names}
    return [(name, bits, signed) for name in names for bits in widths(name) for signed in signs[name]]


def started(kind: Kind, bits: int = 4, signed: bool = True, step: float = 0.125, **arguments) -> Quantizer:
    quantizer = kind(bits, **arguments)
    quantizer.start(torch.full((quantizer.initial_step.numel(),), step), bits, signed)
    return quantizer


def step_gradient(quantizer: Quantizer) -> float:
    """The gradient that a quantizer with one step gives to it, in units of the data."""
    return float(quantizer.relative_step.grad * quantizer.initial_step)


def test_every_registered_quantizer_is_tried() -> None:
    assert {type(kind(4)) for kind in KINDS.values()} == set(Quantizer.registry.values())


@pytest.mark.parametrize(("name", "bits", "signed"), settings_of(PLAIN))
class TestEveryLevelSet:
    def test_values_land_on_the_nearest_level(self, name: str, bits: int, signed: bool) -> None:
        quantizer = started(KINDS[name], bits, signed)
        levels = quantizer.levels
        assert levels.dtype == torch.float64 and bool((levels.diff() > 0).all()) and len(levels) <= 2**bits
        assert (signed and name not in OFFSET) == bool(levels[0] < 0)
        x = torch.randn(500) * 3
        out = quantizer(x).detach().double()
        points = levels * 0.125
        distance = (x.double()[:, None] - points).abs()
        assert ((out[:, None] - points).abs().amin(1) < 1e-7).all()
        # the nearest but for float32 rounding of x / step
        assert ((x - out).abs() <= distance.amin(1) + 1e-6).all()

    @pytest.mark.parametrize("initializer", INITIALIZERS)
    def test_no_initializer_beats_the_optimum(self, name: str, bits: int, signed: bool, initializer: str) -> None:
        groups = 1 if name in OFFSET else 3
        x = (torch.randn(3, 400) * torch.tensor([[0.1], [1.0], [10.0]]))[:groups] + 0.02
        quantizer = KINDS[name](bits, groups, 0)
        sample, levels = Sample.of_tensor(x, 0), quantizer.level_set(bits, signed)
        errors = {}
        for rule in ("optimal", initializer):
            try:
                chosen = initialize(INITIALIZERS[rule], sample, levels, quantizer.has_offset)
            except ValueError as error:
                assert re.match(r"(lsq\+?|sawb|aciq\w*|kl).* needs .*; these \d+ levels start with", str(error))
                return
            quantizer.start(chosen.step, bits, signed, chosen.offset)
            errors[rule] = (quantizer(x) - x).double().square().sum(1)
        # the forward pass rounds in float32; a value on a threshold may fall to either side at the same error
        assert bool((errors["optimal"] <= errors[initializer] * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", KINDS)
class TestEveryQuantizer:
    def test_identity_until_calibrated(self, name: str) -> None:
        x, quantizer = torch.randn(5, 7), KINDS[name](4)
        assert quantizer(x) is x
        integers = torch.arange(5)
        assert started(KINDS[name])(integers) is integers  # integers are nobody's activations

    def test_can_be_switched_off(self, name: str) -> None:
        quantizer, x = started(KINDS[name]), torch.randn(9)
        assert not torch.equal(quantizer(x), x)
        quantizer.enabled = False
        assert quantizer(x) is x

    def test_state_dict_deepcopy_and_pickle(self, name: str) -> None:
        bits = 4 if name in ONE_SET else 3
        quantizer, x = started(KINDS[name], bits, False, channels=4, channel_axis=1), torch.randn(6, 4)
        fresh = KINDS[name](4, 4, 1)
        fresh.load_state_dict(quantizer.state_dict())
        in_place = KINDS[name](4, 4, 1)
        own = in_place.state_dict()
        for key, value in quantizer.state_dict().items():
            own[key].copy_(value)  # as a distributed checkpoint is read, before it is loaded
        in_place.load_state_dict(own)
        for twin in (fresh, in_place, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert torch.equal(twin(x), quantizer(x))
            assert twin.extra_repr() == quantizer.extra_repr()

    def test_float_checkpoint_loads_and_missing_keys_are_still_missed(self, name: str) -> None:
        quantizer = KINDS[name](4)
        quantizer.load_state_dict({})
        partial_state = quantizer.state_dict()
        del partial_state["relative_step"]
        with pytest.raises(RuntimeError, match="relative_step"):
            quantizer.load_state_dict(partial_state)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_the_dtype_of_values_and_float32_steps(self, name: str, dtype: torch.dtype) -> None:
        quantizer = started(KINDS[name]).to(dtype)
        assert all(value.dtype != dtype or dtype == torch.float32 for value in quantizer.state_dict().values())
        assert quantizer.step.dtype == quantizer.initial_step.dtype == torch.float32
        x = torch.randn(100).to(dtype).requires_grad_()
        out = quantizer(x)
        assert out.dtype == dtype
        wide = quantizer.transform(x.detach().to(torch.promote_types(dtype, torch.float32)))
        assert torch.equal(out.detach(), fake_quantize(wide, 0.125, quantizer.levels).to(dtype))
        out.sum().backward()
        assert x.grad.dtype == dtype and quantizer.relative_step.grad.dtype == torch.float32

    def test_float32_inside_autocast(self, name: str) -> None:
        quantizer, x = started(KINDS[name], step=0.1), torch.randn(100)
        with torch.autocast("cpu", torch.bfloat16):
            inside = quantizer(x)
        assert inside.dtype == torch.float32 and torch.equal(inside, quantizer(x))

    def test_channels_last_and_empty(self, name: str) -> None:
        quantizer = started(KINDS[name], channels=3, channel_axis=1)
        x = torch.randn(2, 3, 4, 4)
        last = quantizer(x.to(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(last, quantizer(x))
        empty = torch.empty(0, 3, 4, requires_grad=True)
        quantizer(empty).sum().backward()
        assert empty.grad.shape == empty.shape
        for value in (torch.nan, torch.inf):  # shows, as it would in float
            spoiled = torch.zeros(2, 3)
            spoiled[0, 0] = value
            assert bool(quantizer(spoiled)[0, 0].isnan()) or value == torch.inf

    def test_meta_device_materializes(self, name: str) -> None:
        quantizer = KINDS[name](4, 4, 0, device="meta").to_empty(device="cpu")
        quantizer.reset_parameters()
        expected = KINDS[name](4, 4, 0)
        for key, value in expected.state_dict().items():
            assert torch.equal(quantizer.state_dict()[key], value)
        for q in (quantizer, expected):
            q.start(torch.full((4,), 0.125), 4, True)
        x = torch.randn(4, 9)
        assert torch.equal(quantizer(x), expected(x))

    @pytest.mark.parametrize("learning_rate", [1e-2, 1e2, 1e6, 1e30])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
    def test_parameters_stay_positive_and_finite(self, name: str, optimizer: type, learning_rate: float) -> None:
        quantizer = started(KINDS[name], channels=4, channel_axis=0)
        trained = optimizer(quantizer.parameters(), lr=learning_rate)
        for _ in range(20):
            trained.zero_grad()
            (quantizer(torch.randn(4, 50)) * torch.randn(4, 50) * 100).sum().backward()
            trained.step()
            assert bool((quantizer.step > 0).all()) and bool(quantizer.step.isfinite().all())
            assert bool(quantizer(torch.randn(4, 50)).isfinite().all())

    def test_step_comes_back_from_outside(self, name: str) -> None:
        quantizer = started(KINDS[name], step=0.5)
        with torch.no_grad():
            quantizer.relative_step.fill_(-3.0)
        assert quantizer.step.item() == 0.5 / MAX_DRIFT
        x = torch.randn(1000)
        target = quantizer.transform(x)
        (quantizer(x) - target).square().sum().backward()  # the error falls as the step grows
        assert step_gradient(quantizer) < 0
        quantizer.relative_step.grad = None
        (-quantizer(x) * target).sum().neg().backward()  # this one falls as the step shrinks: no further out
        assert step_gradient(quantizer) == 0

    def test_compiles_without_a_graph_break(self, name: str) -> None:
        quantizer = started(KINDS[name], channels=3, channel_axis=0, step=0.3)
        torch.compiler.reset()  # each kind counts towards the same limit of recompilations
        compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
        for shape in ((3, 5), (3, 8)):
            x, y = torch.randn(shape, requires_grad=True), torch.randn(shape)
            compiled_grads = torch.autograd.grad((compiled(x) * y).sum(), (x, *quantizer.parameters()))
            grads = torch.autograd.grad((quantizer(x) * y).sum(), (x, *quantizer.parameters()))
            for got, expected in zip(compiled_grads, grads, strict=True):
                assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def numeric(quantizer: Quantizer, x: Tensor, upstream: Tensor, learns_rounding: bool = True) -> tuple[Tensor, ...]:
    """The published gradients of one step, value by value in float64: to the values, the step and the offset.

    LSQ, equations 3 and 5; LSQ+, section 3.1; APoT, section 2.3; PACT, equation 3. Without gradient scales.
    """
    levels, step = quantizer.levels.tolist(), float(quantizer.step.detach())
    offset = float(quantizer.offset.detach()) if quantizer.has_offset else 0.0
    to_x, to_step, to_offset = torch.zeros_like(x), 0.0, 0.0
    for i, (value, up) in enumerate(zip(x.tolist(), upstream.tolist(), strict=True)):
        v = (value - offset) / step
        nearest = min(levels, key=lambda level: abs(v - level))
        inside = levels[0] < v < levels[-1]
        to_x[i] = up if inside else 0.0
        to_step += up * (nearest if not inside else (nearest - v) * learns_rounding)
        to_offset += 0.0 if inside else up
    return to_x, torch.tensor(to_step), torch.tensor(to_offset)


@pytest.mark.parametrize(("name", "bits", "signed"), settings_of(PLAIN))
def test_gradients_are_the_published_ones(name: str, bits: int, signed: bool) -> None:
    x = torch.randn(60, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(60, dtype=torch.float64)
    quantizer = started(KINDS[name], bits, signed, step=0.3 / 2 ** (bits - 2) if "apot" not in name else 0.8)
    if quantizer.has_offset:
        with torch.no_grad():
            quantizer.relative_offset.fill_(-0.3 / quantizer.initial_step.item())
    (quantizer(x) * upstream).sum().backward()
    to_x, to_step, to_offset = numeric(quantizer, x.detach(), upstream, learns_rounding=name != "pact")
    levels = quantizer.levels
    positive, top = int((levels > 0).sum()), float(levels.abs().max())
    if name.startswith(("apot", "codebook")):
        factor = positive**1.5 / top**2 / 60**0.5
    else:
        factor = float(levels[-1]) ** -2 if name == "pact" else (60 * float(levels[-1])) ** -0.5
    assert torch.equal(x.grad, to_x)
    assert step_gradient(quantizer) == pytest.approx(float(to_step) * factor, rel=1e-4, abs=1e-6)
    if quantizer.has_offset:
        offset_gradient = float(quantizer.relative_offset.grad * quantizer.initial_step)
        assert offset_gradient == pytest.approx(float(to_offset) * factor, rel=1e-4, abs=1e-6)


def test_apot_normalizes_weights_as_in_the_paper_and_not_inputs() -> None:
    x = (torch.randn(7, 9, dtype=torch.float64) * 3 + 1).requires_grad_()
    quantizer = started(KINDS["apot, normalized"], step=2.0)
    normal = (x - x.mean()) / ((x - x.mean()).square().mean()).sqrt()
    plain = started(APoT, step=2.0)
    assert torch.allclose(quantizer(x), plain(normal))
    upstream = torch.randn(7, 9, dtype=torch.float64)
    (got,) = torch.autograd.grad((quantizer(x) * upstream).sum(), x)
    (expected,) = torch.autograd.grad((plain(normal) * upstream).sum(), x)
    assert torch.allclose(got, expected)
    assert not APoT(4, batch_axis=0, normalize=True).normalize


def test_apot_levels_of_the_paper() -> None:
    # Li et al., section 2.2 and the authors' sets of exponents for 2 to 6 bits of magnitude
    sets = {
        1: [(1,)],
        2: [(1, 2, 3)],
        3: [(1, 2, 4), (3,)],
        4: [(1, 3, 5), (2, 4, 6)],
        5: [(1, 3, 6), (2, 4, 7), (5,)],
        6: [(1, 4, 7), (2, 5, 8), (3, 6, 9)],
    }
    for magnitude_bits, terms in sets.items():
        sums = sorted(sum(choice) for choice in product(*[(0.0, *(2.0**-e for e in term)) for term in terms]))
        magnitudes = torch.tensor(sums, dtype=torch.float64) / sums[-1]
        assert len(set(sums)) == 2**magnitude_bits
        signed, unsigned = apot_levels(magnitude_bits + 1, signed=True), apot_levels(max(2, magnitude_bits), False)
        assert torch.equal(signed[len(signed) // 2 :], magnitudes) and torch.equal(signed, -signed.flip(0))
        assert magnitude_bits == 1 or torch.equal(unsigned, magnitudes)
    for bits, count in ((7, 127), (8, 255)):
        assert len(apot_levels(bits, True).unique()) == count and len(apot_levels(bits, False).unique()) == count + 1
    assert apot_levels(4, True)[7:].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])


def test_narrow_range_is_symmetric_and_ternary_at_two_bits() -> None:
    assert LSQ(2, narrow_range=True).level_set(2, True).tolist() == [-1, 0, 1]
    assert LSQ(4, narrow_range=True).level_set(4, True).tolist() == list(range(-7, 8))
    assert LSQ(4, narrow_range=True).level_set(4, False).tolist() == list(range(16))
    ternary = started(partial(LSQ, narrow_range=True), bits=2, step=1.0)
    assert ternary(torch.tensor([-3.0, -0.4, 0.4, 0.6])).tolist() == [-1, 0, 0, 1]


def test_options_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="a codebook of 3 levels has 2 bits, got 4"):
        Codebook(4, levels=[-1, 0, 1])
    with pytest.raises(ValueError, match="`levels` must be a 1-D tensor"):
        Codebook(2, levels=[0, 1, 1])
    with pytest.raises(ValueError, match="APoT has levels for 2 to 8 bits, got 1"):
        APoT(1)


X = [-12, -8.25, -8, -7.75, -3.5, -0.5, 0, 0.75, 1.5, 6.5, 7, 7.25, 7.75, 16]  # in steps; peers.md, case C2


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam], ids=["sgd", "adam"])
def test_gradient_descent_moves_the_step_itself_and_adam_a_fraction_of_it(optimizer: Callable[..., object]) -> None:
    torch.manual_seed(0)
    x = torch.randn(200)
    for step in (1.0, 1e-3):
        quantizer = started(LSQ, bits=8, step=step)
        plain = torch.tensor([step], dtype=torch.float64, requires_grad=True)  # LSQ's own parameter
        ours, theirs = optimizer(quantizer.parameters(), lr=0.01), optimizer([plain], lr=0.01)
        for _ in range(5):
            up = torch.randn(200) * step
            ours.zero_grad()
            (quantizer(x * step) * up).sum().backward()
            v = (x * step).double() / float(quantizer.step.detach())
            code, inside = v.round().clamp(-128, 127), (v > -128) & (v < 127)
            plain.grad = ((code - v * inside) * up).sum()[None] / (200 * 127) ** 0.5
            ours.step()
            theirs.step()
            if isinstance(ours, torch.optim.SGD):
                assert quantizer.step.item() == pytest.approx(plain.item(), rel=1e-5)
        if isinstance(ours, torch.optim.Adam):  # at most the learning rate per turn, relative to the step
            assert 0 < abs(quantizer.step.item() / step - 1) < 0.06
            assert step == 1.0 or abs(plain.item() / step - 1) > 5  # the step itself is lost


def test_lsq_gradients_on_the_published_row() -> None:
    quantizer = started(LSQ, step=1 / 8)
    x = (torch.tensor(X) / 8).requires_grad_()
    out = quantizer(x)
    assert (out * 8).tolist() == [-8, -8, -8, -8, -4, 0, 0, 1, 2, 6, 7, 7, 7, 7]
    (out * torch.arange(1.0, 15.0)).sum().backward()
    assert step_gradient(quantizer) == pytest.approx(303.0 / (14 * 7) ** 0.5)  # 303 by the paper's convention
    assert [bool(g) for g in x.grad] == [-8 < v < 7 for v in X]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    channels=st.sampled_from([None, 0, 1]),
    step=st.floats(0.01, 2),
)
def test_lsq_against_the_formula_element_by_element(
    seed: int, bits: int, signed: bool, channels: int | None, step: float
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(4, 6, dtype=torch.float64)
    count = 1 if channels is None else x.shape[channels]
    quantizer = started(LSQ, bits, signed, step, channels=count, channel_axis=channels)
    (quantizer(x) * upstream).sum().backward()
    low, high = uniform_range(bits, signed)
    s, elements = float(torch.tensor(step)), x.numel() // count  # the step is kept in float32
    step_grads, x_grads = torch.zeros(count, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for i in range(4):
        for j in range(6):
            v = x[i, j].item() / s
            slope = low if v <= low else high if v >= high else round(v) - v
            step_grads[0 if channels is None else (i, j)[channels]] += slope * float(upstream[i, j])
            x_grads[i, j] = upstream[i, j] if low < v < high else 0
    expected = step_grads / (elements * high) ** 0.5
    assert torch.allclose(
        (quantizer.relative_step.grad * quantizer.initial_step).double(), expected, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(x.grad, x_grads)


@pytest.mark.parametrize(("bits", "signed"), [(b, s) for b in (2, 4, 8) for s in (True, False)])
def test_lsq_against_torch_where_conventions_agree(bits: int, signed: bool) -> None:
    low, high = uniform_range(bits, signed)
    step = torch.tensor([0.125])
    v = torch.empty(2000).uniform_(low - 4.0, high + 4.0)
    # torch saturates on the rounded value: within half a step beyond the outer levels its gradient differs
    v = v[((v <= low - 0.5) | (v >= high + 0.5)) | ((v > low) & (v < high))]
    x, upstream = (v * step).requires_grad_(), torch.randn(len(v))
    quantizer = started(LSQ, bits, signed)
    (quantizer(x) * upstream).sum().backward()
    twin, scale = x.detach().clone().requires_grad_(), step.clone().requires_grad_()
    out = torch._fake_quantize_learnable_per_tensor_affine(twin, scale, torch.zeros(1), low, high, 1.0)
    (out * upstream).sum().backward()
    assert torch.equal(quantizer(x).detach(), out.detach())
    assert torch.equal(x.grad, twin.grad)
    assert step_gradient(quantizer) == pytest.approx(float(scale.grad) / (len(v) * high) ** 0.5, rel=1e-4)


def test_fake_quantize_of_numbers_that_are_none_and_steps_that_are_none() -> None:
    x = torch.tensor([torch.nan, torch.inf, 0.3])
    for levels, last in ((torch.tensor([-1.0, 0, 1]), 0.0), (torch.tensor([-1.0, 0, 0.4, 1]), 0.4)):
        assert torch.equal(fake_quantize(x, 1.0, levels).nan_to_num(9.0), torch.tensor([9.0, 1.0, last]))
        for step in (0.0, -1.0, torch.nan):
            with pytest.raises(ValueError, match="`scale` must be positive, got"):
                fake_quantize(x, step, levels)
        with pytest.raises(ValueError, match="`x` must be floating-point, got torch.int64"):
            fake_quantize(torch.arange(3), 1.0, levels)
    with pytest.raises(ValueError, match="`bits` must be a whole number of at least 1, got 0"):
        uniform_range(0, True)
    with pytest.raises(ValueError, match="`bits` must be a whole number from 2 to 8, got 1"):
        apot_levels(1, True)


def test_quantizers_are_made_where_the_default_device_has_no_values() -> None:
    with torch.device("meta"):
        codebook = {"name": "codebook", "levels": [-1, 0, 2]}
        model = prepare(nn.Sequential(nn.Linear(4, 4)), weight_bits=2, weight_quantizer=codebook, first_last_bits=None)
    assert model[0].weight_quantizer.initial_step.is_meta and model[0].weight_quantizer.levels.device.type == "cpu"


def test_a_step_beyond_what_float32_has_room_for_is_reported_as_it_is_used() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 4)), first_last_bits=None)
    x = torch.randn(64, 4) * 1e37
    row = calibrate(model, [x])[1]
    assert row.step == float(model[0].input_quantizer.step.detach()) == 2.0**100 and row.note.startswith(
        "beyond the steps"
    )
    used = model[0].input_quantizer(x).detach().double()
    assert row.error == pytest.approx(float((used - x).square().sum() / x.double().square().sum()), rel=1e-6)


def test_forward_equals_torch_fake_quantize_ties_included() -> None:
    x = torch.arange(-200, 200) / 32.0  # every quarter step, halves included
    out = started(LSQ, step=0.125)(x).detach()
    assert torch.equal(out, torch.fake_quantize_per_tensor_affine(x, 0.125, 0, -8, 7))
    rows, steps = torch.randn(3, 50), torch.tensor([0.5, 0.25, 1.0])
    quantizer = LSQ(4, 3, 0)
    quantizer.start(steps, 4, True)
    expected = torch.fake_quantize_per_channel_affine(rows, steps, torch.zeros(3, dtype=torch.int32), 0, -8, 7)
    assert torch.equal(quantizer(rows).detach(), expected)


def test_gradient_scale_counts_the_features_of_one_sample() -> None:
    def step_grad(x: Tensor, **arguments) -> float:
        quantizer = started(LSQ, signed=False, **arguments)
        quantizer(x).sum().backward()
        return step_gradient(quantizer)

    sample = torch.rand(1, 3, 4, 4) * 3
    batch = sample.expand(8, -1, -1, -1)
    assert step_grad(batch, batch_axis=0) == pytest.approx(8 * step_grad(sample, batch_axis=0))
    assert step_grad(batch) == pytest.approx(step_grad(batch, batch_axis=0) / 8**0.5)
