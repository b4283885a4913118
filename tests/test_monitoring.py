"""Metrics and the report against their formulas."""

import math

import pytest
import torch
from torch import nn

from lightning_qinit import QuantizationError, SignalToQuantizationNoiseRatio, calibrate, prepare
from lightning_qinit.functional import fake_quantize, optimal_scale, uniform_levels
from lightning_qinit.monitoring import format_report
from lightning_qinit.monitoring.metrics import sqnr_db_compute


def test_metrics_over_batches_equal_the_formula_over_all() -> None:
    x, q = torch.randn(10, 20), torch.randn(10, 20)
    error, ratio = QuantizationError(), SignalToQuantizationNoiseRatio()
    for a, b in zip(q.split(3), x.split(3), strict=True):
        error.update(a, b)
        ratio.update(a, b)
    expected = float((q.double() - x.double()).square().sum() / x.double().square().sum())
    assert float(error.compute()) == pytest.approx(expected, rel=1e-5)
    assert float(ratio.compute()) == pytest.approx(-10 * math.log10(expected), rel=1e-5)
    error.reset()
    assert float(error(x, x)) == 0


def test_metrics_merge_as_ranks_do() -> None:
    x, q = torch.randn(2, 50), torch.randn(2, 50)
    parts = [QuantizationError(), QuantizationError()]
    for part, a, b in zip(parts, q, x, strict=True):
        part.update(a, b)
    assert all(reduction is not None for reduction in parts[0]._reductions.values())
    parts[0].merge_state(parts[1])
    assert float(parts[0].compute()) == pytest.approx(float(QuantizationError()(q, x)), rel=1e-6)


def test_metrics_refuse_different_shapes_and_take_half_precision() -> None:
    with pytest.raises(ValueError, match="must have the same shape, got"):
        QuantizationError()(torch.zeros(2), torch.zeros(3))
    x = torch.full((4096,), 3.0, dtype=torch.float16)
    assert float(QuantizationError()(x + 1, x)) == pytest.approx(1 / 9)
    assert math.isinf(float(sqnr_db_compute(torch.tensor(0.0), torch.tensor(1.0))))


@pytest.mark.parametrize("metric", [QuantizationError, SignalToQuantizationNoiseRatio])
def test_metrics_of_what_is_not_a_number_are_none(metric: type[QuantizationError]) -> None:
    assert math.isnan(float(metric()(torch.tensor([math.nan, 1.0]), torch.ones(2))))


def test_report_rows_are_what_the_tensors_say() -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(200, 40)
    weight = model[0].weight.detach().clone()
    prepare(model, weight_bits=3, activation_bits=2, first_last_bits=None)
    rows = {row.name: row for row in calibrate(model, [x])}
    row, levels = rows["0.weight"], uniform_levels(3, signed=True)
    fit = optimal_scale(weight, levels, channel_axis=0)
    energy = float(weight.double().square().sum())
    assert row.error == pytest.approx(float(fit.error.sum()) / energy)
    assert row.sqnr_db == pytest.approx(-10 * math.log10(row.error))
    assert row.step == pytest.approx(float(fit.scale.mean())) and row.steps == 8
    minmax = torch.maximum(weight.amax(1) / 3, -weight.amin(1) / 4)
    lsq = 2 * weight.abs().mean(1) / 3**0.5
    for name, step in (("minmax", minmax), ("lsq", lsq)):
        error = (fake_quantize(weight.double(), step, levels, 0) - weight).square().sum() / energy
        assert row.alternatives[name] == pytest.approx(float(error), rel=1e-5)
    beyond = (weight > fit.scale[:, None] * 3.5) | (weight < fit.scale[:, None] * -4.5)
    assert row.clipped == pytest.approx(float(beyond.double().mean()))
    assert not rows["2.input"].signed and rows["2.input"].steps == 1
    text = format_report(list(rows.values()), ["unseen.weight"], ["table.weight"])
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "unseen.weight" in text and "table.weight" in text


@pytest.mark.parametrize("metric", [QuantizationError(), SignalToQuantizationNoiseRatio()], ids=["error", "sqnr"])
def test_metrics_reset_and_plot(metric: QuantizationError) -> None:
    pytest.importorskip("matplotlib").use("agg")
    x = torch.randn(50)
    first = metric(x + 0.1, x)
    metric.reset()
    assert float(metric(x + 0.1, x)) == float(first)
    figure, axes = metric.plot([first, metric.compute()])
    assert axes.lines
    figure.clear()
