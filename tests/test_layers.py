"""Quantized layers against torch's functional operators on quantized operands."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import Tied
from torch import nn

from lightning_qinit import Quantizer, calibrate, prepare
from lightning_qinit.calibration import observe
from lightning_qinit.functional import fake_quantize
from lightning_qinit.insertion import QUANTIZED_LAYERS, QuantizedLayer, float_parameters, quantized_layers, remove

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear, no bias, sequence": (nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    "conv2d, reflect": (nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"), (2, 3, 8, 8)),
    "conv2d, depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 5, 5)),
    "transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
    "transpose2d": (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 4)),
    "transpose3d": (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
}


def quantized(layer: nn.Module, *batches: torch.Tensor, **settings) -> nn.Module:
    model = prepare(nn.Sequential(copy.deepcopy(layer)), **{"first_last_bits": None, **settings})
    calibrate(model, batches)
    return model


EMBEDDINGS = {
    "embedding": (nn.Embedding(10, 6, padding_idx=0), (torch.randint(10, (3, 5)),)),
    "embedding, max_norm": (nn.Embedding(10, 6, max_norm=1.0), (torch.arange(10),)),
    "bag": (nn.EmbeddingBag(10, 6), (torch.randint(10, (3, 5)),)),
    "bag, offsets": (
        nn.EmbeddingBag(10, 6, mode="sum"),
        (torch.randint(10, (8,)), torch.tensor([0, 3]), torch.rand(8)),
    ),
}
RECURRENT = {
    "lstm": nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, projection": nn.LSTM(6, 5, proj_size=3, bias=False),
    "gru": nn.GRU(6, 5),
    "rnn": nn.RNN(6, 5, nonlinearity="relu"),
}
ATTENTION = {
    "self": (nn.MultiheadAttention(8, 2), 1),
    "self, batch first": (nn.MultiheadAttention(8, 2, batch_first=True, bias=False), 1),
    "memory": (nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True), 2),
    "other widths": (nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True), 3),
}


def test_every_row_of_the_table_is_tried() -> None:
    one_weight = [layer for layer, _ in [*LAYERS.values(), *EMBEDDINGS.values()]]
    attention = [layer for layer, _ in ATTENTION.values()]
    tried = {type(layer) for layer in [*one_weight, *RECURRENT.values(), *attention, attention[0].out_proj]}
    assert tried == set(QUANTIZED_LAYERS)


def levels_of(values: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """The values on the levels of a quantizer, by the reference rounding."""
    return fake_quantize(values.detach(), quantizer.step.detach(), quantizer.levels, quantizer.channel_axis)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name: str) -> None:
    layer, inputs = EMBEDDINGS[name]
    layer = copy.deepcopy(layer)
    model = prepare(copy.deepcopy(layer), weight_bits=3, first_last_bits=None)
    calibrate(model, [inputs])
    assert list(model.quantizers()) == ["weight"]
    assert model.weight_quantizer.initial_step.numel() == 10
    out = model(*inputs)
    expected = copy.deepcopy(layer)
    expected(*inputs)  # renormalizes what is looked up, where there is a greatest norm
    assert torch.equal(model.weight, expected.weight)
    expected.weight.data, expected.max_norm = levels_of(expected.weight, model.weight_quantizer), None
    assert torch.allclose(out, expected(*inputs), rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    if layer.padding_idx is not None:
        assert not model.weight.grad[layer.padding_idx].any()
    assert model.weight.grad.isfinite().all() and model.weight_quantizer.relative_step.grad.isfinite().all()


def test_sparse_embeddings_stay_in_float() -> None:
    model = prepare(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4)))
    assert list(quantized_layers(model)) == ["1"]
    assert float_parameters(model) == ["0.weight"]


def test_complex_layers_stay_in_float() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64)))
    assert list(quantized_layers(model)) == ["0"]
    assert float_parameters(model) == ["1.weight"]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str, packed: bool) -> None:
    layer, x = copy.deepcopy(RECURRENT[name]), torch.randn(4, 3, 6)
    if packed:
        lengths = torch.tensor([4, 2, 1] if not layer.batch_first else [3, 2, 2, 1])
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=layer.batch_first)
    model = prepare(copy.deepcopy(layer), weight_bits=3, activation_bits=4, first_last_bits=None)
    calibrate(model, [x], step=lambda module, batch: module(batch))
    weights = [name for name, _ in layer.named_parameters() if name.startswith("weight")]
    assert list(model.quantizers()) == [*weights, "input"]
    for weight in weights:
        getattr(layer, weight).data = levels_of(getattr(layer, weight), model.quantizers()[weight])
    if packed:
        quantized_x = x._replace(data=levels_of(x.data, model.input_quantizer))
        got, expected = model(x)[0].data, layer(quantized_x)[0].data
    else:
        got, expected = model(x)[0], layer(levels_of(x, model.input_quantizer))[0]
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    got.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x)[0].data, got)
    remove(model)
    assert type(model) is type(layer)
    model(x)


def test_gradient_scale_of_a_sequence_counts_one_sample() -> None:
    model = prepare(nn.GRU(6, 5), weight_bits=None, first_last_bits=None)
    sequence = torch.rand(4, 1, 6)
    calibrate(model, [(sequence,)])
    quantizer = model.input_quantizer
    quantizer(sequence).sum().backward()
    one, quantizer.relative_step.grad = float(quantizer.relative_step.grad), None
    quantizer(sequence.expand(4, 8, 6)).sum().backward()
    assert float(quantizer.relative_step.grad) == pytest.approx(8 * one)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    layer, inputs = ATTENTION[name]
    layer = copy.deepcopy(layer)
    widths = [layer.embed_dim, layer.kdim, layer.vdim][:inputs]
    tensors = [torch.randn(5, 5, width) for width in widths]
    query, key, value = (tensors * 3)[:3] if inputs == 1 else [tensors[0], tensors[1], tensors[-1]]
    given = (query, key, value)
    mask = {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "need_weights": inputs == 2}
    model = prepare(copy.deepcopy(layer), weight_bits=4, activation_bits=4, first_last_bits=None)
    calibrate(model, [given], step=lambda module, batch: module(*batch, **mask))
    assert model.out_proj.input_quantizer.is_calibrated
    seen = [n for n, q in model.input_quantizers().items() if q.is_calibrated]
    assert seen == ["query", "key", "value"][:inputs]
    for weight, quantizer in model.weight_quantizers().items():
        attribute = "in_proj_weight" if weight == "weight" else weight
        getattr(layer, attribute).data = levels_of(getattr(layer, attribute), quantizer)
    quantizers = model.input_quantizers()
    used = [quantizers[n] for n in (["query"] * 3, ["query", "key", "key"], list(quantizers))[inputs - 1]]
    bias = layer.out_proj.bias
    layer.out_proj.weight.data = torch.eye(8)
    layer.out_proj.bias = None
    attended, expected_weights = layer(*(levels_of(x, q) for x, q in zip(given, used, strict=True)), **mask)
    projection = levels_of(model.out_proj.weight, model.out_proj.weight_quantizer)
    expected = F.linear(levels_of(attended, model.out_proj.input_quantizer), projection, bias)
    got, got_weights = model(*given, **mask)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert (got_weights is None) == (expected_weights is None)
    got.square().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_float_layer_on_quantized_operands(name: str, per_channel: bool) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    model = quantized(layer, x, weight_bits=3, activation_bits=4, per_channel=per_channel)
    swapped = model[0]
    assert isinstance(swapped, type(layer))
    weight, inputs = swapped.weight_quantizer, swapped.input_quantizer
    axis = swapped.output_axis if per_channel else None
    assert weight.initial_step.numel() == (layer.weight.shape[swapped.output_axis] if per_channel else 1)
    expected = copy.deepcopy(layer)
    expected.weight.data = fake_quantize(layer.weight.data, weight.step.detach(), weight.levels, axis)
    out = expected(fake_quantize(x, inputs.step.detach(), inputs.levels))
    assert torch.allclose(model(x), out, rtol=1e-5, atol=1e-6)
    model(x).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())


def test_transposed_convolution_takes_an_output_size() -> None:
    layer = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 4, 4)
    model = quantized(layer, x)
    assert model[0](x, output_size=[8, 8]).shape == (2, 2, 8, 8)


def test_deepcopy_and_pickle_are_independent_twins() -> None:
    x = torch.randn(4, 6)
    model = quantized(nn.Linear(6, 5), x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            twin[0].weight.zero_()
            twin[0].bias.zero_()
        assert not twin(x).any() and model(x).any()


def test_weights_or_inputs_alone() -> None:
    x, layer = torch.randn(4, 6), nn.Linear(6, 5)
    only_weight = quantized(layer, x, activation_bits=None)[0]
    assert only_weight.input_quantizer is None and list(only_weight.quantizers()) == ["weight"]
    levels, step = only_weight.weight_quantizer.levels, only_weight.weight_quantizer.step.detach()
    assert torch.allclose(only_weight(x), F.linear(x, fake_quantize(layer.weight.data, step, levels, 0), layer.bias))
    only_input = quantized(layer, x, weight_bits=None)[0]
    inputs = only_input.input_quantizer
    quantized_x = fake_quantize(x, inputs.step.detach(), inputs.levels)
    assert torch.allclose(only_input(x), F.linear(quantized_x, layer.weight, layer.bias))


def test_transformer_does_not_bypass_its_quantizers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False, False, False, True, True]])
    model = prepare(encoder, weight_bits=2, activation_bits=2, first_last_bits=None)
    calibrate(model, [{"src": x, "src_key_padding_mask": padding}])
    model.eval()
    called = []
    for name, layer in quantized_layers(model).items():
        for what, quantizer in layer.quantizers().items():
            # not a hook, which by itself would keep torch from its fused path
            def counted(*args: object, name: str = f"{name}.{what}", inner=quantizer.quantize) -> torch.Tensor:
                called.append(name)
                return inner(*args)

            quantizer.quantize = counted
    with torch.no_grad():
        model(x, src_key_padding_mask=padding)
    layers = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    inputs = ("query", "input", "input", "input")
    assert called == [
        f"layers.{i}.{layer}.{what}"
        for i in range(2)
        for layer, name in zip(layers, inputs, strict=True)
        for what in (name, "weight")
    ]
    remove(encoder)
    assert encoder.use_nested_tensor and type(encoder.layers[0].self_attn.out_proj).__module__.startswith("torch")


def test_attention_left_in_float_keeps_its_projection() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    prepare(model, skip=["1"])
    assert list(quantized_layers(model)) == ["0"]


def test_tied_weights_share_one_quantizer() -> None:
    model = prepare(Tied(4), weight_bits=3)
    assert model.head.weight_quantizer is model.table.weight_quantizer
    rows = calibrate(model, [torch.arange(10)])
    assert [(row.name, row.bits) for row in rows] == [("table.weight", 8), ("head.input", 8)]
    assert len(list(model.parameters())) == 3  # the weight, its step, the step of the input
    used = levels_of(model.table.weight, model.table.weight_quantizer)
    x = levels_of(used, model.head.input_quantizer)
    assert torch.allclose(model(torch.arange(10)), F.linear(x, used), atol=1e-6)
    late = Tied(4)
    late.head.weight = nn.Parameter(torch.randn(10, 4))
    prepare(late, weight_bits=3)
    late.head.weight = late.table.weight  # tied once the layers are quantized
    prepare(late, weight_bits=3)
    assert late.head.weight_quantizer is late.table.weight_quantizer
    twin = copy.deepcopy(model)
    assert twin.head.weight_quantizer is twin.table.weight_quantizer
    prepare(Tied(4), overrides={"head": {"activation_bits": 8}})  # concerns an input, which is not shared
    prepare(Tied(4), overrides={"head": {"quantizer": Quantizer.registry["lsq"]}})  # the same as "lsq"
    with pytest.raises(ValueError, match="layers 'table' and 'head' share a weight, so the settings of weights"):
        prepare(Tied(4), overrides={"head": {"weight_bits": 8}})


def test_attention_on_other_tensors_than_in_calibration() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2, 8)
    model = prepare(nn.MultiheadAttention(8, 2), weight_bits=2, activation_bits=2, first_last_bits=None)
    calibrate(model, [(x, x, x)], step=lambda module, batch: module(*batch))
    expected, _ = model(x, x, x)
    cached, _ = model(x, x.clone(), x.clone())  # a cache of keys and values: the same values in tensors of their own
    assert torch.allclose(cached, expected, atol=1e-6)


def test_gradient_scale_of_packed_sequences_counts_one_sample() -> None:
    x, grads = torch.rand(7, 3, 6), []
    for packed in (False, True):
        torch.manual_seed(0)
        model = prepare(nn.GRU(6, 5), weight_bits=None, first_last_bits=None)
        given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 7, 7])) if packed else x
        calibrate(model, [x], step=lambda module, batch: module(batch))
        model(given)[1].sum().backward()
        grads.append(model.input_quantizer.relative_step.grad)
    assert torch.allclose(*grads, rtol=1e-5)


def test_a_layer_type_of_ones_own() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x @ self.kernel.T

    class QuantScaled(QuantizedLayer, Scaled):
        float_class = Scaled
        linear = True

        @classmethod
        def weight_names(cls, layer: nn.Module) -> tuple[str, ...]:
            return ("kernel",)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.quantize_input(x) @ self.quantize_weight(self.kernel).T

    QUANTIZED_LAYERS[Scaled] = QuantScaled
    try:
        x, kernel = torch.randn(3, 6), Scaled()
        model = quantized(copy.deepcopy(kernel), x)[0]
        weighted = prepare(nn.Sequential(copy.deepcopy(kernel)), weight_bits=3, first_last_bits=None)
        with observe(quantized_layers(weighted), "hessian") as seen, torch.no_grad():
            weighted(x)
    finally:
        del QUANTIZED_LAYERS[Scaled]
    importance = seen.weight_importance["0.weight"] / seen.weight_importance["0.weight"].mean()
    squares = x.double().square().mean(0).expand(5, 6)
    assert torch.allclose(importance, squares / squares.mean(), rtol=1e-5)
    expected = 2 * levels_of(x, model.input_quantizer) @ levels_of(kernel.kernel, model.weight_quantizer).T
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_shapes_are_found_on_the_meta_device() -> None:
    model = quantized(nn.Linear(6, 5), torch.randn(3, 6)).to("meta")
    assert model(torch.randn(7, 6, device="meta")).shape == (7, 5)


def test_shared_layer_and_integer_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.first = self.second = nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            return self.second(self.first(self.table(ids)) * scale)

    model, ids = prepare(Twice()), torch.arange(10)
    rows = calibrate(model, [{"ids": ids, "scale": 2.0}])
    assert [(row.name, row.bits) for row in rows] == [("table.weight", 8), ("first.weight", 8), ("first.input", 8)]
    assert model(ids, scale=2.0).shape == (10, 4)


def test_plain_modules_train_and_keep_their_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
    model[1].eval()
    prepare(model, weight_bits=2, overrides={"3": {"activation_bits": None}}, skip=[])
    calibrate(model, [torch.randn(16, 6) for _ in range(3)], step=lambda module, batch: module(batch))
    assert model.training and not model[1].training
    assert model[3].input_quantizer is None
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    quantizers = [q for layer in quantized_layers(model).values() for q in layer.quantizers().values()]
    before = [quantizer.step.detach() for quantizer in quantizers]
    model(torch.randn(16, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(step, q.step) for step, q in zip(before, quantizers, strict=True))
    remove(model)
    assert not quantized_layers(model) and not any("quantizer" in name for name in model.state_dict())


def test_dead_channels_take_the_largest_step() -> None:
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[2] = 0
    model = quantized(layer, torch.randn(4, 6))
    steps = model[0].weight_quantizer.step
    assert float(steps[2].detach()) == float(steps.detach().max()) > 0
    with pytest.warns(UserWarning, match="saw only zeros in 0.input"):
        silent = quantized(nn.Linear(6, 5), torch.zeros(4, 6))
    assert silent[0].input_quantizer.step.tolist() == [1 / 8]  # signed, and reaches to 1
