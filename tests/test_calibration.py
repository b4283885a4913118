"""Choices of calibration: running order, BatchNorm statistics, settings of single layers."""

import copy
import itertools
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, Wide, loader, quiet, small_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_qinit import Codebook, QuantInitCallback, Sample, calibrate, prepare
from lightning_qinit.calibration import Sketch, observe
from lightning_qinit.calibration.count import FEW, Counter
from lightning_qinit.functional import fake_quantize, optimal_scale
from lightning_qinit.functional.determinism import any_order
from lightning_qinit.insertion import insert, named_quantizers, quantized_layers


class Twice(nn.Module):
    """Two layers that take the same tensor, which may change in between."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.first, self.second, self.change = nn.Linear(40, 40), nn.Linear(40, 40), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        y = self.first(x)
        return y + self.second(x.mul_(2) if self.change else x)


@pytest.mark.parametrize(("change", "inference", "times"), [(False, False, 2), (True, False, 4), (True, True, 4)])
def test_an_input_of_several_layers_is_counted_once(
    change: bool, inference: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    count = Counter.count
    monkeypatch.setattr(Counter, "count", lambda counter, x: counted.append(x) or count(counter, x))
    batches = [torch.randn(FEW // 40 + 1, 40) for _ in range(2)]
    layers = quantized_layers(model := prepare(Twice(change)))
    with torch.inference_mode(inference), observe(layers) as seen:
        for batch in batches:
            model(batch)
            seen.end_batch()
    assert len(counted) == times
    expected, twice = Sketch(), Sketch()
    for batch in batches:
        expected.update(batch)
        twice.update(batch * (2 if change else 1))
    assert torch.equal(seen.inputs["first.input"].table, expected.table)
    assert torch.equal(seen.inputs["second.input"].table, twice.table)
    assert torch.equal(seen.inputs["second.input"].extremes, twice.extremes)


def test_sequential_sees_what_quantized_layers_give() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    data = [torch.randn(16, 40) for _ in range(3)]
    twin = copy.deepcopy(model)
    prepare(model, weight_bits=2, activation_bits=3, first_last_bits=None)
    calibrate(model, iter(data), sequential=True)
    x = torch.cat(data)
    for index in (0, 2, 4):
        quantizers = model[index].quantizers()
        fit = optimal_scale(twin[index].weight, quantizers["weight"].levels, channel_axis=0)
        assert torch.allclose(quantizers["weight"].step.double(), fit.scale, rtol=1e-6)
        levels = quantizers["input"].levels
        error = Sample.of_tensor(x).error(levels, quantizers["input"].step.detach())
        assert float(error) <= float(optimal_scale(x, levels).error) * (1 + 1e-4)
        weight = fake_quantize(
            twin[index].weight.detach(), quantizers["weight"].step.detach(), quantizers["weight"].levels, 0
        )
        x = F.linear(
            fake_quantize(x, quantizers["input"].step.detach(), levels), weight, twin[index].bias.detach()
        ).relu()


def test_sequential_in_a_trainer_leaves_no_trace(make_trainer) -> None:
    results = []
    for sequential in (False, True):
        torch.manual_seed(0)
        model, callback = Wide(), quiet(sequential=sequential, weight_bits=2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = make_trainer(callback, max_steps=1, limit_train_batches=1)
        trainer.fit(model, loader())
        results.append({row.name: row for row in callback.report})
        assert int(model.norm.num_batches_tracked) == int(before["norm.num_batches_tracked"]) + 1
    one, other = results
    assert one.keys() == other.keys()
    assert all(one[f"{name}.weight"] == other[f"{name}.weight"] for name in ("stem", "body", "hidden", "head"))
    assert one["stem.input"] == other["stem.input"] and one["head.input"] != other["head.input"]


def test_batchnorm_statistics_under_quantization_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3), nn.BatchNorm1d(3))
    for norm in (model[1], model[4]):
        norm.num_batches_tracked.fill_(7)
    model[4].eval()  # frozen
    data = [torch.randn(16, 40) for _ in range(3)]
    prepare(model, weight_bits=2, activation_bits=2, first_last_bits=None)
    twin = copy.deepcopy(model)
    calibrate(model, data, recalibrate_batchnorm=True)
    calibrate(twin, data)
    for name, value in twin.state_dict().items():
        changed = name in ("1.running_mean", "1.running_var")
        assert torch.equal(model.state_dict()[name], value) != changed, name
    assert model.training and not model[4].training and model[1].momentum == 0.1
    outputs = [twin[0](x).detach() for x in data]
    assert torch.allclose(model[1].running_mean, torch.stack([x.mean(0) for x in outputs]).mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, torch.stack([x.var(0) for x in outputs]).mean(0), atol=1e-6)


def test_batchnorm_statistics_in_a_trainer(make_trainer) -> None:
    class Stop(Exception):
        pass

    class Halted(SmallNet):
        def on_train_batch_start(self, *args: object) -> None:
            raise Stop

    statistics = []
    for recalibrate in (False, True):
        torch.manual_seed(0)
        model = Halted()
        with pytest.raises(Stop):
            make_trainer(quiet(weight_bits=2, recalibrate_batchnorm=recalibrate)).fit(model, loader(shuffle=False))
        statistics.append((model.norm.running_mean.clone(), int(model.norm.num_batches_tracked)))
    means = [model.stem(x).detach().mean((0, 2, 3)) for x, _ in itertools.islice(loader(shuffle=False), 3)]
    expected = torch.stack(means).mean(0)
    assert statistics[0][1] == statistics[1][1] == 1 and not statistics[0][0].any()
    assert torch.allclose(statistics[1][0], expected, atol=1e-6)


def test_batches_that_the_step_takes_apart_are_whole_in_the_next_pass(make_trainer) -> None:
    class Pops(SmallNet):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            y = batch.pop("y")
            x = batch["x"].add_(1)
            return F.cross_entropy(self(x), y)

    class Named(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = small_data()[index]
            return {"x": x, "y": y}

    steps = []
    for sequential in (False, True):
        torch.manual_seed(0)
        model = Pops()
        callback = quiet(sequential=sequential, recalibrate_batchnorm=True)
        make_trainer(callback, max_steps=1).fit(model, torch.utils.data.DataLoader(Named(), 8))
        steps.append(model.stem.input_quantizer.initial_step)
    assert torch.equal(*steps)


def test_overrides_are_checked_layer_by_layer() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3))
    four = {"weight_quantizer": {"name": "codebook", "levels": [-1, 0, 0.5, 1]}}
    prepare(copy.deepcopy(model), overrides={"1": {"weight_bits": 2, **four}})
    prepare(copy.deepcopy(model), overrides={"*": {"weight_bits": 2}, "1": four})
    with pytest.raises(ValueError, match="Layer '1': `weight_quantizer` = .* does not take 4 bits for weights"):
        prepare(copy.deepcopy(model), overrides={"1": four})
    prepare(model, weight_bits=2, overrides={"0": {"activation_bits": None}})
    rows = calibrate(model, [torch.randn(9, 40)])
    bits = {row.name: row.bits for row in rows}
    assert bits["0.weight"] == 8 and "0.input" not in bits and bits["1.weight"] == 2  # of its own role alone
    narrow = {"1": {"weight_initializer": "kl"}}
    model = prepare(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)), overrides=narrow)
    with pytest.raises(ValueError, match="`average_bits` tries 2 to 8 bits: `weight_initializer` = 'kl' does not app"):
        calibrate(model, [torch.randn(9, 40)], average_bits=4.0)


def test_settings_that_mean_the_same_are_no_difference(make_trainer, tmp_path: Path) -> None:
    levels = torch.linspace(-1, 1, 5)
    first = quiet(
        quantizer={"name": "lsq"},
        weight_bits=3,
        first_last_bits=None,
        weight_quantizer={"name": Codebook, "levels": levels},
        overrides={"body": {"weight_initializer": "minmax"}},
    )
    trainer = make_trainer(first, max_steps=1)
    trainer.fit(SmallNet(), loader())
    path = tmp_path / "same.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    second = quiet(
        quantizer="lightning_qinit.LSQ",
        weight_bits=3,
        first_last_bits=None,
        weight_quantizer={"name": "codebook", "levels": levels.tolist()},
        overrides={"body": {"weight_initializer": "optimal"}},
    )
    make_trainer(second).test(SmallNet(), loader(shuffle=False), ckpt_path=path, verbose=False)


def test_deterministic_mode_is_put_back() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        Sketch().update(torch.randn(9))
        model = prepare(nn.Sequential(nn.Linear(40, 3)))
        calibrate(model, [torch.randn(5, 40)])
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    Sketch().update(torch.randn(9))
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_take_turns_in_deterministic_mode() -> None:
    seen = []

    @any_order()
    def worker() -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    thread = Thread(target=worker)
    torch.use_deterministic_algorithms(True)
    try:
        with any_order():
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()  # it would put back what it found: the mode of this thread's
        thread.join()
        assert seen == [False]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"criterion": "mae"}, "`criterion` must be 'mse', 'fisher', 'hessian' or 'output', got 'mae'"),
            ({"sequential": 1}, "`sequential` must be True or False, got 1"),
            ({"recalibrate_batchnorm": "yes"}, "`recalibrate_batchnorm` must be True or False"),
            ({"average_bits": "3"}, "`average_bits` must be a number from 2 to 8, or None, got '3'"),
            (
                {"weight_bits": 3, "weight_quantizer": {"name": "codebook", "levels": range(-2, 3)}},
                "`first_last_bits`: `weight_quantizer` = .* does not take 8 bits for weights: a codebook of 5 levels",
            ),
            ({"average_bits": 1.5}, "`average_bits` must be a number from 2 to 8, or None, got 1.5"),
            ({"quantizer": {"name": "nothing"}}, "`quantizer` must be one of .*'apot'.* got {'name': 'nothing'}"),
            ({"quantizer": {"narrow_range": True}}, "`quantizer` must be one of"),
            (
                {"quantizer": {"name": "lsq", "wide": True}},
                "`quantizer` = .*'wide': True.* unexpected keyword",
            ),
            ({"weight_quantizer": "apot", "weight_bits": 1}, "`weight_quantizer` = 'apot' does not take 1 bits for w"),
            (
                {"weight_quantizer": {"name": "codebook", "levels": [-1, 0, 1]}},
                "`weight_quantizer` = .* does not take 4 bits for weights: a codebook of 3 levels has 2 bits, got 4",
            ),
            ({"initializer": "sawb"}, "`initializer` = 'sawb' does not apply to inputs with 4 bits: sawb needs signed"),
            (
                {"weight_initializer": "sawb", "weight_bits": 6},
                "`weight_initializer` = 'sawb' does not apply to w",
            ),
            ({"weight_initializer": "kl", "weight_bits": 2}, "kl needs at least 4 bits"),
            ({"quantizer": "apot", "initializer": "lsq"}, "lsq needs uniform levels"),
            ({"activation_initializer": "none.such"}, "`activation_initializer` must be one of"),
            ({"overrides": {"x": {"own_bits": ["weight"]}}}, r"`overrides\['x'\]` must map some of"),
            ({"average_bits": 3.0, "weight_quantizer": {"name": "codebook", "levels": [0, 1]}}, "does not take"),
        ],
    )
    def test_settings(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            QuantInitCallback(**settings)

    def test_plain_calibration_says_what_it_lacks(self) -> None:
        x = torch.randn(3, 4)
        with pytest.raises(ValueError, match="Linear has no quantizers: call `prepare"):
            calibrate(nn.Linear(4, 4), [x])
        model = prepare(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(ValueError, match="`batches` must hold at least one batch that runs a quantized layer"):
            calibrate(model, [])
        with pytest.raises(ValueError, match="`criterion` = 'fisher' needs a `step` that returns the loss, got None"):
            calibrate(model, [x], criterion="fisher")
        assert not model[0].weight_quantizer.is_calibrated
        with pytest.warns(UserWarning) as warned:
            rows = calibrate(model, [torch.full((3, 4), torch.nan)])
        assert [row.name for row in rows] == ["0.weight"]
        assert "Calibration met NaN or infinite values in 0.input" in str(warned[0].message)
        assert "Calibration saw no data for 0.input, which stay in float" in str(warned[1].message)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"skip": 3}, "`skip` must be a sequence of glob patterns, got 3"),
            ({"skip": [3]}, r"`skip` must be a sequence of glob patterns, got \[3\]"),
            ({"overrides": ["0"]}, r"`overrides` must be a mapping of glob patterns to settings, got \['0'\]"),
            ({"weight_bit": 4}, r"`prepare` has no settings \['weight_bit'\]; those of layers are"),
            ({"own_bits": ("weight",)}, r"`prepare` has no settings \['own_bits'\]"),
        ],
    )
    def test_settings_of_the_plain_interface(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(nn.Sequential(nn.Linear(4, 4)), **settings)

    def test_average_bits_of_a_quantizer_with_one_width(self) -> None:
        callback = {"weight_bits": 2, "first_last_bits": None, "average_bits": 3.0}
        with pytest.raises(ValueError, match="`average_bits` tries 2 to 8 bits: `weight_quantizer` = .* 3 bits"):
            QuantInitCallback(**callback, weight_quantizer={"name": "codebook", "levels": [-1, 0, 1]})


def test_settings_of_weights_and_inputs_apart() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 3))
    callback = quiet(
        weight_quantizer={"name": "apot", "normalize": True},
        activation_quantizer="lsq+",
        weight_initializer="constant",
        first_last_bits=None,
    )
    insert(model, callback.config)
    rows = calibrate(model, [torch.randn(30, 40)])
    assert {row.name for row in rows} == set(named_quantizers(quantized_layers(model)))
    assert type(model[0].weight_quantizer).name == "apot" and type(model[0].input_quantizer).name == "lsq+"
    # of normalized weights the deviation is 1 over the whole weight; here it is taken per channel
    normal = model[0].weight_quantizer.transform(model[0].weight.detach())
    assert torch.allclose(model[0].weight_quantizer.step, 3 * normal.std(1, correction=0), rtol=1e-5)
    offsets = {row.name: row.offset for row in rows}
    assert offsets["0.weight"] is None and offsets["2.input"] < 0
    state = callback.state_dict()
    assert (
        state["weight_quantizer"] == {"name": "apot", "normalize": True} and state["weight_initializer"] == "constant"
    )


def test_checkpoint_brings_offsets_and_allocated_bits(make_trainer, tmp_path: Path) -> None:
    settings = {"activation_quantizer": "lsq+", "weight_quantizer": {"name": "lsq", "narrow_range": True}}
    model = SmallNet()
    trainer = make_trainer(quiet(**settings, average_bits=3.0), max_steps=2)
    trainer.fit(model, loader())
    path = tmp_path / "plus.ckpt"
    trainer.save_checkpoint(path)
    fresh = SmallNet()
    make_trainer(quiet(**settings)).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    x = small_data().tensors[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    other = quiet(**{**settings, "weight_quantizer": "lsq"})
    with pytest.raises(MisconfigurationException, match="weight_quantizer: {.* in the checkpoint, 'lsq' in the callb"):
        make_trainer(other).test(SmallNet(), loader(shuffle=False), ckpt_path=path)
