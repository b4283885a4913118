"""Layers that keep no quantized values against those that do."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lightning_qinit import calibrate, prepare
from lightning_qinit.insertion import quantized_layers
from lightning_qinit.insertion.layers.one_weight import PRODUCT
from lightning_qinit.quantizers import LSQ, Quantizer
from lightning_qinit.quantizers import operation as operations
from lightning_qinit.quantizers.fused import release_scratch
from lightning_qinit.quantizers.operation import Convolution


@pytest.fixture(autouse=True)
def _small_images_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "LARGE", 1)


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
    "conv2d, many channels": (lambda: nn.Conv2d(40, 24, 3, padding=1, groups=2), (2, 40, 9, 9)),
    "conv2d, depthwise": (lambda: nn.Conv2d(20, 20, (3, 2), bias=False, groups=20), (2, 20, 48, 47)),
    "conv2d, pointwise": (lambda: nn.Conv2d(16, 5, 1, stride=2), (1, 16, 9, 5)),
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
    for kernels_ in ("eager", "compiled"):
        layer.weight_quantizer.kernels = layer.input_quantizer.kernels = kernels_
        for got, value in zip(gradients(layer, x, layer), expected, strict=True):
            assert torch.allclose(got, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
            assert got.is_contiguous()


@pytest.mark.parametrize("first", ["channels first", "channels last"])
@pytest.mark.parametrize(("channels", "large", "turned"), [(3, 1, False), (16, 10_000, False), (16, 1, True)])
def test_images_lie_as_they_do_in_float(
    channels: int, large: int, turned: bool, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "LARGE", large)
    layout = torch.contiguous_format if first == "channels first" else torch.channels_last
    x = torch.randn(2, channels, 7, 8).to(memory_format=layout)
    layer, twin = nn.Conv2d(channels, 6, 3), nn.Conv2d(channels, 6, 3)
    (layer,) = quantized(nn.Sequential(layer), x)
    lie, seen = [], []
    layer.input_quantizer.watch = lambda quantizer, x, y: seen.append(
        y.is_contiguous(memory_format=torch.channels_last)
    )
    for conv in (layer, twin):
        leaf = x.clone().requires_grad_()
        out = conv(leaf)
        out.sin().sum().backward()
        lie.append((out.stride(), leaf.grad.stride(), conv.weight.grad.stride()))
    assert lie[0] == lie[1]
    faster = turned and torch.backends.mkldnn.is_available()
    assert seen == [faster or layout == torch.channels_last]  # inside of the layer


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", [nn.Conv2d(16, 6, 3), nn.ConvTranspose2d(16, 6, 3), nn.Conv2d(16, 6, 3, padding=1)])
def test_parts_of_images_lie_as_they_do_in_float(layer: nn.Module, layout: torch.memory_format, kernels: str) -> None:
    layer, twin = copy.deepcopy(layer), copy.deepcopy(layer)
    layer.padding_mode = twin.padding_mode = "reflect" if layer.padding == (1, 1) else "zeros"
    part = torch.randn(2, 32, 7, 8).to(memory_format=layout).chunk(2, 1)[1]  # with gaps in memory
    (layer,) = quantized(nn.Sequential(layer), part, kernels=kernels)
    assert layer(part).stride() == twin(part).stride()


@pytest.mark.parametrize("groups", [1, 24])
def test_dilated_convolutions_learn_in_bfloat16(groups: int) -> None:
    """With channels last torch finds a wrong gradient to the weight there."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=groups), torch.randn(4, 24, 30, 30)
    (layer,) = quantized(nn.Sequential(layer), x)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = layer(x)
        out.float().sin().sum().backward()
        found.append(layer.weight.grad.clone())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.05


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

    def to_another_order(kept: Tensor) -> Tensor:
        nonlocal packed
        packed += kept.numel()
        return kept.detach().contiguous().clone()

    last = x.to(memory_format=torch.channels_last)
    expected = gradients(model, last, model)
    with torch.autograd.graph.saved_tensors_hooks(to_another_order, lambda kept: kept):
        got = gradients(model, last, model)
    assert packed > 2 * 4 * 16 * 64
    for value, wanted in zip(got, expected, strict=True):
        assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("of", "atol"), [("input", 1e-6), ("step of data", 1e-3)])  # of up to 700
def test_second_derivatives(of: str, atol: float) -> None:
    model = quantized(network(), torch.randn(4, 3, 8, 8))
    layers = [model[0], model[2]]

    def penalty(calls: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(4, 3, 8, 8, requires_grad=of == "input")
        out = calls[1](calls[0](x).tanh()).tanh().sum()
        leaf = x if of == "input" else layers[0].input_quantizer.relative_step
        (gradient,) = torch.autograd.grad(out, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [layer.weight for layer in layers])

    for kernel in ("eager", "compiled"):
        for layer in layers:
            layer.weight_quantizer.kernels = layer.input_quantizer.kernels = kernel
        for got, value in zip(penalty(layers), penalty([by_hand(layer) for layer in layers]), strict=True):
            assert torch.allclose(got, value, rtol=1e-4, atol=atol) and bool(value.abs().max() > 0)


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
    x = torch.randn(4, 3, 8, 8) if layer == "convolution" else torch.randn(4, 192)
    first = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)]
    model = nn.Sequential(*(first if layer == "convolution" else [nn.Linear(192, 5), nn.Linear(5, 2)]))
    quantized(model, x, quantizer=quantizer)
    losses, found, made = [], [], []

    def backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.convolution_backward.default, torch.ops.aten.mm.default):
                values = node.meta["val"]
                made.extend(v.shape for v in (values if isinstance(values, tuple) else [values]) if v is not None)
        return boxed_nop(graph, inputs)

    for forward in (
        model,
        torch.compile(model, backend=aot_autograd(fw_compiler=boxed_nop, bw_compiler=backward), fullgraph=True),
    ):
        model.zero_grad()
        losses.append(forward(x).square().mean())
        losses[-1].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert torch.allclose(*losses, rtol=1e-5)
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert made and x.shape not in made  # the gradient to the data, of which the step's would be the sum


@pytest.mark.parametrize(
    ("quantizer", "dynamic"), [("lsq", None), ("lsq", True), ("lsq+", True), ("apot", True), ("pact", True)]
)
def test_inside_a_module_compiled_for_any_size(quantizer: str, dynamic: bool | None) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(2), nn.Linear(16, 4))
    quantized(model, torch.randn(4, 3, 8, 8), quantizer=quantizer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in (4, 7, 9):
        x, found = torch.randn(batch, 3, 8, 8), []
        for forward in (model, compiled):
            model.zero_grad()
            forward(x).square().mean().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for expected, got in zip(*found, strict=True):
            assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("part", [1, 2**21], ids=["by parts", "whole"])
def test_what_data_gives_to_steps_in_all_ways(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations.PARTS, "cpu", part)
    operation = Convolution((2, 1), (1, 0), (1, 2), False, (0, 0), 1)
    weight, x, *changes = torch.randn(5, 3, 3, 2), *(torch.randn(4, 3, 9, 8) for _ in range(3))
    grad = torch.randn_like(operation(x, weight, None))
    _, to_weight, to_bias = operation.backward(grad, x, weight, (False, True, True))
    along = [(operation(change, weight, None) * grad).sum() for change in changes]
    for *found, inner in (
        operation.of_data(grad, x, changes, weight, True, True),
        operation.at_once(grad, x, changes, weight, True),
    ):
        for expected, got in zip((to_weight, to_bias, *along), (*found, *inner), strict=True):
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_change_beyond_half_precision() -> None:
    weight, change, grad = torch.full((1, 1000), 0.5), torch.full((2, 1000), 255.0), torch.tensor([[0.5], [-0.25]])
    *_, (inner,) = PRODUCT.of_data(grad.half(), change.half(), [change.half()], weight.half(), False, False)
    assert inner == 0.25 * 127_500


@pytest.mark.parametrize("frozen", [("weight", "step"), ("weight", "step", "bias"), ("weight",)], ids=" ".join)
@pytest.mark.parametrize("needs_gradient", [True, False], ids=["input of a layer", "data"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["linear, sequence", "conv2d", "conv2d, many channels", "transposed"])
def test_frozen_parameters_change_no_other_gradient(
    name: str, autocast: bool, needs_gradient: bool, frozen: tuple
) -> None:
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make()), torch.randn(shape)
    quantized(model, x)
    (layer,) = model
    x.requires_grad_(needs_gradient)
    parts = {"weight": layer.weight, "step": layer.weight_quantizer.relative_step, "bias": layer.bias}
    stopped = [id(parts[part]) for part in frozen]

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=autocast):
            return layer(x)

    free = gradients(layer, x, call)
    for parameter in layer.parameters():
        parameter.requires_grad_(id(parameter) not in stopped)
    left = [True, *(id(p) not in stopped for p in layer.parameters()), *([True] if needs_gradient else [])]
    for expected, got, same in zip(free, gradients(layer, x, call), left, strict=True):
        assert got is None if not same else torch.allclose(got, expected, rtol=1e-5)


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
