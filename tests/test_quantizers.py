"""Every quantizer against its formulas, torch's own operators, and what a module must survive."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qinit.functional import fake_quantize, uniform_range
from lightning_qinit.functional.sample import Sample
from lightning_qinit.initializers import INITIALIZERS, usable
from lightning_qinit.quantizers import LSQ, Quantizer
from lightning_qinit.quantizers.base import MAX_DRIFT

SETTINGS = [(bits, signed) for bits in (1, 2, 3, 4, 8) for signed in (True, False)]


def started(kind: type[Quantizer], bits: int = 4, signed: bool = True, step: float = 0.125, **arguments) -> Quantizer:
    quantizer = kind(bits, **arguments)
    quantizer.start(torch.full((quantizer.step.numel(),), step), bits, signed)
    return quantizer


@pytest.mark.parametrize("kind", Quantizer.registry.values(), ids=Quantizer.registry)
class TestEveryQuantizer:
    def test_identity_until_calibrated(self, kind: type[Quantizer]) -> None:
        x, quantizer = torch.randn(5, 7), kind(4)
        assert quantizer(x) is x
        assert started(kind)(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]  # integers are nobody's activations

    def test_can_be_switched_off(self, kind: type[Quantizer]) -> None:
        quantizer, x = started(kind), torch.randn(9)
        assert not torch.equal(quantizer(x), x)
        quantizer.enabled = False
        assert quantizer(x) is x

    @pytest.mark.parametrize(("bits", "signed"), SETTINGS)
    def test_levels_are_a_level_set_and_values_land_on_them(
        self, kind: type[Quantizer], bits: int, signed: bool
    ) -> None:
        quantizer = started(kind, bits, signed)
        levels = quantizer.levels
        assert levels.dtype == torch.float64 and bool((levels.diff() > 0).all())
        assert signed == bool(levels[0] < 0) and len(levels) <= 2**bits
        out = quantizer(torch.randn(500) * 3)
        assert set(out.double().tolist()) <= set((levels * 0.125).tolist())

    @pytest.mark.parametrize("initializer", INITIALIZERS)
    @pytest.mark.parametrize(("bits", "signed"), SETTINGS)
    def test_no_initializer_beats_the_optimum(
        self, kind: type[Quantizer], bits: int, signed: bool, initializer: str
    ) -> None:
        x = torch.randn(3, 400) * torch.tensor([[0.1], [1.0], [10.0]])
        quantizer = kind(bits, 3, 0)
        sample, levels = Sample.of_tensor(x, 0), quantizer.level_set(bits, signed)
        errors = {}
        for name in ("optimal", initializer):
            quantizer.start(usable(INITIALIZERS[name](sample, levels), sample).step, bits, signed)
            errors[name] = (quantizer(x) - x).double().square().sum(1)
        # the forward pass rounds in float32; a value on a threshold may fall to either side at the same error
        assert bool((errors["optimal"] <= errors[initializer] * (1 + 1e-5)).all())

    def test_state_dict_deepcopy_and_pickle(self, kind: type[Quantizer]) -> None:
        quantizer, x = started(kind, 3, signed=False, channels=4, channel_axis=1), torch.randn(6, 4)
        fresh = kind(4, 4, 1)
        fresh.load_state_dict(quantizer.state_dict())
        for twin in (fresh, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert torch.equal(twin(x), quantizer(x))
            assert twin.extra_repr() == quantizer.extra_repr()

    def test_float_checkpoint_loads_and_missing_keys_are_still_missed(self, kind: type[Quantizer]) -> None:
        quantizer = kind(4)
        quantizer.load_state_dict({})
        partial = quantizer.state_dict()
        del partial["step"]
        with pytest.raises(RuntimeError, match="step"):
            quantizer.load_state_dict(partial)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_the_dtype_of_values_and_float32_steps(self, kind: type[Quantizer], dtype: torch.dtype) -> None:
        quantizer = started(kind).to(dtype)
        assert quantizer.step.dtype == quantizer.initial_step.dtype == torch.float32
        x = torch.randn(100).to(dtype).requires_grad_()
        out = quantizer(x)
        assert out.dtype == dtype
        expected = fake_quantize(x.detach(), 0.125, quantizer.levels)
        assert torch.equal(out.detach(), expected)
        out.sum().backward()
        assert x.grad.dtype == dtype and quantizer.step.grad.dtype == torch.float32

    def test_float32_inside_autocast(self, kind: type[Quantizer]) -> None:
        quantizer, x = started(kind, step=0.1), torch.randn(100)
        with torch.autocast("cpu", torch.bfloat16):
            inside = quantizer(x)
        assert inside.dtype == torch.float32 and torch.equal(inside, quantizer(x))

    def test_channels_last_and_empty(self, kind: type[Quantizer]) -> None:
        quantizer = started(kind, channels=3, channel_axis=1)
        x = torch.randn(2, 3, 4, 4)
        last = quantizer(x.to(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, quantizer(x))
        empty = torch.empty(0, 3, 4, requires_grad=True)
        quantizer(empty).sum().backward()
        assert empty.grad.shape == empty.shape

    def test_meta_device_materializes(self, kind: type[Quantizer]) -> None:
        quantizer = kind(3, 4, 0, device="meta").to_empty(device="cpu")
        quantizer.reset_parameters()
        for name, value in kind(3, 4, 0).state_dict().items():
            assert torch.equal(quantizer.state_dict()[name], value)

    @pytest.mark.parametrize("learning_rate", [1e-2, 1e2, 1e6, 1e30])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
    def test_steps_stay_positive_and_finite(self, kind: type[Quantizer], optimizer: type, learning_rate: float) -> None:
        quantizer = started(kind, channels=4, channel_axis=0)
        trained = optimizer(quantizer.parameters(), lr=learning_rate)
        for _ in range(20):
            trained.zero_grad()
            (quantizer(torch.randn(4, 50)) * torch.randn(4, 50) * 100).sum().backward()
            trained.step()
            assert bool((quantizer.scale > 0).all()) and bool(quantizer.scale.isfinite().all())
            assert bool(quantizer(torch.randn(4, 50)).isfinite().all())

    def test_step_comes_back_from_outside(self, kind: type[Quantizer]) -> None:
        quantizer = started(kind, step=0.5)
        with torch.no_grad():
            quantizer.step.fill_(-3.0)
        assert quantizer.scale.item() == 0.5 / MAX_DRIFT
        x = torch.randn(1000)
        (quantizer(x) - x).square().sum().backward()  # the error falls as the step grows
        assert float(quantizer.step.grad) < 0
        quantizer.step.grad = None
        (-quantizer(x) * x).sum().neg().backward()  # this one falls as the step shrinks: no further out
        assert float(quantizer.step.grad) == 0

    def test_compiles_without_a_graph_break(self, kind: type[Quantizer]) -> None:
        quantizer = started(kind, channels=3, channel_axis=0, step=0.3)
        compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
        for shape in ((3, 5), (3, 8)):
            x, y = torch.randn(shape, requires_grad=True), torch.randn(shape)
            y_grads = torch.autograd.grad((compiled(x) * y).sum(), (x, quantizer.step))
            grads = torch.autograd.grad((quantizer(x) * y).sum(), (x, quantizer.step))
            assert torch.equal(y_grads[0], grads[0]) and torch.allclose(y_grads[1], grads[1])


X = [-12, -8.25, -8, -7.75, -3.5, -0.5, 0, 0.75, 1.5, 6.5, 7, 7.25, 7.75, 16]  # in steps; peers.md, case C2


def test_lsq_gradients_on_the_published_row() -> None:
    quantizer = started(LSQ, step=1 / 8)
    x = (torch.tensor(X) / 8).requires_grad_()
    out = quantizer(x)
    assert (out * 8).tolist() == [-8, -8, -8, -8, -4, 0, 0, 1, 2, 6, 7, 7, 7, 7]
    (out * torch.arange(1.0, 15.0)).sum().backward()
    assert float(quantizer.step.grad) == pytest.approx(303.0 / (14 * 7) ** 0.5)  # 303 by the paper's convention
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
    assert torch.allclose(quantizer.step.grad.double(), expected, rtol=1e-5, atol=1e-6)
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
    assert float(quantizer.step.grad) == pytest.approx(float(scale.grad) / (len(v) * high) ** 0.5, rel=1e-4)


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
        return float(quantizer.step.grad)

    sample = torch.rand(1, 3, 4, 4) * 3
    batch = sample.expand(8, -1, -1, -1)
    assert step_grad(batch, batch_axis=0) == pytest.approx(8 * step_grad(sample, batch_axis=0))
    assert step_grad(batch) == pytest.approx(step_grad(batch, batch_axis=0) / 8**0.5)
