"""How fast steps of least error are found, and how good they are, for the same tensors and the same levels.

python examples/benchmarks/calibration.py                      # a million and ten million values
python examples/benchmarks/calibration.py --values 100000000   # a hundred million
python examples/benchmarks/calibration.py --network resnet50   # all weights of a network
python examples/benchmarks/calibration.py --passes resnet18    # calibration of a network against its forward passes

All use the symmetric levels `-(2^(b-1) - 1) .. 2^(b-1) - 1`. Times and errors (sums of squares) are relative to those
of `optimal_scale` in the same run. Peers come with `pip install "lightning-qinit[bench]"`; one that is not installed is
left out:

- brevitas: its weight quantizers that search for the least squared error
- torch.ao: HistogramObserver (per tensor only)
- modelopt: MseCalibrator, 39 candidates as it comes, and its own quantizer
- modelopt, in place: the same calibrator with three operations in place of that quantizer, a time to aim at
- grid: a hundred steps up to the one that clips nothing, in plain torch
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from result import spread, write
from runs import seconds
from torch import Tensor

from lightning_qinit import calibrate, prepare
from lightning_qinit.functional import optimal_scale, uniform_levels

Search = Callable[[Tensor, int, bool], Tensor]


def qinit(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    return optimal_scale(x, uniform_levels(bits, True, narrow=True), 0 if per_channel else None).scale


def grid(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    high = 2 ** (bits - 1) - 1
    x = x if per_channel else x.reshape(1, -1)
    widest = x.abs().amax(1, keepdim=True) / high
    best, found = torch.full_like(widest, torch.inf), widest.clone()
    for k in range(1, 101):
        step = widest * k / 100
        error = ((x / step).round_().clamp_(-high, high).mul_(step) - x).square_().sum(1, keepdim=True)
        found = torch.where(error < best, step, found)
        best = torch.minimum(error, best)
    return found[:, 0] if per_channel else found[0, 0]


def brevitas(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloatMSE, Int8WeightPerTensorFloatMSE

    quantizer = Int8WeightPerChannelFloatMSE if per_channel else Int8WeightPerTensorFloatMSE
    layer = qnn.QuantLinear(x.shape[1], x.shape[0], bias=False, weight_quant=quantizer, weight_bit_width=bits)
    with torch.no_grad():
        layer.weight.copy_(x)
        scale = layer.quant_weight().scale
    return scale.flatten() if per_channel else scale.reshape(())


def torch_ao(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    from torch.ao.quantization import HistogramObserver

    if per_channel:
        raise NotImplementedError("per tensor only")
    high = 2 ** (bits - 1) - 1
    observer = HistogramObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-high, quant_max=high)
    observer(x)
    return observer.calculate_qparams()[0].reshape(())


def modelopt(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

    return _calibrated(x, bits, per_channel, lambda x, amax: fake_tensor_quant(x, amax, None, bits, False, True))


def modelopt_in_place(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    high = 2 ** (bits - 1) - 1
    return _calibrated(
        x, bits, per_channel, lambda x, amax: (x * (high / amax)).round_().clamp_(-high, high).mul_(amax / high)
    )


def _calibrated(x: Tensor, bits: int, per_channel: bool, quantize: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """By ModelOpt's calibrator, with a function that quantizes up to a greatest value."""
    from modelopt.torch.quantization.calib import MseCalibrator

    high = 2 ** (bits - 1) - 1
    amax = x.abs().amax(1, keepdim=True) if per_channel else x.abs().amax()
    calibrator = MseCalibrator(amax, axis=0 if per_channel else None, quant_func=quantize)
    calibrator.collect(x)
    return calibrator.compute_amax().reshape(-1 if per_channel else ()) / high


CONTESTANTS: dict[str, Search] = {
    "qinit": qinit,
    "grid": grid,
    "brevitas": brevitas,
    "torch.ao": torch_ao,
    "modelopt": modelopt,
    "modelopt, in place": modelopt_in_place,
}


def error_of(x: Tensor, scale: Tensor, bits: int) -> float:
    """The sum of squared errors, in float64."""
    high, step = 2 ** (bits - 1) - 1, scale.double().reshape(-1, 1)
    total = 0.0
    for rows, steps in zip(x.split(64), step.expand(len(x), 1).split(64), strict=True):
        rows = rows.double()
        total += float(((rows / steps).round_().clamp_(-high, high).mul_(steps) - rows).square_().sum())
    return total


def search(tensors: list[Tensor], bits: int, per_channel: bool, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and errors of every contestant, in turns."""
    results: dict[str, dict[str, list[float]]] = {}
    failed = set()
    for _ in range(repeats):
        for name, contestant in CONTESTANTS.items():
            if name in failed:
                continue
            begin = time.perf_counter()
            try:
                scales = [contestant(x, bits, per_channel) for x in tensors]
            except NotImplementedError:
                failed.add(name)
                continue
            except ImportError as error:
                print(f"{name} is not there: {error}")
                failed.add(name)
                continue
            took = time.perf_counter() - begin
            error = sum(error_of(x, scale, bits) for x, scale in zip(tensors, scales, strict=True))
            row = results.setdefault(name, {"seconds": [], "errors": []})
            row["seconds"].append(took)
            row["errors"].append(error)
    return results


def passes(name: str, batch: int, count: int, repeats: int) -> dict[str, list[float]]:
    """The time of a whole calibration, relative to that of the same forward passes alone."""
    batches = [torch.randn(batch, 3, 224, 224) for _ in range(count)]
    calibrated(name, batches[:1])  # warm up
    ratios = []
    for _ in range(repeats):
        alone, took = calibrated(name, batches)
        ratios.append(took / alone)
        print(f"{name}, {count} batches of {batch}: forward {alone:.2f} s, calibration {ratios[-1]:.2f} times that")
    print(f"calibration {spread(ratios)}")
    return {"calibration": ratios}


def calibrated(name: str, batches: list[Tensor]) -> tuple[float, float]:
    """Seconds of a network's forward passes and of its calibration.

    Each batch runs through the float network just before calibration takes it, for machines whose pace drifts.
    """
    import torchvision

    model = torchvision.models.get_model(name).eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.num_batches_tracked.fill_(1)  # as if trained: it normalizes with its own statistics
    float_model, alone = copy.deepcopy(model), 0.0

    def timed() -> Iterator[Tensor]:
        nonlocal alone
        for x in batches:
            alone += seconds(lambda x=x: float_model(x))
            yield x

    prepare(model)
    both = seconds(lambda: calibrate(model, timed()))  # which runs without gradients
    return alone, both - alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", nargs="+", type=int, default=[1_000_000, 10_000_000])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--network", help="a torchvision network, whose weights are taken per channel instead")
    parser.add_argument("--passes", help="a torchvision network to calibrate as a whole instead")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="calibration.json", help="where to write the result")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases: list[tuple[str, list[Tensor], bool]] = []
    rows: list[dict[str, object]] = []
    if arguments.passes:
        rows.append(dict(passes(arguments.passes, arguments.batch, arguments.batches, arguments.repeats)))
    elif arguments.network:
        import torchvision

        weights = [p.detach() for p in torchvision.models.get_model(arguments.network).parameters() if p.dim() > 1]
        cases.append((arguments.network, [w.flatten(1) for w in weights], True))
    else:
        for count in arguments.values:
            x = torch.distributions.Laplace(0.0, 1.0).sample((count // 1000, 1000))
            cases += [(f"{count} values", [x], False), (f"{count} values", [x], True)]
    for name, tensors, per_channel in cases:
        for bits in arguments.bits:
            kind = "per channel" if per_channel else "per tensor"
            results = search(tensors, bits, per_channel, arguments.repeats)
            base = results["qinit"]
            for contestant, result in results.items():
                times = [a / b for a, b in zip(result["seconds"], base["seconds"], strict=True)]
                error = result["errors"][0] / base["errors"][0]
                rows.append({"case": name, "kind": kind, "bits": bits, "contestant": contestant, **result})
                print(
                    f"{name:18s} {kind:11s} {bits} bits  {contestant:18s} {statistics.median(result['seconds']):8.3f} s"
                    f"  time {spread(times, 7)}  error {error:.5f}",
                    flush=True,
                )
    write(arguments, rows)


if __name__ == "__main__":
    main()
