"""What leaves training gives the answers of the fake-quantized module."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallNet, Tied
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_qinit import LSQ, calibrate, prepare
from lightning_qinit.export import (
    fold,
    format_size,
    integer_state_dict,
    load_integers,
    save_integers,
    size_report,
)
from lightning_qinit.export.packing import pack, unpack
from lightning_qinit.insertion import quantized_layers


class Attention(nn.Module):
    """Attention whose keys and values are one tensor, or another than in calibration."""

    def __init__(self, **settings: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(8, 5, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


SEQUENCE = torch.Size((4, 6, 8))
CASES: dict[str, tuple[Callable[[], nn.Module], torch.Size]] = {
    "small-net": (SmallNet, torch.Size((4, 1, 6, 6))),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 5, 3), nn.GELU(), nn.Conv1d(5, 3, 1)), SEQUENCE),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(6, 4, 3, groups=2), nn.ReLU()), SEQUENCE),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), torch.Size((2, 2, 3, 4, 5))),
    "attention": (Attention, SEQUENCE),
    "attention-apart": (lambda: Attention(kdim=8, vdim=8), SEQUENCE),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 11, batch_first=True), SEQUENCE),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "tied": (Tied, torch.Size((4, 6))),
    "bag": (lambda: nn.EmbeddingBag(10, 5), torch.Size((4, 6))),
}


def case(name: str, **settings: object) -> tuple[nn.Module, nn.Module, Tensor]:
    """The float module, the calibrated one in eval mode, and data."""
    torch.manual_seed(0)
    make, shape = CASES[name]
    x = torch.randint(10, shape) if name in ("tied", "bag") else torch.randn(shape)
    module = make()
    module.eval()
    quantized = copy.deepcopy(module)
    prepare(quantized, first_last_bits=None, **settings)
    calibrate(quantized, [x])
    return module, quantized.eval(), x


SETTINGS = [
    {"quantizer": "lsq", "weight_bits": 4, "activation_bits": 4},
    {"quantizer": "lsq", "weight_bits": 1, "activation_bits": 8, "per_channel": False},
    {"quantizer": "lsq+", "weight_bits": 3, "activation_bits": 3},
    {"quantizer": "apot", "weight_bits": 4, "activation_bits": 5},
    {"weight_bits": 2, "activation_bits": None},
    {"weight_bits": None, "activation_bits": 4},
]


def test_float_tensors_are_written_whatever_their_order_in_memory(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    prepare(model, skip=["0"])
    calibrate(model, [x])
    save_integers(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.allclose(load_integers(twin, tmp_path / "model.safetensors")(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("name", CASES)
def test_the_folded_module_and_the_one_loaded_from_integers_are_exact(name: str, settings: dict, tmp_path: Path):
    if settings["weight_bits"] is None and name in ("tied", "bag"):
        pytest.skip("an embedding has no input to quantize")
    if name == "encoder" and settings["activation_bits"] is None:
        pytest.skip("torch's fused path")
    float_module, module, x = case(name, **settings)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    folded = fold(module)
    save_integers(module, tmp_path / "model.safetensors")
    loaded = load_integers(float_module, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(folded(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert folded.state_dict().keys() == float_module.state_dict().keys()
    assert not any(layer.quantizers() for layer in quantized_layers(folded).values())


def test_the_folded_module_differs_from_the_float_one_where_the_quantized_one_does():
    float_module, module, x = case("small-net", weight_bits=2, activation_bits=2)
    with torch.no_grad():
        assert (fold(module)(x) - float_module(x)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_fold_exactly(dtype: torch.dtype):
    _, module, x = case("small-net", weight_bits=3, activation_bits=4)
    module.to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(fold(module)(x.to(dtype)), module(x.to(dtype)), rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", ["lsq", "lsq+", "apot"])
def test_what_is_not_a_number_stays_so(quantizer: str):
    module = nn.Sequential(nn.Linear(4, 3))
    calibrate(prepare(module, quantizer=quantizer), [torch.randn(5, 4)])
    x = torch.tensor([[0.5, torch.nan, torch.inf, -torch.inf]])
    torch.testing.assert_close(fold(module)[0].input_quantizer(x), module[0].input_quantizer(x), equal_nan=True)


def test_autocast_folds_exactly():
    _, module, x = case("small-net", weight_bits=3, activation_bits=4)
    folded = fold(module)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(folded(x), module(x), rtol=0, atol=0)


def test_layers_without_quantized_inputs_are_torchs_again():
    _, module, _ = case("small-net", weight_bits=4, activation_bits=None)
    kinds = {type(child).__module__.split(".")[0] for child in fold(module).modules()}
    assert kinds == {"torch", "conftest"}


def test_quantizers_that_are_switched_off_are_left_out():
    float_module, module, x = case("attention", weight_bits=4, activation_bits=4)
    module.attention.input_quantizer["key"].enabled = False
    module.attention.out_proj.weight_quantizer.enabled = False
    with torch.no_grad():
        torch.testing.assert_close(fold(module)(x), module(x), rtol=0, atol=0)
        loaded = load_integers(float_module, integer_state_dict(module))
        torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)


def test_an_encoder_loaded_from_integers_takes_padding():
    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    module, fresh = encoder(), encoder()
    x, padding = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [2]])

    def step(module: nn.Module, batch: Tensor) -> Tensor:
        return module(batch, src_key_padding_mask=padding)

    calibrate(prepare(module), [x], step)
    with torch.no_grad():
        loaded = load_integers(fresh, integer_state_dict(module))
        assert torch.equal(step(loaded, x), step(module.eval(), x))


def test_a_key_of_its_own_is_served_by_the_query():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    float_module = copy.deepcopy(module)
    x, y = torch.randn(2, *SEQUENCE)
    prepare(module, weight_bits=4, activation_bits=4)
    calibrate(module, [(x, x, x)])
    with torch.no_grad():
        expected = module.eval()(x, y, y)[0]
        torch.testing.assert_close(fold(module)(x, y, y)[0], expected, rtol=0, atol=0)
        loaded = load_integers(float_module, integer_state_dict(module))
        torch.testing.assert_close(loaded(x, y, y)[0], expected, rtol=0, atol=0)


def test_an_exported_program_runs_without_this_package(tmp_path: Path):
    for name in ("small-net", "attention"):
        for quantizer in ("lsq", "lsq+", "apot"):
            _, module, x = case(name, quantizer=quantizer, weight_bits=3, activation_bits=3)
            program = torch.export.export(fold(module), (x,))
            torch.export.save(program, tmp_path / f"{name}-{quantizer}.pt2")
            with torch.no_grad():
                torch.save((x, module(x)), tmp_path / f"{name}-{quantizer}.pt")
    script = """
import sys, pathlib, torch
sys.modules["lightning_qinit"] = None  # an import of it fails
for path in pathlib.Path(sys.argv[1]).glob("*.pt2"):
    x, expected = torch.load(path.with_suffix(".pt"))
    actual = torch.export.load(path).module()(x)
    assert torch.equal(actual, expected), (path.name, (actual - expected).abs().max())
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_packing_is_a_stream_of_bits(bits: int, values: list[int]):
    codes = torch.tensor(values, dtype=torch.uint8) & 2**bits - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(values) // 8) * bits
    assert torch.equal(unpack(packed, bits, len(values)), codes)
    stream = np.unpackbits(packed.numpy(), bitorder="little")[: bits * len(values)]  # an independent reading
    weights = 2 ** np.arange(bits)
    assert (stream.reshape(-1, bits) @ weights == codes.numpy()).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 11)])
def test_integers_of_every_width_say_what_the_weights_are(bits: int, shape: tuple[int, int]):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(*shape[::-1]))
    prepare(module, weight_bits=bits, activation_bits=None, first_last_bits=None)
    calibrate(module, [torch.randn(2, shape[1])])
    state = integer_state_dict(module)
    stream = np.unpackbits(state["0.weight.codes"].numpy(), bitorder="little")[: bits * shape[0] * shape[1]]
    codes = (stream.reshape(-1, bits) @ 2 ** np.arange(bits)).reshape(shape)
    levels = codes - state["0.weight.zero_point"].item() if bits > 1 else state["0.weight.levels"].numpy()[codes]
    weight = np.float32(levels) * state["0.weight.scale"].numpy()[:, None]
    assert (weight == fold(module)[0].weight.detach().numpy()).all()
    assert state["0.weight.layout"].tolist() == [bits, 0, *shape]


def test_the_size_report_counts_bytes(tmp_path: Path):
    _, module, _ = case("small-net", weight_bits=2, activation_bits=8)
    rows = size_report(module)
    weight = next(row for row in rows if row.name == "hidden.weight")
    assert (weight.bits, weight.float_bytes) == (2, 4 * 8 * 144)
    assert weight.bytes == 8 * 144 // 4 + 4 * 8 + 8 + 8 * 4  # codes, steps, zero point, layout
    assert rows[-1].float_bytes == sum(t.nbytes for t in SmallNet().state_dict().values())
    assert rows[-1].bytes == sum(t.nbytes for t in integer_state_dict(module).values())
    assert f"{weight.float_bytes / weight.bytes:.2f}" in format_size(rows)


class Own(LSQ):
    def quantize(self, x: Tensor, scale: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
        return super().quantize(x, scale, elements, dtype).sin()


def test_what_cannot_be_exported_is_named():
    with pytest.raises(ValueError, match="Sequential has no calibrated quantizer"):
        fold(prepare(nn.Sequential(nn.Linear(3, 3))))
    module = prepare(nn.Sequential(nn.Linear(3, 3)), activation_quantizer=Own, first_last_bits=None)
    calibrate(module, [torch.randn(4, 3)])
    with pytest.raises(ValueError, match="`0` cannot be exported: its Own overrides"):
        fold(module)
    module = prepare(nn.Sequential(nn.Linear(3, 3)), weight_quantizer=Own, first_last_bits=None)
    calibrate(module, [torch.randn(4, 3)])
    with pytest.raises(ValueError, match="`0.weight` cannot be exported: what its Own gives is no level"):
        integer_state_dict(module)
    module = prepare(nn.Sequential(nn.Embedding(10, 3, max_norm=1.0)), first_last_bits=None)
    calibrate(module, [torch.randint(10, (4,))])
    with pytest.raises(ValueError, match="`0` cannot be exported: its `max_norm`"):
        fold(module)
    module = prepare(nn.Sequential(nn.Linear(3, 3)), first_last_bits=None)
    nn.utils.parametrizations.weight_norm(module[0])
    calibrate(module, [torch.randn(4, 3)])
    with pytest.raises(ValueError, match="`0` cannot be exported: it is parametrized"):
        fold(module)
    nn.utils.parametrize.remove_parametrizations(module[0], "weight")
    assert torch.equal(fold(module)[0].weight, module[0].quantize_weight(module[0].weight))
    for hook in (nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):
        module = prepare(nn.Sequential(nn.Linear(3, 3)), first_last_bits=None)
        hook(module[0])
        calibrate(module, [torch.randn(4, 3)])
        with pytest.raises(ValueError, match="`0` cannot be exported: a hook recomputes its weight"):
            fold(module)
    prune.remove(module[0], "weight")
    assert torch.equal(fold(module)[0].weight, module[0].quantize_weight(module[0].weight))
    refusal = "`0.input_quantizer` of Sequential learns no more, since the module was folded"
    with pytest.raises(ValueError, match=refusal):
        prepare(fold(module))
    with pytest.raises(ValueError, match="`module` must be the float model"):
        load_integers(module, {})


def test_an_integer_state_that_is_not_whole_is_refused():
    torch.manual_seed(0)
    module = prepare(nn.Sequential(nn.Linear(5, 3)))
    calibrate(module, [torch.randn(8, 5)])
    state = integer_state_dict(module)
    for key, change, message in (
        (
            "0.weight.scale",
            None,
            r"The state of '0.weight' must hold codes, scale, layout and .*, got \['codes', 'zero_p",
        ),
        ("0.weight.layout", torch.tensor([4, 0, 3, 5]), "`0.weight.codes` must be 8 bytes, 15 codes of 4 bits, got 16"),
    ):
        damaged = {name: value for name, value in state.items() if name != key}
        if change is not None:
            damaged[key] = change
        with pytest.raises(RuntimeError, match=message):
            load_integers(nn.Sequential(nn.Linear(5, 3)), damaged)


@pytest.mark.filterwarnings("ignore:(?s)The tensor attributes? .*_flat_weights")  # for float ones too
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_recurrent_layers_stay_quantized_where_their_parameters_are_replaced(name: str):
    # torch rebuilds their list of weights then, which once put the float ones back
    float_module, module, x = case(name, weight_bits=2, activation_bits=None)
    with torch.no_grad():
        expected = module(x)
        replaced = {key: value.clone() for key, value in module.named_parameters()}
        called = torch.func.functional_call(module, replaced, (x,))
        exported = torch.export.export(module, (x,)).module()(x)
        assert (float_module(x) - expected).abs().max() > 1e-3
    # torch's own result differs in the last bits where weights are not Parameters
    torch.testing.assert_close(called, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-6)
