"""Compiled kernels against the chain of operations, and layers that keep no quantized values against those that do."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, loader, quiet
from torch import Tensor, nn
from torch._inductor.codecache import CppCodeCache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_qinit import calibrate, prepare
from lightning_qinit.insertion import quantized_layers
from lightning_qinit.quantizers import LSQ, PACT, APoT, Codebook, LSQPlus, Quantizer, cpu, kernels
from lightning_qinit.quantizers import operation as operations
from lightning_qinit.quantizers.fused import release_scratch
from lightning_qinit.quantizers.operation import Convolution
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


def test_default_devices_and_recorders_change_nothing() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = quantized(network(), x).eval()
    for _, quantizer in model.named_modules():
        if isinstance(quantizer, Quantizer):
            quantizer.kernels = "compiled"
    expected = model(x)
    with torch.device("meta"):
        release_scratch()
        assert torch.equal(model(x), expected)
    recorded = make_fx(model, tracing_mode="real")(x)
    assert torch.equal(recorded(x), expected) and not torch.equal(recorded(x + 1), expected)
    assert torch.equal(recorded(x + 1), model(x + 1))


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


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def quantized(module: nn.Module, x: Tensor, **settings) -> nn.Module:
    prepare(module, **settings)
    calibrate(module, [x])
    return module.train()


def growth(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result, and how many bytes more there are afterwards, as torch's allocator tells its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = run()
    return out, sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def test_layers_keep_what_they_keep_in_float() -> None:
    x = torch.randn(64, 3, 8, 8)
    model = network()
    _, plain = growth(lambda: model(x))
    quantized(model, x)
    model(x)  # once, for the memory that all layers share
    _, kept = growth(lambda: model(x))
    weights = sum(weight.nbytes for layer in quantized_layers(model).values() for weight in layer.weights().values())
    assert plain > 500_000 and weights > 100_000
    assert kept < plain + 8 * 2**10  # a few numbers per quantizer, but no quantized input or weight


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "linear, vector": (lambda: nn.Linear(6, 5), (6,)),
    "linear, sequence": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (3, 4, 7, 7)),
    "conv2d, one": (lambda: nn.Conv2d(4, 4, 3), (4, 7, 7)),
    "conv2d, padded": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
}


def gradients(layer: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    layer.zero_grad()
    leaf = x.detach().requires_grad_(x.requires_grad)
    out = call(leaf)
    out.mul_(torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()  # as an activation in place would
    found = [out.detach(), *(p.grad for p in layer.parameters())]
    return found + ([leaf.grad] if x.requires_grad else [])


def by_hand(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer as autograd differentiates it: the float operation on the results of both quantizers."""

    def call(x: Tensor) -> Tensor:
        weight = layer.weight_quantizer(layer.weight)
        inputs = layer.input_quantizer(x)
        return torch.func.functional_call(twin, {"weight": weight}, (inputs,), strict=False)

    twin = layer.float_class.__new__(layer.float_class)
    twin.__dict__.update({k: v for k, v in vars(layer).items() if k != "_modules"}, _modules={})
    return call


@pytest.mark.parametrize("needs_gradient", [True, False], ids=["input of a layer", "data"])
@pytest.mark.parametrize("quantizer", ["lsq", "lsq+"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_operation(name: str, quantizer: str, needs_gradient: bool) -> None:
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    x = torch.randn(shape)
    quantized(model, x, weight_bits=2, activation_bits=3, first_last_bits=None, quantizer=quantizer)
    (layer,) = model
    x.requires_grad_(needs_gradient)
    layer.weight_quantizer.kernels = layer.input_quantizer.kernels = "eager"
    expected = gradients(layer, x, by_hand(layer))
    assert len(expected) >= 4
    for kernels_ in ("eager", "compiled") if needs_gradient else ("eager",):
        layer.weight_quantizer.kernels = layer.input_quantizer.kernels = kernels_
        for got, value in zip(gradients(layer, x, layer), expected, strict=True):
            assert torch.allclose(got, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("settings", [{"weight_bits": None}, {"activation_bits": None}], ids=["inputs", "weights"])
def test_what_is_not_quantized_is_kept_and_watched(settings: dict) -> None:
    x = torch.randn(4, 3, 8, 8)
    model = quantized(network(), x, **settings)
    first = model[0]
    seen = x.clone()
    out = first(seen)
    with torch.no_grad():
        (seen if "activation_bits" in settings else first.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_hooks_around_the_layers_see_what_they_keep() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = quantized(network(), x)
    expected = gradients(model, x, model)
    for call in (
        partial(checkpoint, model, use_reentrant=False),
        lambda x: checkpoint(model[2:], checkpoint(model[:2], x, use_reentrant=False), use_reentrant=False),
    ):
        for got, value in zip(gradients(model, x, call), expected, strict=True):
            assert torch.equal(got, value)
    packed = 0

    def to_half_and_another_order(kept: Tensor) -> Tensor:
        nonlocal packed
        packed += kept.numel()
        return kept.detach().contiguous().clone()

    last = x.to(memory_format=torch.channels_last)
    expected = gradients(model, last, model)
    with torch.autograd.graph.saved_tensors_hooks(to_half_and_another_order, lambda kept: kept):
        got = gradients(model, last, model)
    assert packed > 2 * 4 * 16 * 64
    for value, wanted in zip(got, expected, strict=True):
        assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)


def test_second_derivatives() -> None:
    model = quantized(network(), torch.randn(4, 3, 8, 8))
    layers = [model[0], model[2]]

    def penalty(calls: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(4, 3, 8, 8, requires_grad=True)
        out = calls[1](calls[0](x).tanh()).tanh().sum()
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [layer.weight for layer in layers])

    for kernel in ("eager", "compiled"):
        for layer in layers:
            layer.weight_quantizer.kernels = layer.input_quantizer.kernels = kernel
        for got, value in zip(penalty(layers), penalty([by_hand(layer) for layer in layers]), strict=True):
            assert torch.allclose(got, value, rtol=1e-4, atol=1e-6) and bool(value.abs().max() > 0)


def test_with_hooks_and_while_watched_the_same() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = quantized(network(), x)
    expected = gradients(model, x, model)
    seen = []
    for layer in quantized_layers(model).values():
        for quantizer in layer.quantizers().values():
            quantizer.watch = lambda quantizer, x, y: seen.append((quantizer, x.clone(), y.clone()))
    watched = gradients(model, x, model)
    assert len(seen) == 8 and all(torch.equal(y, quantizer(x)) for quantizer, x, y in list(seen))
    handles = [quantizer.register_forward_hook(lambda *of: None) for quantizer, *_ in seen[:8]]
    hooked = gradients(model, x, model)
    for first, second, value in zip(watched, hooked, expected, strict=True):
        assert torch.equal(first, value) and torch.allclose(second, value, rtol=1e-4, atol=1e-6)
    handles[0].remove()
    seen[0][0].register_forward_hook(lambda quantizer, inputs, y: 2 * y)  # and what a hook changes counts
    assert not torch.allclose(model(x), hooked[0])


class Doubled(LSQ):
    """A quantizer whose step is not what its parameters say."""

    @property
    def step(self) -> Tensor:
        return 2 * super().step


def test_a_step_of_its_own_counts() -> None:
    layer = quantized(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))[0]
    twin = Doubled(4)
    twin.start(layer.weight_quantizer.step.detach()[:1] / 2, 4, True)
    assert twin.operand(layer.weight) is None
    layer.weight_quantizer = twin
    x = torch.randn(8, 4)
    expected = F.linear(layer.input_quantizer(x), twin(layer.weight), layer.bias)
    assert torch.equal(layer(x), expected) and twin.step == twin.initial_step * 2


def test_autocast_rounds_to_its_dtype_once() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = quantized(network(), x)
    layer = model[2]
    inputs = torch.randn(4, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(inputs)
        weight, values = layer.weight_quantizer(layer.weight), layer.input_quantizer(inputs)
        expected = F.conv2d(values, weight, layer.bias, padding=1)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert values.dtype == torch.float32  # a quantizer of its own follows its input


def test_inside_a_compiled_module_without_a_graph_break() -> None:
    torch.compiler.reset()
    x = torch.randn(4, 3, 8, 8)
    model = quantized(network(), x)
    expected = gradients(model, x, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, value in zip(gradients(model, x, compiled), expected, strict=True):
        assert torch.allclose(got, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("quantizer", "read"), [("lsq", False), ("lsq+", False), ("apot", True)])
def test_compiled_modules_read_no_uniform_levels(quantizer: str, read: bool) -> None:
    torch.compiler.reset()
    x, names = torch.randn(4, 3, 8, 8), []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        names.extend(str(node.target) for node in module.graph.nodes if node.op in ("placeholder", "get_attr"))
        return module.forward

    torch.compile(quantized(network(), x, quantizer=quantizer), backend=backend, fullgraph=True)(x)
    assert any("initial_step" in name for name in names) and read == any("points" in name for name in names)


@pytest.mark.parametrize("quantizer", ["lsq", "lsq+", "apot"])
@pytest.mark.parametrize("layer", ["convolution", "linear"])
def test_the_step_of_data_learns_inside_a_compiled_module(layer: str, quantizer: str) -> None:
    torch.compiler.reset()
    x = torch.randn(4, 3, 8, 8)
    first = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)]
    model = nn.Sequential(*(first if layer == "convolution" else [nn.Flatten(), nn.Linear(192, 5), nn.Linear(5, 2)]))
    quantized(model, x, quantizer=quantizer)
    losses, found, flops = [], [], []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        forward(x).sum().backward()  # compiles
        model.zero_grad()
        losses.append(forward(x).square().mean())
        with FlopCounterMode(display=False) as counter:
            losses[-1].backward()
        flops.append(counter.get_total_flops())
        found.append([p.grad.clone() for p in model.parameters()])
    assert torch.allclose(*losses, rtol=1e-5)
    assert 0 < flops[1] <= flops[0]  # what needs no gradient may be computed in the forward pass
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("part", [1, 2**21], ids=["by parts", "whole"])
def test_what_data_gives_to_steps_in_all_ways(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PART", part)
    operation = Convolution((2, 1), (1, 0), (1, 2), False, (0, 0), 1)
    weight, x, *changes = torch.randn(5, 3, 3, 2), *(torch.randn(4, 3, 9, 8) for _ in range(3))
    grad, wanted = torch.randn_like(operation(x, weight, None)), (False, True, True)
    _, to_weight, to_bias = operation.backward(grad, x, weight, wanted)
    along = [(operation(change, weight, None) * grad).sum() for change in changes]
    for way in (operation.of_data, operation.of_data_at_once):
        *found, inner = way(grad, x, changes, weight, wanted)
        for expected, got in zip((to_weight, to_bias, *along), (*found, *inner), strict=True):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs_gradient", [True, False], ids=["input of a layer", "data"])
def test_frozen_weights_change_no_other_gradient(needs_gradient: bool) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3)), torch.randn(3, 4, 7, 7)
    quantized(model, x)
    (layer,) = model
    x.requires_grad_(needs_gradient)
    free = gradients(layer, x, layer)
    frozen = layer.weight, layer.weight_quantizer.relative_step
    for parameter in frozen:
        parameter.requires_grad_(False)
    kept = [not any(p is q for q in frozen) for p in layer.parameters()]
    for expected, got, same in zip(free, gradients(layer, x, layer), [True, *kept, True], strict=False):
        assert torch.equal(got, expected) if same else got is None


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
