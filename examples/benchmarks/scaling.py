"""How the cost of calibration and of a training step grows with layers, channels, bits and batches.

python examples/benchmarks/scaling.py

A tower of convolutions with BatchNorm and ReLU. One thing grows at a time; times are relative to the float model of the
same size: calibration to the same forward passes, the training step to a float step.
"""

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from result import write
from torch import Tensor, nn

from lightning_qinit import calibrate, prepare

BASE = {"layers": 4, "channels": 32, "bits": 4, "batches": 4}
GROWTH = {"layers": (4, 8, 16), "channels": (32, 64, 128), "bits": (2, 4, 8), "batches": (4, 16, 64)}


def tower(layers: int, channels: int) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for _ in range(layers - 2):
        parts += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def measure(layers: int, channels: int, bits: int, batches: int, batch: int, repeats: int) -> dict[str, float]:
    float_model = tower(layers, channels).eval()
    data = [torch.randn(batch, 3, 32, 32) for _ in range(batches)]

    @torch.no_grad()
    def forward() -> None:
        for x in data:
            float_model(x)

    calibrations, models = [], []
    for _ in range(repeats):
        models.append(prepare(copy.deepcopy(float_model), weight_bits=bits, activation_bits=bits))
        alone = seconds(forward)
        calibrations.append(seconds(lambda: calibrate(models[-1], data)) / alone)
    plain, quantized = stepper(float_model.train(), data[0]), stepper(models[-1].train(), data[0])
    steps = []
    for warm in (True, True, *[False] * 3 * repeats):
        alone = seconds(plain)
        ratio = seconds(quantized) / alone
        if not warm:
            steps.append(ratio)
    return {"calibration": statistics.median(calibrations), "step": statistics.median(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--json", default="scaling.json", help="where to write the result")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    measure(**BASE, batch=arguments.batch, repeats=1)  # warm up
    rows = []
    for grown, sizes in GROWTH.items():
        for size in sizes:
            result = measure(**{**BASE, grown: size}, batch=arguments.batch, repeats=arguments.repeats)
            rows.append({"grown": grown, "size": size, **result})
            print(
                f"{grown:9s} {size:4d}   calibration {result['calibration']:6.2f}   step {result['step']:5.2f}",
                flush=True,
            )
    write(arguments, rows)


if __name__ == "__main__":
    main()
