"""What the callback refuses, in one clear sentence and before anything is changed."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Recorder, SmallNet, loader, quantizers, quiet, small_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qinit import QuantInitCallback, prepare
from lightning_qinit.insertion import QuantizedLayer, float_parameters, quantized_layers


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"weight_bits": 0}, "`weight_bits` must be a whole number from 1 to 8, or None, got 0"),
            ({"activation_bits": 9}, "`activation_bits` must be"),
            ({"first_last_bits": 2.5}, "`first_last_bits` must be"),
            ({"quantizer": "nothing"}, "`quantizer` must be one of .*'lsq'.* got 'nothing'"),
            ({"initializer": "no.such.function"}, "`initializer` must be one of .*'minmax'"),
            ({"calibration_batches": 0}, "`calibration_batches` must be"),
            ({"skip": "head"}, "`skip` must be a sequence"),
            ({"overrides": {"head": {"bits": 3}}}, r"`overrides\['head'\]` must map some of"),
            ({"overrides": {"head": {"weight_bits": 99}}}, "`weight_bits` must be"),
        ],
    )
    def test_arguments(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            QuantInitCallback(**settings)

    @pytest.mark.parametrize("argument", [{"skip": ["haed"]}, {"overrides": {"haed": {"weight_bits": 2}}}])
    def test_pattern_that_matches_nothing(self, make_trainer, argument: dict) -> None:
        model = SmallNet()
        with pytest.raises(MisconfigurationException, match="pattern 'haed', which matches no layer.*stem, body"):
            make_trainer(quiet(**argument)).fit(model, loader())
        assert not quantized_layers(model)

    def test_nothing_to_quantize(self, make_trainer) -> None:
        model = SmallNet()
        with pytest.raises(MisconfigurationException, match="SmallNet has no layer to quantize: `skip`"):
            make_trainer(quiet(skip=["*"])).fit(model, loader())

    def test_two_callbacks(self, make_trainer) -> None:
        with pytest.raises(RuntimeError, match="more than one stateful callback of type `QuantInitCallback`"):
            make_trainer(quiet(), quiet())  # Lightning's own check, before any of our hooks

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_nonfinite_weights(self, make_trainer, value: float) -> None:
        model = SmallNet()
        model.hidden.weight.data[0, 0] = value
        with pytest.raises(ValueError, match="weight of layer 'hidden' holds 1 NaN or infinite"):
            make_trainer(quiet()).fit(model, loader())
        assert not any(q.is_calibrated for q in quantizers(model).values())

    def test_nonfinite_batch(self, make_trainer) -> None:
        data = small_data()
        data.tensors[0][0, 0, 0, 0] = torch.nan
        model = SmallNet()
        with pytest.warns(UserWarning, match="NaN or infinite values in stem.input"):
            make_trainer(quiet(), max_steps=1).fit(model, DataLoader(data, 8))
        assert all(bool(q.initial_step.isfinite().all()) for q in quantizers(model).values())

    @pytest.mark.parametrize(
        ("step", "got"),
        [
            (lambda sample, levels: 0.1, "got 0.1"),
            (lambda sample, levels: sample.maximum[:, None], r"got shape \(4, 1\)"),
        ],
    )
    def test_initializer_that_returns_no_step_for_each_channel(self, make_trainer, step: Callable, got: str) -> None:
        with pytest.raises(TypeError, match=rf"stem.weight: An initializer must return the step .* \(4,\), {got}"):
            make_trainer(quiet(weight_initializer=step)).fit(SmallNet(), loader())

    def test_no_batches(self, make_trainer) -> None:
        model = SmallNet()
        with pytest.warns(UserWarning, match="saw no training batch"):
            make_trainer(quiet(), limit_train_batches=0).fit(model, loader())
        assert not any(q.is_calibrated for q in quantizers(model).values())

    def test_step_that_raises_is_named_and_nothing_is_changed(self, make_trainer) -> None:
        class Fails(Recorder):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                if batch_idx == 1:
                    raise KeyError("label")
                return SmallNet.training_step(self, batch, batch_idx)

        model = Fails()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="`Fails.training_step` raised KeyError on calibration batch 1"):
            make_trainer(quiet()).fit(model, loader(shuffle=False))
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        assert model.training and model.outputs == {"loss": [], "seen": 0}
        assert not any(q.is_calibrated for q in quantizers(model).values())


def test_what_a_module_of_ones_own_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        QuantInitCallback(initializer="my_rules.rule")
    for missing in ("my_other_rules.rule", "lightning_qinit.none.rule", "lightning_qinit.none"):
        with pytest.raises(ValueError, match="`initializer` must be one of"):
            QuantInitCallback(initializer=missing)


def test_other_settings_for_a_quantized_module_are_refused(make_trainer) -> None:
    model = SmallNet()
    make_trainer(quiet(), max_steps=1).fit(model, loader())
    before = copy.deepcopy(model.state_dict())
    for settings, named in (
        ({"weight_bits": 2}, r"'stem' is quantized already, with {'weight_bits': 4}, now {'weight_bits': 2}"),
        ({"quantizer": "apot"}, "'weight_quantizer': 'lsq'.* now {'weight_quantizer': 'apot'"),
        ({"skip": ["body"]}, "'body' is quantized already, with .* now to be left in float"),
        ({"overrides": {"head": {"per_channel": False}}}, "'head' is quantized already, with {'per_channel': True}"),
    ):
        with pytest.raises(MisconfigurationException, match=named):
            make_trainer(quiet(**settings)).fit(model, loader())
        with pytest.raises(ValueError, match=named):
            prepare(model, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    make_trainer(quiet(initializer="minmax", quantizer={"name": "lsq"}), max_steps=1).fit(model, loader())


def test_checkpoint_of_other_settings_is_refused(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(quiet(weight_bits=2))
    trainer.fit(SmallNet(), loader())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(MisconfigurationException, match="weight_bits: 2 in the checkpoint, 3 in the callback"):
        make_trainer(quiet(weight_bits=3)).test(SmallNet(), loader(), ckpt_path=tmp_path / "two.ckpt")


def test_layers_without_a_weight_stay_as_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own on such layers
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0), nn.Linear(0, 2))
    prepare(model)
    assert [isinstance(layer, QuantizedLayer) for layer in model] == [True, False, False]


def test_an_embedding_has_no_input_to_quantize() -> None:
    with pytest.raises(ValueError, match="Sequential has no layer to quantize"):
        prepare(nn.Sequential(nn.Embedding(5, 4)), weight_bits=None)
    model = prepare(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), weight_bits=None)
    assert [isinstance(layer, QuantizedLayer) for layer in model] == [False, True]


def test_a_layer_whose_forward_was_replaced_stays_in_float() -> None:
    model = SmallNet()
    model.hidden.forward = lambda x: nn.functional.linear(x, model.hidden.weight)
    prepare(model)
    assert set(quantized_layers(model)) == {"stem", "body", "head"}
    assert float_parameters(model) == ["hidden.weight"]


def test_a_frozen_weight_that_is_expanded_is_no_obstacle(make_trainer) -> None:
    model = SmallNet()
    model.head.weight = nn.Parameter(torch.randn(1, 8).expand(3, 8), requires_grad=False)
    make_trainer(quiet()).fit(model, loader(), loader(shuffle=False))
    assert model.head.weight_quantizer.is_calibrated


@pytest.mark.parametrize("limit", [{"max_epochs": 0}, {"max_steps": 0}])
def test_a_step_that_fails_is_said_where_there_is_only_calibration(make_trainer, limit: dict) -> None:
    class Fails(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise KeyError("unknown")

    with pytest.raises(RuntimeError, match="`Fails.training_step` raised KeyError on calibration batch 0: 'unknown'"):
        make_trainer(quiet(), **limit).fit(Fails(), loader())


def test_part_of_the_state_of_a_quantizer_is_refused() -> None:
    model = SmallNet()
    prepare(model)
    state = {name: p.detach() for name, p in model.named_parameters()}
    message = "quantizer 'stem.weight_quantizer' has initial_step, calibrated, signed, bits missing in the state"
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=False)
    quantizer, errors = model.stem.weight_quantizer, []
    told = dict(local_metadata={}, strict=False, missing_keys=[], unexpected_keys=[], error_msgs=errors)
    quantizer._load_from_state_dict(state_dict=state, prefix="stem.weight_quantizer.", **told)  # as DeepSpeed does
    assert len(errors) == 1 and not quantizer.is_calibrated


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model.*")
def test_hooks_that_the_user_has_set_on_the_module_are_called_and_stay(make_trainer, tmp_path: Path) -> None:
    model, calls = SmallNet(), []
    model.on_load_checkpoint = lambda checkpoint: calls.append("load")
    model.configure_model = lambda: calls.append("configure")
    own = model.on_load_checkpoint, model.configure_model
    trainer = make_trainer(quiet())
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    make_trainer(quiet()).test(model, loader(shuffle=False), ckpt_path=tmp_path / "own.ckpt", verbose=False)
    assert calls == ["configure", "configure", "load"]
    assert (model.on_load_checkpoint, model.configure_model) == own


def test_lazy_layers_are_refused(make_trainer) -> None:
    model = SmallNet()
    model.head = nn.LazyLinear(3)
    with pytest.raises(MisconfigurationException, match="of layer 'head' have no shape yet, since it is lazy"):
        make_trainer(quiet()).fit(model, loader())
    assert not quantized_layers(model)
    model(next(iter(loader()))[0])
    make_trainer(quiet(), max_steps=1).fit(model, loader())
