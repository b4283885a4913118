"""Bits of each weight, chosen for their average."""

import itertools

import pytest
import torch
from conftest import Wide, loader, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qinit import calibrate, prepare
from lightning_qinit.calibration.allocate import allocate_bits
from lightning_qinit.functional import optimal_scale
from lightning_qinit.insertion import named_quantizers, quantized_layers


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(1, 5), average=st.floats(2, 8))
def test_allocation_is_the_best_of_all(seed: int, layers: int, average: float) -> None:
    torch.manual_seed(seed)
    widths = range(2, 9)
    sizes = torch.randint(1, 1000, (layers,)).tolist()
    errors = [sorted((torch.rand(7).square() * torch.rand(1)).tolist(), reverse=True) for _ in sizes]
    chosen = allocate_bits(errors, sizes, widths, average)

    def total(bits: tuple[int, ...]) -> float:
        return sum(row[b - 2] for row, b in zip(errors, bits, strict=True))

    def fits(bits: tuple[int, ...]) -> bool:
        return sum(b * n for b, n in zip(bits, sizes, strict=True)) <= average * sum(sizes) * (1 + 1e-12)

    best = min(total(bits) for bits in itertools.product(widths, repeat=layers) if fits(bits))
    assert fits(tuple(chosen)) and total(tuple(chosen)) == pytest.approx(best, rel=1e-12)


def test_allocation_of_many_layers_is_quick_and_ties_take_fewer_bits() -> None:
    torch.manual_seed(0)
    errors = [(torch.rand(1) * 4.0 ** -torch.arange(7)).tolist() for _ in range(200)]
    sizes = torch.randint(1000, 1_000_000, (200,)).tolist()
    chosen = allocate_bits(errors, sizes, range(2, 9), 3.5)
    assert 3.49 < sum(b * n for b, n in zip(chosen, sizes, strict=True)) / sum(sizes) <= 3.5
    assert allocate_bits([[0.0] * 7] * 3, [5, 5, 5], range(2, 9), 8.0) == [2, 2, 2]
    with pytest.raises(ValueError, match="`average_bits` must be at least 2, got 1.5"):
        allocate_bits([[0.0] * 7], [5], range(2, 9), 1.5)


def test_average_bits_spends_where_the_error_is(make_trainer) -> None:
    torch.manual_seed(0)
    model, callback = Wide(), quiet(average_bits=3.0, overrides={"body": {"weight_bits": 5}})
    with torch.no_grad():
        model.hidden.weight.sign_().mul_(0.1)  # two bits lose nothing
    trainer = make_trainer(callback, max_steps=1)
    trainer.fit(model, loader())
    bits = {row.name: row.bits for row in callback.report}
    assert bits["stem.weight"] == bits["head.weight"] == 8 and bits["body.weight"] == 5  # set, so not counted
    assert bits["hidden.weight"] == 2 and bits["hidden.input"] == 4
    quantizer = model.hidden.weight_quantizer
    assert quantizer.n_bits == 2 and int(quantizer.bits) == 2

    torch.manual_seed(0)
    model, callback = Wide(), quiet(average_bits=3.5, first_last_bits=None)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(callback, max_steps=1).fit(model, loader())
    chosen = {row.layer: row.bits for row in callback.report if row.what == "weight"}
    sizes = {name: weights[f"{name}.weight"].numel() for name in chosen}
    errors = {}
    for name in chosen:
        levels = [named_quantizers(quantized_layers(model))[f"{name}.weight"].level_set(b, True) for b in range(2, 9)]
        weight = weights[f"{name}.weight"]
        fits = [optimal_scale(weight, level_set, channel_axis=0) for level_set in levels]
        errors[name] = [float(fit.error.sum() / weight.double().square().sum()) for fit in fits]

    def total(bits: tuple[int, ...]) -> float:
        return sum(errors[name][b - 2] for name, b in zip(chosen, bits, strict=True))

    budget = 3.5 * sum(sizes.values())
    best = min(
        (
            bits
            for bits in itertools.product(range(2, 9), repeat=4)
            if sum(map(int.__mul__, bits, sizes.values())) <= budget
        ),
        key=total,
    )
    assert tuple(chosen.values()) == best


def test_average_bits_under_a_criterion_that_some_weights_have_no_importance_for() -> None:
    torch.manual_seed(0)
    # three equal weights; hessian knows nothing of the recurrent one, so it counts with the mean importance
    layers = nn.Sequential(nn.Linear(40, 40), nn.RNN(40, 40, bias=False), nn.Linear(40, 40))
    with torch.no_grad():
        layers[1].weight_ih_l0.copy_(layers[0].weight)
        layers[1].weight_hh_l0.copy_(layers[0].weight)
        layers[2].weight.copy_(layers[0].weight)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        hidden, _ = module[1](x)
        return module[0](x) + module[2](x) + hidden

    prepare(layers, activation_bits=None, first_last_bits=None)
    rows = calibrate(layers, [torch.randn(6, 5, 40)], step=run, criterion="hessian", average_bits=4.0)
    assert {row.bits for row in rows} == {4}
