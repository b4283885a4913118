"""What a user sees of a run: logged numbers, files, and TensorBoard as its server gives it."""

import csv
import json
import math
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quantizers, quiet
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_qinit import QuantInitCallback, calibrate, prepare
from lightning_qinit.functional import optimal_scale
from lightning_qinit.insertion import named_quantizers, quantized_layers
from lightning_qinit.monitoring import Monitor
from lightning_qinit.monitoring.oscillation import Oscillation, damp
from lightning_qinit.monitoring.quantities import DEFAULT, PREFIXES


def rows_of(logger: CSVLogger) -> dict[int, dict[str, float]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows if "quant_error/mean" in row}


class Independent(pl.Callback):
    """Measures by itself what passes through every quantizer, value by value in float64."""

    def __init__(self) -> None:
        self.seen: list[dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.quantizers = named_quantizers(quantized_layers(pl_module))
        for name, quantizer in self.quantizers.items():
            quantizer.register_forward_hook(lambda q, args, out, name=name: self.record(name, q, args[0], out))

    def record(self, name: str, q: nn.Module, x: Tensor, out: Tensor) -> None:
        offset = q.offset.detach() if q.has_offset else torch.zeros(1)
        state = (x.detach().double(), out.detach().double(), q.step.detach().double(), offset.double(), q.levels)
        self.seen[-1].setdefault(name, []).append(state)

    def on_train_batch_start(self, *args: object) -> None:
        self.seen.append({})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("settings", [{"weight_bits": 2}, {"quantizer": "lsq+", "per_channel": False}], ids=str)
def test_every_number_is_that_of_an_independent_computation(make_trainer, tmp_path, accumulate, settings) -> None:
    logger, independent = CSVLogger(tmp_path, name="log"), Independent()
    callback = quiet(**settings, log_costly_every=1)
    trainer = make_trainer(
        callback, independent, logger=logger, log_every_n_steps=2, max_epochs=2, accumulate_grad_batches=accumulate
    )
    trainer.fit(SmallNet(), loader())
    logged = rows_of(logger)
    assert sorted(logged) == ([1, 3, 5, 7] if accumulate == 1 else [1, 3])
    before: dict[str, Tensor] = {}
    for step, row in logged.items():
        batches = independent.seen[(step + 1) * accumulate - accumulate : (step + 1) * accumulate]
        for name, quantizer in independent.quantizers.items():
            parts = [part for batch in batches for part in batch[name]]
            levels, axis = parts[0][4], quantizer.channel_axis if parts[0][2].numel() > 1 else None
            noise = signal = clipped = count = 0.0
            used: set[int] = set()
            for x, out, s, offset, _ in parts:
                shape = [-1 if i == axis else 1 for i in range(x.dim())]
                v = (x - offset) / (s.reshape(shape) if axis is not None else s)
                code = (v[..., None] - levels).abs().argmin(-1)
                noise += float((out - x).square().sum())
                signal += float(x.square().sum())
                clipped += int(((v > levels[-1] + 0.5) | (v < levels[0] - 0.5)).sum())
                count += x.numel()
                used |= set(code.flatten().tolist())
            x, _, s, offset, _ = parts[-1]
            expected = {
                "quant_step": float(s.mean()),
                "quant_step_drift": float((s / quantizer.initial_step).mean()),
                "quant_error": noise / signal,
                "quant_sqnr_db": 10 * math.log10(signal / noise),
                "quant_clipped": clipped / count,
                "quant_levels_used": len(used) / len(levels),
            }
            if quantizer.has_offset:
                expected["quant_offset"] = float(offset)
            else:
                x = parts[0][0]
                best = optimal_scale(x if axis is not None else x.reshape(1, -1), levels, axis or 0)
                expected["quant_step_to_optimal"] = float((s / best.scale).mean())
            if name.endswith("weight"):
                if name in before:
                    expected["quant_still"] = float((code == before[name]).double().mean())
                before[name] = code
            for key, value in expected.items():
                # the optimum is solved on every third value of the larger inputs
                tolerance = 0.1 if key == "quant_step_to_optimal" and name == "hidden.input" else 1e-4
                assert row[f"{key}/{name}"] == pytest.approx(value, rel=tolerance, abs=1e-6), (key, name, step)
            assert ("quant_still/" + name in row) == ("quant_still" in expected)


def test_quantities_are_a_choice(make_trainer, tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="log")
    callback = quiet(log_quantizers=["error", "to_optimal", "oscillation"], log_costly_every=2)
    trainer = make_trainer(callback, logger=logger, log_every_n_steps=1, max_epochs=1)
    trainer.fit(SmallNet(), loader())
    logged = rows_of(logger)
    cards = {step: {name.split("/")[0] for name in row if name.startswith("quant")} for step, row in logged.items()}
    assert cards[0] == cards[2] == {"quant_error", "quant_step_to_optimal", "quant_oscillation"}
    assert cards[1] == cards[3] == {"quant_error", "quant_oscillation"}
    with pytest.raises(ValueError, match="`log_quantizers` must be True, False or a list of .*, got 'mse' in it"):
        QuantInitCallback(log_quantizers=["mse"])
    with pytest.raises(ValueError, match="`log_quantizers` must be True, False or a list of .*, got 3"):
        QuantInitCallback(log_quantizers=3)
    for argument in ({"log_costly_every": 0}, {"log_figures": -1}, {"log_figures": True}):
        with pytest.raises(ValueError, match=f"`{next(iter(argument))}` must be a whole number of at least"):
            QuantInitCallback(**argument)
    assert set(DEFAULT) == set(PREFIXES) - {"oscillation", "frozen"}


def test_nothing_is_measured_between_logging_steps() -> None:
    model = prepare(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)))
    calibrate(model, [torch.randn(5, 40)])
    monitor = Monitor(quantized_layers(model))
    monitor.open()
    assert all(q.watch is not None for q in monitor.quantizers.values())
    model(torch.randn(5, 40))
    values = monitor.close(lambda tensor: tensor)
    assert all(q.watch is None for q in monitor.quantizers.values())
    assert values["quant_step_to_optimal/0.input"] > 0
    model(torch.randn(5, 40))
    again = monitor.close(lambda tensor: tensor)  # nothing passed while it was open
    assert "quant_step/0.input" in again and "quant_error/0.input" not in again


@pytest.mark.parametrize("quantizer", ["lsq", "apot"])
def test_values_that_are_not_finite_are_survived(quantizer: str) -> None:
    model = prepare(nn.Sequential(nn.Linear(40, 3)), quantizer=quantizer)
    calibrate(model, [torch.randn(5, 40)])
    monitor = Monitor(quantized_layers(model))
    monitor.open()
    x = torch.randn(5, 40)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    model(x)
    logged = monitor.close(lambda tensor: tensor)
    assert "quant_step/0.input" in logged
    assert math.isfinite(logged["quant_step_to_optimal/0.input"])  # of the values that are finite


def test_sums_over_ranks_give_the_numbers_of_all_data() -> None:
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)), weight_bits=2, activation_bits=2)
    calibrate(model, [torch.randn(50, 40)])
    first, second = torch.randn(8, 40), 3 * torch.randn(8, 40)
    quantities = [q for q in DEFAULT if q != "to_optimal"]  # the mean over ranks of each rank's own
    tables: list[Tensor] = []
    for part in (first, second):
        monitor = Monitor(quantized_layers(model), quantities)
        monitor.open()
        model(part)
        monitor.close(lambda tensor: tables.append(tensor) or tensor)
    whole, together = Monitor(quantized_layers(model), quantities), Monitor(quantized_layers(model), quantities)
    whole.open()
    model(torch.cat((first, second)))
    expected = whole.close(lambda tensor: tensor)
    together.open()
    model(first)
    got = together.close(lambda tensor: tensor + tables[1])
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_oscillation_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (200, 5)).cumsum(0) % 4
    tracked = Oscillation(codes[0], momentum=0.1)
    flags = torch.stack([tracked.update(step) for step in codes])  # the first changes nothing
    for weight in range(5):
        rate, last = 0.0, 0
        for t in range(1, 200):
            change = int(codes[t, weight] - codes[t - 1, weight])
            sign = (change > 0) - (change < 0)
            oscillates = sign != 0 and last != 0 and sign == -last
            assert bool(flags[t, weight]) == oscillates
            rate = 0.1 * oscillates + 0.9 * rate
            last = sign or last
        assert float(tracked.rate[weight]) == pytest.approx(rate, rel=1e-4)


class Flipping(SmallNet):
    """A weight that is driven over a threshold and back at every step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        quantizer = self.hidden.weight_quantizer
        with torch.no_grad():
            self.hidden.weight[0, 0] = quantizer.step[0] * (0.4 if self.global_step % 2 else 0.6)


def test_oscillating_weights_are_frozen_where_they_are_mostly(make_trainer, tmp_path) -> None:
    settings = dict(weight_bits=3, freeze_oscillating=0.02, log_quantizers=["oscillation", "frozen"])
    logger, model = CSVLogger(tmp_path, name="log"), Flipping()
    frozen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
            quantizer = pl_module.hidden.weight_quantizer
            frozen.append(float((pl_module.hidden.weight[0, 0] / quantizer.step[0]).detach()))

    trainer = make_trainer(quiet(**settings), Watch(), logger=logger, log_every_n_steps=1, max_epochs=3)
    trainer.fit(model, loader())
    # rate after n flips: 1 - 0.99^n > 0.02 at the third flip, which is the fourth change
    assert [value in (0.0, 1.0) for value in frozen] == [False] * 4 + [True] * 8
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["quant_frozen/hidden.weight"]]
    assert float(rows[-1]["quant_frozen/hidden.weight"]) == pytest.approx(1 / model.hidden.weight.numel())
    assert float(rows[-1]["quant_oscillation/hidden.weight"]) > 0
    assert not any(name.startswith("quant_frozen/") and name.endswith("input") for name in rows[-1])


def test_frozen_weights_stay_frozen_in_a_resumed_run(make_trainer, tmp_path) -> None:
    settings = dict(weight_bits=2, freeze_oscillating=0.005)

    def run(epochs: int, resume: Path | None = None) -> tuple[SmallNet, dict[str, Any]]:
        torch.manual_seed(0)
        model, callback = SmallNet(), quiet(**settings)
        model.dropout.p = 0.0
        trainer = make_trainer(callback, max_epochs=epochs)
        trainer.fit(model, loader(shuffle=False), ckpt_path=resume)
        path = tmp_path / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)
        return model, torch.load(path, weights_only=True)["callbacks"]["QuantInitCallback"]

    straight, _ = run(8)
    run(4)
    resumed, state = run(8, tmp_path / "4.ckpt")
    assert any((codes >= 0).any() for codes in state["oscillation"]["frozen"].values())
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_damping_is_the_gradient_of_the_term_in_the_paper() -> None:
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3)), weight_bits=3, first_last_bits=None)
    calibrate(model, [torch.randn(5, 40)])
    model(torch.randn(5, 40)).square().sum().backward()
    before = model[0].weight.grad.clone()
    damp(quantized_layers(model), model.parameters(), 0.5)
    quantizer = model[0].weight_quantizer
    step = quantizer.step.detach()[:, None]
    weight = model[0].weight.detach().clone().requires_grad_()
    term = 0.5 * (quantizer(weight).detach() - weight.clamp(-4 * step, 3 * step)).square().sum()
    (expected,) = torch.autograd.grad(term, weight)
    assert torch.allclose(model[0].weight.grad - before, expected, atol=1e-6)


def test_remedies_reach_what_a_pruned_weight_is_computed_from(make_trainer) -> None:
    torch.manual_seed(0)
    layer = prune.random_unstructured(nn.Linear(40, 40), "weight", 0.5)
    model = prepare(nn.Sequential(layer), weight_bits=3, first_last_bits=None)
    calibrate(model, [torch.randn(5, 40)])
    model(torch.randn(5, 40)).square().sum().backward()
    before = layer.weight_orig.grad.clone()
    damp(quantized_layers(model), model.parameters(), 0.5)
    added = layer.weight_orig.grad - before
    assert added.abs().max() > 0 and bool((added[layer.weight_mask == 0] == 0).all())

    model = SmallNet()
    prune.random_unstructured(model.hidden, "weight", 0.5)
    callback = quiet(weight_bits=2, freeze_oscillating=1e-9)
    make_trainer(callback, max_epochs=6).fit(model, loader(shuffle=False))
    frozen = callback.state_dict()["oscillation"]["frozen"]["hidden.weight"] >= 0
    step, kept = model.hidden.weight_quantizer.step.detach()[:, None], frozen & (model.hidden.weight_mask > 0)
    levels = (model.hidden.weight_orig / step)[kept]
    assert kept.any() and torch.allclose(levels, levels.round(), atol=1e-4)


def test_remedies_refuse_weights_that_a_hook_computes(make_trainer) -> None:
    model = SmallNet()
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.hidden)
    for settings in ({"damp_oscillation": 1.0}, {"freeze_oscillating": 0.1}):
        with pytest.raises(MisconfigurationException, match="computes the weight of layer 'hidden': remove it, or `sk"):
            make_trainer(quiet(**settings)).fit(model, loader())


def test_damping_in_a_run(make_trainer) -> None:
    distances = []
    for strength in (0.0, 1.0):
        torch.manual_seed(0)
        model = SmallNet()
        make_trainer(quiet(weight_bits=2, damp_oscillation=strength), max_epochs=4).fit(model, loader(shuffle=False))
        quantizer = model.hidden.weight_quantizer
        distances.append(float((quantizer(model.hidden.weight) - model.hidden.weight).detach().square().mean()))
    assert distances[1] < 0.7 * distances[0]
    with pytest.raises(ValueError, match="`damp_oscillation` must be a number of at least 0, got -1"):
        QuantInitCallback(damp_oscillation=-1)


def test_report_is_written_beside_the_logs(make_trainer, tmp_path, capsys) -> None:
    logger, callback = CSVLogger(tmp_path, name="log"), QuantInitCallback(weight_bits=2)
    make_trainer(callback, logger=logger, max_steps=1).fit(SmallNet(), loader())
    plain = json.loads((Path(logger.log_dir) / "quantization.json").read_text())
    with open(Path(logger.log_dir) / "quantization.csv") as file:
        table = list(csv.DictReader(file))
    assert len(plain) == len(table) == len(callback.report) == 8
    for row, written, flat in zip(callback.report, plain, table, strict=True):
        assert written["layer"] == flat["layer"] == row.layer and written["bits"] == int(flat["bits"]) == row.bits
        assert written["error"] == float(flat["error"]) == row.error
        assert written["alternatives"] == dict(row.alternatives) and "minmax" in row.alternatives
        assert float(flat["error of minmax"]) == row.alternatives["minmax"]
    lossy = sorted(callback.report, key=lambda row: row.sqnr_db)[:5]
    printed = capsys.readouterr().out
    assert all(f"{row.name} ({row.sqnr_db:.1f} dB)" in printed for row in lossy)
    assert all(len(line) <= 120 for line in printed.splitlines() if "Most signal" not in line)


def test_the_report_may_be_written_anywhere(make_trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger, callback = CSVLogger("memory://logs"), quiet()
    make_trainer(callback, logger=logger, max_steps=1).fit(SmallNet(), loader())
    with fsspec.open(f"{logger.log_dir}/quantization.json") as file:
        assert len(json.load(file)) == len(callback.report) == 8
    assert not list(tmp_path.iterdir())


def test_a_run_that_sees_nothing_in_calibration_comes_to_its_end(make_trainer, tmp_path) -> None:
    class Skips(SmallNet):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor | None:
            return super().training_step(batch, batch_idx) if self.training else None

    trainer = make_trainer(quiet(), logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    with pytest.warns(UserWarning, match="saw no training batch that runs a quantized layer, so nothing is quantized"):
        trainer.fit(Skips(), loader())
    assert trainer.global_step == 4


def test_a_run_with_its_quantizers_switched_off_comes_to_its_end(make_trainer, tmp_path) -> None:
    model, callback = SmallNet(), quiet()
    make_trainer(callback).fit(model, loader())
    for quantizer in quantizers(model).values():
        quantizer.enabled = False
    trainer = make_trainer(callback, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(model, loader())
    assert trainer.global_step == 4


def test_nothing_is_written_without_a_logger(make_trainer, tmp_path) -> None:
    make_trainer(quiet(), max_steps=1, log_every_n_steps=1).fit(SmallNet(), loader())
    assert not list(tmp_path.iterdir())


def test_rich_table_beside_rich_callbacks(make_trainer, capsys) -> None:
    pytest.importorskip("rich")
    make_trainer(QuantInitCallback(), RichModelSummary(), max_steps=1).fit(SmallNet(), loader())
    printed = capsys.readouterr().out
    assert "Quantizers after calibration" in printed and "body.weight" in printed and "┃" in printed


class Recorder(Logger):
    """Takes what any logger takes, and the tables of the two that have them."""

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.metrics: list[tuple[int | None, dict[str, float]]] = []
        self.tables: list[Any] = []
        self.run_id, self.experiment = "run", self

    name, version = "recorder", 0

    @property
    def save_dir(self) -> str | None:
        return self.folder

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        self.tables.append((key, columns, data))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.tables.append((run_id, artifact_file, text))


@pytest.mark.parametrize("kind", ["WandbLogger", "MLFlowLogger", "Logger"])
def test_other_loggers(make_trainer, tmp_path, kind: str) -> None:
    logger = type(kind, (Recorder,), {})(str(tmp_path))
    callback = quiet()
    make_trainer(callback, logger=logger, max_epochs=1, log_every_n_steps=2).fit(SmallNet(), loader())
    steps = [step for step, metrics in logger.metrics if "quant_error/mean" in metrics]
    assert steps == [1, 3]
    assert (tmp_path / "recorder" / "version_0" / "quantization.csv").exists()
    if kind == "WandbLogger":
        (key, columns, data), *_ = logger.tables
        assert key == "quantization" and len(data) == 8 and len(data[0]) == len(columns)
    if kind == "MLFlowLogger":
        run_id, file, text = logger.tables[0]
        assert (run_id, file) == ("run", "quantization.md") and "| body.weight |" in text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """A run's folder, and a function that asks TensorBoard's server about it."""
    folder = tmp_path_factory.mktemp("board")
    torch.manual_seed(0)
    logger = TensorBoardLogger(folder, name="run", version="one")
    trainer = pl.Trainer(
        accelerator="cpu", logger=logger, max_epochs=2, log_every_n_steps=1, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
        callbacks=[quiet(weight_bits=2, log_figures=3, log_costly_every=2)],
    )  # fmt: skip
    model = SmallNet()
    trainer.fit(model, loader())
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--load_fast=false"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    url = ""
    assert process.stderr is not None
    while not url:
        line = process.stderr.readline()
        assert line, "TensorBoard ended"
        if "http://" in line:
            url = line[line.index("http://") :].split()[0].rstrip("/")

    def ask(path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{url}/data/{path}?{urlencode(query, quote_via=quote)}", timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers["Content-Type"].startswith("application/json") else body

    deadline = time.monotonic() + 60
    while not ask("plugin/scalars/tags"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield ask, model
    process.kill()
    process.communicate()


RUN = "run/one"


def test_tensorboard_serves_every_quantity_as_a_card(served) -> None:
    ask, model = served
    tags = set(ask("plugin/scalars/tags")[RUN])
    names = set(named_quantizers(quantized_layers(model)))
    for quantity in set(DEFAULT) - {"offset", "still"}:
        assert {f"{PREFIXES[quantity]}/{name}" for name in names} <= tags, quantity
    assert {f"quant_still/{name}" for name in names if name.endswith("weight")} <= tags
    assert {"quant_error/mean", "quant_error/max"} <= tags
    series = ask("plugin/scalars/scalars", run=RUN, tag="quant_step/body.weight")
    assert [int(step) for _, step, _ in series] == list(range(8))


def test_tensorboard_serves_the_layout(served) -> None:
    ask, _ = served
    layout = ask("plugin/custom_scalars/layout")
    charts = {c["title"]: c["multiline"]["tag"] for category in layout["category"] for c in category["chart"]}
    assert {PREFIXES[q] for q in DEFAULT if q != "offset"} <= set(charts)
    found = ask("plugin/custom_scalars/scalars", run=RUN, tag=charts["quant_error"][0])
    assert found["regex_valid"] and len(found["tag_to_events"]) >= 4


def test_tensorboard_serves_codes_pictures_and_the_report(served) -> None:
    ask, model = served
    pictures = {tag for tag in ask("plugin/images/tags")[RUN]}
    starts = {tag.partition("/")[2] for tag in pictures if tag.startswith("quant_start/")}
    ends = {tag.partition("/")[2] for tag in pictures if tag.startswith("quant_end/")}
    assert len(starts) == 3 and starts == ends
    histograms = {tag for tag in ask("plugin/histograms/tags")[RUN]}
    assert histograms == {f"quant_codes/{name}" for name in starts}
    name = next(name for name in starts if name.endswith(".weight"))
    weight = model.get_submodule(name.rpartition(".")[0]).weight
    for _, _, buckets in ask("plugin/histograms/histograms", run=RUN, tag=f"quant_codes/{name}"):
        assert (buckets[0][0], buckets[-1][1]) == (-2.5, 1.5)
        assert sum(count for _, _, count in buckets) == pytest.approx(weight.numel())
    image = ask("plugin/images/images", run=RUN, tag=f"quant_start/{min(starts)}", sample=0)
    assert ask(f"plugin/images/individualImage?{image[0]['query']}&x=1".replace("?x=", "&x="))[:4] == b"\x89PNG"
    (text,) = ask("plugin/text/text", run=RUN, tag="quantization/text_summary")
    for name in named_quantizers(quantized_layers(model)):
        assert f"<td>{name}</td>" in text["text"]
    assert "<table>" in text["text"] and "Most signal is lost in" in text["text"]


def test_tensorboard_serves_hyperparameters(served) -> None:
    ask, _ = served
    experiment = ask("plugin/hparams/experiment", request=json.dumps({"experimentName": ""}))
    infos = {info["name"] for info in experiment["hparamInfos"]}
    assert {"quant/weight_bits", "quant/quantizer", "quant/initializer"} <= infos
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert "final quant_error/mean" in metrics


def test_two_hundred_layers_stay_readable(make_trainer, tmp_path, capsys) -> None:
    class Deep(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(*(nn.Linear(3, 3) for _ in range(196)))
            for layer in self.tower:
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(super().forward(x))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="deep")
    trainer = make_trainer(quiet(log_figures=4), logger=logger, log_every_n_steps=1, max_steps=1)
    trainer.fit(Deep(), loader())
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    assert len(events.Tags()["images"]) <= 8 and len(events.Tags()["histograms"]) <= 4
    text = events.Tensors("quantization/text_summary")[0].tensor_proto.string_val[0].decode()
    errors = [float(line.split("|")[7]) for line in text.splitlines() if line.startswith("| ") and "e-" in line]
    assert len(errors) > 150 and errors == sorted(errors, reverse=True)


def test_validation_within_a_step_is_not_measured(make_trainer) -> None:
    class Loud(SmallNet):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self(100 * batch[0])

    class Errors(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
            self.seen.append(float(trainer.callback_metrics["quant_error/mean"]))

    runs = []
    for validation in (None, loader(shuffle=False)):
        torch.manual_seed(0)
        model, errors = Loud(), Errors()
        model.dropout.p = 0.0
        trainer = make_trainer(
            quiet(), errors, accumulate_grad_batches=2, val_check_interval=1, log_every_n_steps=1, max_epochs=1
        )
        trainer.fit(model, loader(shuffle=False), validation)
        runs.append(errors.seen)
    assert runs[0] == runs[1] and len(set(runs[0])) > 1


@pytest.mark.parametrize("setting", [{"damp_oscillation": 1.0}, {"freeze_oscillating": 0.01}])
def test_remedies_refuse_weights_that_are_normalized(make_trainer, setting: dict) -> None:
    callback = quiet(weight_quantizer={"name": "apot", "normalize": True}, skip=["stem"], **setting)
    with pytest.raises(MisconfigurationException, match="normalizes the weight of layer 'body' before"):
        make_trainer(callback).fit(SmallNet(), loader())
