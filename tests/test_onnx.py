"""onnxruntime gives the answers of the fake-quantized module."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import onnx
import onnxruntime
import pytest
import torch
from conftest import SmallNet, loader, small_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from test_export import CASES, SETTINGS, case
from torch import Tensor, nn
from torchvision import models

from lightning_qinit import QuantInitCallback, calibrate, load_from_checkpoint, prepare
from lightning_qinit.export import export_onnx, fold, load_integers, snap_offsets


def run(path: Path, *inputs: Tensor, optimized: bool = False) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, named)[0])


def types(path: Path) -> set[str]:
    """Integer types of the tensors that the file holds, those of shapes and indices aside."""
    kinds = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in onnx.load(path).graph.initializer}
    return kinds - {"FLOAT", "INT64", "INT32", "BOOL"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, settings) for name in CASES for settings in SETTINGS[2:5]]
    + [(name, SETTINGS[0]) for name in ("small-net", "lstm", "attention")],  # weights alone
    ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part.values())),
)
def test_onnxruntime_computes_what_the_module_does(name: str, settings: dict, tmp_path: Path):
    if settings.get("quantizer") == "apot":
        settings = {**settings, "activation_quantizer": "lsq"}
    _, module, x = case(name, **settings)
    report = export_onnx(module, x, tmp_path / "model.onnx")
    assert bool(report.zero_points) == (settings.get("quantizer") == "lsq+" and name != "bag")
    with torch.no_grad():
        before = module(x)
        assert snap_offsets(module) == report.zero_points
        expected = module(x)
    if report.zero_points:
        change = (expected - before).double().norm() / before.double().norm()
        assert report.change == pytest.approx(float(change), rel=1e-6)
    # sums in another order, of up to 144 products: a few roundings of float32
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), expected, rtol=1e-5, atol=1e-5)
    float_module, _, _ = case(name, **settings)
    with torch.no_grad():
        assert (float_module(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("bits", "expected"), [(2, "INT4"), (4, "INT4"), (5, "INT8"), (8, "INT8")])
def test_weights_are_stored_in_the_narrowest_type(bits: int, expected: str, tmp_path: Path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(300, 200))  # more than what the exporter folds as a constant by itself
    prepare(module, weight_bits=bits, activation_bits=None, first_last_bits=None)
    x = torch.randn(2, 300)
    calibrate(module, [x])
    export_onnx(module, x, tmp_path / "model.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    assert types(tmp_path / "model.onnx") == {expected}
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()  # no traces of where it was written
    stored = (tmp_path / "model.onnx").stat().st_size
    assert stored < 200 * 300 * int(expected[-1]) // 8 + 4000  # steps, biases and the graph
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "model.onnx", x), module.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_zero_points_stay_where_they_are_in_further_training():
    _, module, x = case("conv1d", quantizer="lsq+", weight_bits=4, activation_bits=4)
    points = snap_offsets(module)
    assert set(points) == {"0.input", "2.input"}
    quantizer = module[0].input_quantizer
    assert float(quantizer.offset / quantizer.step) == pytest.approx(-points["0.input"], rel=1e-5)
    before = quantizer.step.clone(), quantizer.offset.clone()
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), 0.1)
    module.train()(x).square().mean().backward()
    optimizer.step()
    assert torch.equal(quantizer.step, before[0]) and torch.equal(quantizer.offset, before[1])
    assert snap_offsets(module) == points


def test_a_zero_point_far_from_the_codes_is_brought_within_8_bits(tmp_path: Path):
    torch.manual_seed(0)
    module = prepare(nn.Sequential(nn.Linear(6, 4)), quantizer="lsq+", activation_bits=4, first_last_bits=None)
    x = torch.rand(64, 6) + 5  # at a step of 1/15, 75 of them from 0
    calibrate(module, [x])
    report = export_onnx(module, x, tmp_path / "model.onnx")
    assert report.zero_points["0.input"] < -50 and report.change < 0.01
    with torch.no_grad():
        snap_offsets(module)
        torch.testing.assert_close(run(tmp_path / "model.onnx", x), module.eval()(x), rtol=1e-5, atol=1e-5)
    module[0].input_quantizer.initial_offset.add_(100)  # now 1600 of them
    assert snap_offsets(module)["0.input"] == 15 - 255


def test_options_reach_the_exporter_and_arguments_may_be_named(tmp_path: Path):
    _, module, x = case("small-net", weight_bits=4, activation_bits=4)
    batch = torch.export.Dim("batch")
    export_onnx(module, {"x": x}, tmp_path / "model.onnx", dynamic_shapes={"x": {0: batch}}, output_names=["logits"])
    more = torch.cat((x, x + 0.1, x - 0.1))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "model.onnx", more), module(more), rtol=1e-5, atol=1e-5)
    assert [entry.name for entry in onnx.load(tmp_path / "model.onnx").graph.output] == ["logits"]


def test_the_optimized_graph_agrees_but_for_rounding(tmp_path: Path):
    _, module, x = case("small-net", weight_bits=8, activation_bits=8)
    export_onnx(module, x, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = module(x)
    assert (run(tmp_path / "model.onnx", x, optimized=True) - expected).abs().max() < 0.05 * expected.abs().max()


def test_inputs_whose_levels_are_no_integers_are_refused_before_anything_is_written(tmp_path: Path):
    _, module, x = case("small-net", quantizer="apot", weight_bits=4, activation_bits=4)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="`stem.input` cannot be exported: the levels of its APoT are not consecutive"):
        export_onnx(module, x, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


class WithExample(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1, 6, 6)


def trainer(tmp_path: Path, callback: QuantInitCallback, **settings: object) -> pl.Trainer:
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=tmp_path, callbacks=[callback, checkpoints], **quiet | settings)


@pytest.mark.parametrize("name", ["out/model.onnx", "out/model.safetensors"])
def test_the_callback_exports_the_best_checkpoint(name: str, tmp_path: Path):
    pl.seed_everything(0)
    callback = QuantInitCallback(weight_bits=3, activation_bits=3, export=str(tmp_path / name), print_report=False)
    module = WithExample()
    module.learning_rate = 0.5  # so that the last epoch is not the best
    fit = trainer(tmp_path, callback, max_epochs=6)
    fit.fit(module, loader(shuffle=False), loader(shuffle=False))
    best = load_from_checkpoint(WithExample, fit.checkpoint_callback.best_model_path).eval()
    x = small_data(1)[0][0][None]
    with torch.no_grad():
        expected = best(x)
        assert (module.eval()(x) - expected).abs().max() > 1e-3
        if name.endswith("onnx"):
            actual = run(tmp_path / name, x)
        else:
            actual = load_integers(WithExample(), tmp_path / name)(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_export_heeds_how_a_module_saves_and_loads(tmp_path: Path):
    class Encoder(WithExample):
        """Its frozen part is in no checkpoint, and the rest under other names."""

        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.strict_loading = nn.BatchNorm2d(4), False

        def on_save_checkpoint(self, checkpoint: dict) -> None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {f"my.{k}": v for k, v in state.items() if not k.startswith("frozen.")}

        def on_load_checkpoint(self, checkpoint: dict) -> None:
            checkpoint["state_dict"] = {k.removeprefix("my."): v for k, v in checkpoint["state_dict"].items()}

    path, module = tmp_path / "model.safetensors", Encoder()
    callback = QuantInitCallback(export=str(path), print_report=False)
    trainer(tmp_path, callback, max_epochs=1).fit(module, loader(shuffle=False), loader(shuffle=False))
    x = small_data(4).tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(load_integers(Encoder(), path)(x), module.eval()(x), rtol=0, atol=0)


def test_without_checkpoints_the_module_itself_is_exported(tmp_path: Path):
    callback = QuantInitCallback(export=str(tmp_path / "model.onnx"), print_report=False)
    module = WithExample()
    fit = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=[callback],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_steps=2,
    )
    fit.fit(module, loader())
    x = small_data(1)[0][0][None]
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "model.onnx", x), module.eval()(x), rtol=1e-5, atol=1e-5)
    assert all(quantizer.is_calibrated for quantizer in module.stem.quantizers().values())  # the module is as it was


def test_what_the_callback_could_not_export_is_said_before_training(tmp_path: Path):
    with pytest.raises(ValueError, match="`export` must be a path that ends in '.onnx' or '.safetensors', got 'm.pt'"):
        QuantInitCallback(export="m.pt")
    with pytest.raises(ValueError, match="`export` must be a path that ends in '.onnx' or '.safetensors', got '3'"):
        QuantInitCallback(export=3)
    path = str(tmp_path / "model.onnx")
    with pytest.raises(MisconfigurationException, match="needs `example_input_array` in SmallNet"):
        trainer(tmp_path, QuantInitCallback(export=path), max_epochs=1).fit(SmallNet(), loader())
    module = WithExample()
    before = copy.deepcopy(dict(module.named_parameters()))
    with pytest.raises(ValueError, match="`stem.input` cannot be exported"):
        callback = QuantInitCallback(quantizer="apot", export=path, print_report=False)
        trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trainer(tmp_path, QuantInitCallback(export=path), fast_dev_run=True).fit(WithExample(), loader())
    assert not Path(path).exists()


@pytest.mark.parametrize("per_channel", [True, False])
def test_batchnorm_is_folded_into_the_steps(per_channel: bool, tmp_path: Path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
    )
    for norm in (module[1], module[4]):
        nn.init.normal_(norm.weight)  # of either sign
        nn.init.normal_(norm.bias)
    x = torch.randn(16, 2, 6, 6)
    module.train()(x)
    prepare(module.eval(), weight_bits=8, activation_bits=8, per_channel=per_channel, first_last_bits=None)
    calibrate(module, [x])
    export_onnx(module, x, tmp_path / "model.onnx", batchnorm=True)
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {node.op_type for node in graph.graph.node} == {"QuantizeLinear", "DequantizeLinear", "Conv", "Relu"}
    used = {name for node in graph.graph.node for name in node.input}
    assert all(tensor.name in used for tensor in graph.graph.initializer)
    assert types(tmp_path / "model.onnx") == {"INT8", "UINT8"}
    actual, expected = run(tmp_path / "model.onnx", x), module(x).detach()
    # a value of the hidden layer may fall on the other side of a rounding boundary
    differs = (actual - expected).abs() > 1e-4 * expected.abs().max()
    assert differs.double().mean() < 1e-3


def test_batchnorm_stays_where_no_kernel_would_be_won_and_the_bias_lost(tmp_path: Path):
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)))
    x = torch.randn(64, 4, 12, 12)
    module.train()(x)
    prepare(module.eval())  # 4 bits; the first and the last layer have 8
    calibrate(module, [x])
    export_onnx(module, x, tmp_path / "model.onnx", batchnorm=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("BatchNormalization") == 1
    actual, expected = run(tmp_path / "model.onnx", x), module(x).detach()
    differs = (actual - expected).abs() > 1e-4 * expected.abs().max()
    assert differs.double().mean() < 1e-3


def test_batchnorm_behind_a_shared_convolution_is_folded_and_one_whose_input_is_an_answer_stays(tmp_path: Path):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norms = nn.Conv2d(3, 4, 1), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.norms[0](self.conv(x)).relu(), self.norms[1](self.conv(2 * x)).relu()])

    class Both(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return x, self.norms[0](x)

    for model in (Head(), Both()):
        x = torch.randn(8, 3, 5, 5)
        model.train()(x)
        prepare(model.eval(), weight_bits=8, activation_bits=8)
        calibrate(model, [x])
        export_onnx(model, x, tmp_path / "model.onnx", batchnorm=True)
        expected = model(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert (run(tmp_path / "model.onnx", x) - expected).abs().max() < 1e-5
        kept = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
        assert ("BatchNormalization" in kept) == isinstance(model, Both)


def test_integers_beyond_8_bits_are_looked_up(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 5))
    quantizer = {"name": "codebook", "levels": [-200, -10, 0, 200]}
    prepare(model, weight_bits=2, activation_bits=None, first_last_bits=None, weight_quantizer=quantizer)
    x = torch.randn(4, 6)
    calibrate(model, [x])
    export_onnx(model, x, tmp_path / "model.onnx")
    assert torch.allclose(run(tmp_path / "model.onnx", x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gain", [0.0, 1e-6])
def test_batchnorm_stays_where_a_channel_has_no_gain(gain: float, tmp_path: Path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    x = torch.randn(16, 4, 8, 8)
    module.train()(x)
    module[1].weight.data[0], module[1].bias.data[:] = gain, torch.tensor([1.0, 0.1, 0.1])
    prepare(module.eval(), weight_bits=8, activation_bits=8)
    calibrate(module, [x])
    export_onnx(module, x, tmp_path / "model.onnx", batchnorm=True)
    actual, expected = run(tmp_path / "model.onnx", x, optimized=True), module(x).detach()
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()  # 0.33 where the channel's constant is lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_only_float32_is_exported(dtype: torch.dtype, tmp_path: Path):
    _, module, x = case("small-net")
    with pytest.raises(ValueError, match="The layer 'stem' is in b?float.., and ONNX export takes modules in float32"):
        export_onnx(module.to(dtype), x.to(dtype), tmp_path / "model.onnx")
    precision = {torch.bfloat16: "bf16-true", torch.float64: "64-true"}[dtype]
    callback = QuantInitCallback(export=str(tmp_path / "model.onnx"), print_report=False)
    with pytest.raises(ValueError, match="The layer 'stem' is in"):
        trainer(tmp_path, callback, precision=precision, max_epochs=1).fit(WithExample(), loader())
    assert not (tmp_path / "model.onnx").exists()


@pytest.fixture
def count_flips(monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples" / "benchmarks")
    return importlib.import_module("flips").count_flips


def test_flips_are_counted_layer_by_layer(count_flips: Callable, tmp_path: Path):
    _, module, _ = case("small-net", weight_bits=4, activation_bits=4)
    x = torch.randn(500, 1, 6, 6)
    export_onnx(module, x, tmp_path / "model.onnx")
    flips, difference = count_flips(module, x, tmp_path / "model.onnx")
    assert [flip.name for flip in flips] == ["stem.input", "body.input", "hidden.input", "head.input"]
    assert [flip.elements for flip in flips] == [500 * 36, 500 * 144, 500 * 144, 500 * 8]
    assert all(flip.own + flip.layer + flip.cascaded == 0 for flip in flips) and difference < 1e-6
    quantizer = module.body.input_quantizer  # one of another step, so that the file is wrong about this layer
    with torch.no_grad():
        quantizer.relative_step.mul_(1.01)
        given = module.norm(module.stem(x)).relu()
        code, other = (given / step for step in (quantizer.step, quantizer.step / 1.01))
    expected = int((code.round().clamp(max=15) != other.round().clamp(max=15)).sum())
    body, hidden = count_flips(module, x, tmp_path / "model.onnx")[0][1:3]
    # values on a boundary by float rounding aside
    assert expected > 100 and abs(body.own - expected) <= 3 and abs(body.layer - expected) <= 3
    assert hidden.own == 0 and hidden.layer == 0 and hidden.cascaded > 0


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3 * 32, 16, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(2))[0][:, -1])


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)


NETWORKS = {
    "resnet18": lambda: models.resnet18(num_classes=10),
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=10),
    "vit": vit,
    "lstm": LSTM,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_export_and_run(name: str, count_flips: Callable, tmp_path: Path):
    torch.manual_seed(0)
    module, x = NETWORKS[name](), torch.randn(4, 3, 32, 32)
    if name == "lstm":
        x = x.transpose(1, 2)  # rows of an image
    with torch.no_grad():
        module.train()(x)
        if name == "vit":
            nn.init.normal_(module.heads.head.weight)  # which starts at zero
    prepare(module.eval(), weight_bits=4, activation_bits=4, initializer="minmax")  # which is fast
    calibrate(module, [x])
    export_onnx(module, x, tmp_path / "model.onnx")
    flips, difference = count_flips(module, x, tmp_path / "model.onnx")
    assert difference < 1e-5 and all(flip.difference < 1e-5 for flip in flips)
    # 1 in 100,000 elements, and what so few of them may have by chance
    assert sum(flip.own + flip.layer for flip in flips) <= 2 + 1e-5 * sum(flip.elements for flip in flips)


def test_the_callback_refuses_a_folded_module(tmp_path: Path):
    module = WithExample()
    prepare(module)
    calibrate(module, [module.example_input_array + torch.randn(4, 1, 6, 6)])
    with pytest.raises(MisconfigurationException, match="`stem.input_quantizer` of WithExample learns no more"):
        trainer(tmp_path, QuantInitCallback(), max_epochs=1).fit(fold(module), loader())
