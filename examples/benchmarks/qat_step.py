"""What quantization costs a training step: time and peak memory at 4 bits, relative to the float model.

python examples/benchmarks/qat_step.py                          # all models and contestants, on a GPU if there is one
python examples/benchmarks/qat_step.py --models resnet18 --contestants qinit chain --repeats 5
python examples/benchmarks/qat_step.py --cpu --keep-heap        # without the page faults of Linux

Every measurement is a process of its own: contestants take turns, and each ratio is of two neighbours. On a GPU, in
bf16-mixed, steps follow each other without waiting, as in training, and CUDA events time them. On a CPU glibc gives
large blocks back to the system when they are freed and pages them in anew, more or less often as the heap of a process
happens to lie; with --keep-heap it does not, in all processes. Peers come with `pip install "lightning-qinit[bench]"`;
one that is not installed is left out. All quantize the weight and the input of every convolution and linear layer:

- qinit: this package, LSQ, `kernels="auto"`; qinit-eager: `kernels="eager"`
- chain: LSQ written by hand as a chain of torch operations
- brevitas: QuantConv2d and QuantLinear, weights by their maximum, inputs by a learned scale
- torch.ao: its FakeQuantize modules with moving-average observers (fixed steps)
- torchao: FakeQuantizedLinear (fixed steps; it has no convolutions)
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from result import spread, write
from torch import Tensor, nn

BITS = 4
LEAST = 1.0  # seconds that all steps of a measurement take together
KEEP_HEAP = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000"}


class Block(nn.Module):
    """A transformer block whose projections are linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.second(x))))


class ViTTiny(nn.Module):
    """ViT-Tiny/16 at 224 pixels, with mean pooling."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.position = nn.Parameter(torch.randn(1, 196, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(x).mean(1))


class SmallLSTM(nn.Module):
    """Two LSTM layers over 96 steps of 7 series."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(7, 128, 2, batch_first=True), nn.Linear(128, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name)

    return make


IMAGES = (3, 224, 224)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (_torchvision("resnet18"), IMAGES),
    "mobilenet_v3_large": (_torchvision("mobilenet_v3_large"), IMAGES),
    "vit_tiny": (ViTTiny, IMAGES),
    "lstm": (SmallLSTM, (96, 7)),
}


def replace(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Put ``make(layer)`` in the place of every convolution and linear layer."""
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        new = make(layer)
        if new is not None:
            setattr(module.get_submodule(parent), child, new)
    return module


class Wrapped(nn.Module):
    """A layer on the results of two quantizers."""

    def __init__(self, layer: nn.Module, weight: nn.Module, inputs: nn.Module) -> None:
        super().__init__()
        self.layer, self.weight_quantizer, self.input_quantizer = layer, weight, inputs

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(self.input_quantizer(x), weight, self.layer.bias)
        return self.layer._conv_forward(self.input_quantizer(x), weight, self.layer.bias)


class ChainLSQ(nn.Module):
    """LSQ as it is usually written."""

    def __init__(self, low: int, high: int, step: Tensor) -> None:
        super().__init__()
        self.low, self.high, self.step = low, high, nn.Parameter(step)

    def forward(self, x: Tensor) -> Tensor:
        factor = (x[0].numel() * self.high) ** -0.5
        step = (self.step - self.step * factor).detach() + self.step * factor
        v = (x / step).clamp(self.low, self.high)
        return (v + (v.round() - v).detach()) * step


def qinit(model: nn.Module, x: Tensor, kernels: str = "auto") -> nn.Module:
    from lightning_qinit import calibrate, prepare

    prepare(model, weight_bits=BITS, activation_bits=BITS, first_last_bits=None, kernels=kernels)
    calibrate(model, [x[:2]])
    return model


def chain(model: nn.Module, x: Tensor) -> nn.Module:
    def make(layer: nn.Module) -> nn.Module:
        weight = layer.weight.detach()
        step = weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1)) / 2
        return Wrapped(layer, ChainLSQ(-8, 7, step), ChainLSQ(-8, 7, torch.tensor(0.2)))

    return replace(model, make)


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    quantizers = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": Int8ActPerTensorFloat}
    settings = {**quantizers, "weight_bit_width": BITS, "input_bit_width": BITS}

    def make(layer: nn.Module) -> nn.Module:
        bias = layer.bias is not None
        if isinstance(layer, nn.Linear):
            new = qnn.QuantLinear(layer.in_features, layer.out_features, bias, **settings)
        else:
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
            names = ("kernel_size", "stride", "padding", "dilation", "groups")
            shape = dict(zip(names, geometry, strict=True))
            new = qnn.QuantConv2d(layer.in_channels, layer.out_channels, bias=bias, **shape, **settings)
        new.load_state_dict(layer.state_dict(), strict=False)
        return new

    return replace(model, make)


def torch_ao(model: nn.Module, x: Tensor) -> nn.Module:
    from torch.ao.quantization import (
        FakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )

    def make(layer: nn.Module) -> nn.Module:
        signed = {"quant_min": -8, "quant_max": 7, "dtype": torch.qint8}
        weight = FakeQuantize(
            MovingAveragePerChannelMinMaxObserver, **signed, qscheme=torch.per_channel_symmetric, ch_axis=0
        )
        return Wrapped(layer, weight, FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=15))

    return replace(model, make)


def torchao(model: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    inputs = IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, "per_channel")

    def make(layer: nn.Module) -> nn.Module | None:
        return FakeQuantizedLinear.from_linear(layer, inputs, weights) if isinstance(layer, nn.Linear) else None

    return replace(model, make)


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "float": lambda model, x: model,
    "qinit": qinit,
    "qinit-eager": lambda model, x: qinit(model, x, "eager"),
    "chain": chain,
    "brevitas": brevitas,
    "torch.ao": torch_ao,
    "torchao": torchao,
}
ONLY = {"torchao": ("vit_tiny",), **dict.fromkeys(("chain", "brevitas", "torch.ao"), tuple(MODELS)[:3])}


def status(key: str) -> int:
    """A figure of this process in bytes, as Linux tells it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def timed(step: Callable[[], None], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def timed_on_gpu(step: Callable[[], None], count: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:], strict=False)]


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak bytes of a step of one contestant, in this process."""
    warnings.filterwarnings("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available() and not arguments.cpu
    layout = torch.channels_last if arguments.channels_last else torch.preserve_format
    device = torch.device("cuda" if cuda else "cpu")
    make, shape = MODELS[arguments.models[0]]
    x, target = torch.randn(arguments.batch, *shape), torch.randint(1000, (arguments.batch,)).to(device)
    model = CONTESTANTS[arguments.contestants[0]](make(), x).to(device, memory_format=layout).train()
    x = x.to(device, memory_format=layout)
    forward = torch.compile(model) if arguments.compile else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = F.cross_entropy(forward(x), target)
        loss.backward()
        optimizer.step()

    first, second = timed(step, 2)
    count = max(arguments.steps, int(LEAST / second))
    seconds = timed_on_gpu(step, count) if cuda else timed(step, count)
    state = sum(p.nbytes for p in model.parameters()) * 2  # with the momentum
    optimizer.zero_grad()
    gc.collect()
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        added = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmRSS")
        step()
        added = status("VmHWM") - before
    return {"seconds": statistics.median(seconds), "bytes": state + added, "first": first}


def run(model: str, contestant: str, arguments: argparse.Namespace) -> dict[str, float] | None:
    """The same in a new process; ``None`` if it fails, as where a peer is not installed."""
    command = [sys.executable, __file__, "--single", "--models", model, "--contestants", contestant]
    for name in ("batch", "steps", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += [
        f"--{name.replace('_', '-')}" for name in ("cpu", "compile", "channels_last") if getattr(arguments, name)
    ]
    environment = {**os.environ, **(KEEP_HEAP if arguments.keep_heap else {})}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        print(f"{model}, {contestant}: {result.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS)[1:])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=7, help="at least, of which the median counts, after two")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models, the float one too")
    parser.add_argument("--channels-last", action="store_true", help="images in that memory format")
    parser.add_argument("--keep-heap", action="store_true", help="let the C library keep what is freed (glibc, CPU)")
    parser.add_argument("--json", default="qat_step.json", help="where to write the result")
    parser.add_argument("--single", action="store_true", help="measure one contestant here and print JSON")
    arguments = parser.parse_args()
    if arguments.single:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for model in arguments.models:
        for contestant in arguments.contestants:
            if model not in ONLY.get(contestant, tuple(MODELS)):
                continue
            times, memory, firsts = [], [], []
            for _ in range(arguments.repeats):
                base, other = run(model, "float", arguments), run(model, contestant, arguments)
                if base is None or other is None:
                    break
                times.append(other["seconds"] / base["seconds"])
                memory.append(other["bytes"] / base["bytes"])
                firsts.append(other["first"])
            if times:
                row = {"model": model, "contestant": contestant, "time": times, "memory": memory, "first": firsts}
                rows.append(row)
                print(f"{model:20s} {contestant:12s} time {spread(times)}   memory {spread(memory)}", flush=True)
    write(arguments, rows)


if __name__ == "__main__":
    main()
