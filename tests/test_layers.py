"""Quantized layers against torch's functional operators on quantized operands."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qinit import calibrate, prepare
from lightning_qinit.functional import fake_quantize
from lightning_qinit.insertion import QUANTIZED_LAYERS, quantized_layers, remove

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


def test_every_row_of_the_table_is_tried() -> None:
    assert {type(layer) for layer, _ in LAYERS.values()} == set(QUANTIZED_LAYERS)


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
    assert weight.step.numel() == (layer.weight.shape[swapped.output_axis] if per_channel else 1)
    expected = copy.deepcopy(layer)
    expected.weight.data = fake_quantize(layer.weight.data, weight.scale.detach(), weight.levels, axis)
    out = expected(fake_quantize(x, inputs.scale.detach(), inputs.levels))
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
    levels, step = only_weight.weight_quantizer.levels, only_weight.weight_quantizer.scale.detach()
    assert torch.allclose(only_weight(x), F.linear(x, fake_quantize(layer.weight.data, step, levels, 0), layer.bias))
    only_input = quantized(layer, x, weight_bits=None)[0]
    inputs = only_input.input_quantizer
    quantized_x = fake_quantize(x, inputs.scale.detach(), inputs.levels)
    assert torch.allclose(only_input(x), F.linear(quantized_x, layer.weight, layer.bias))


def test_transformer_layer_does_not_bypass_its_quantizers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)
    model = prepare(nn.Sequential(copy.deepcopy(layer)), weight_bits=2, activation_bits=2, first_last_bits=None)
    rows = calibrate(model, [x])
    assert [row.name for row in rows] == ["0.linear1.weight", "0.linear1.input", "0.linear2.weight", "0.linear2.input"]
    model.eval()
    called = []
    for name, layer in quantized_layers(model).items():
        for quantizer in layer.quantizers().values():
            # not a hook, which by itself would keep torch from its fused path
            quantize = quantizer.quantize
            quantizer.quantize = lambda *args, name=name, inner=quantize: called.append(name) or inner(*args)
    with torch.no_grad():
        model(x)
    assert called == ["0.linear1"] * 2 + ["0.linear2"] * 2


def test_attention_projections_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    prepare(model)
    assert list(quantized_layers(model)) == ["0"]


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
    assert [row.name for row in rows] == ["first.weight", "first.input"]
    assert rows[0].bits == 8  # the only layer is the first and the last
    assert model(ids, scale=2.0).shape == (10, 4)


def test_plain_modules_train_and_keep_their_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
    model[1].eval()
    prepare(model, weight_bits=2, overrides={"3": {"activation_bits": None}}, skip=[])
    calibrate(model, [torch.randn(16, 6) for _ in range(3)], step=lambda module, batch: module(batch))
    assert model.training and not model[1].training
    assert model[3].input_quantizer is None
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    steps = [q.step for layer in quantized_layers(model).values() for q in layer.quantizers().values()]
    before = [step.detach().clone() for step in steps]
    model(torch.randn(16, 6)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, steps, strict=True))
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
