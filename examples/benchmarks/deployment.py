"""Whether onnxruntime gives the answers of the fake-quantized module, network by network and layer by layer.

python examples/benchmarks/deployment.py

Two counts of inputs that are rounded to another level, with optimizations off, are a property of each layer: ``own`` of
the quantizer alone, given the very same values, and ``layer`` of the float operations between two quantizers as well.
``cascaded`` is one of the network: a flip changes what the layers after it compute, which moves further values. Each is
given per million elements of all inputs, and of the worst of them. ``digits`` is the network of the quickstart, trained
in float and then quantized, over all digits, those of training too: the test images alone are too few to count rare
values in (accuracy is theirs). The others have random weights and inputs, so that their classes say little; ``values``
is one quantizer of many normal values. ``raw`` and ``optimized`` are the same file; ``integers`` has BatchNorm folded,
for integer kernels.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flips import Flips, count_flips, session
from result import write
from runs import bare_trainer, hush
from torch import Tensor, nn
from torchvision import models

from lightning_qinit import QuantInitCallback, calibrate, prepare
from lightning_qinit.export import export_onnx, snap_offsets

COUNTS = ("own", "layer", "cascaded")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def vit() -> nn.Module:
    net = models.VisionTransformer(64, 16, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=10)
    nn.init.normal_(net.heads.head.weight, 0, 0.1)  # which starts at zero
    return net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "values": (lambda: nn.Sequential(nn.Linear(625_000, 10)), (625_000,)),
    "resnet18": (lambda: models.resnet18(num_classes=10), (3, 64, 64)),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), (3, 64, 64)),
    "vit": (vit, (3, 64, 64)),
    "lstm": (Recurrent, (96, 7)),
}


def network(name: str, quantizer: str, bits: int, samples: int) -> tuple[nn.Module, Tensor, Tensor | None]:
    """Quantized, with data and the classes of the last of it, if it has any."""
    if name == "digits":
        return trained_on_digits(quantizer, bits)
    make, shape = NETWORKS[name]
    net, x = make().train(), torch.randn(samples, *shape)
    with torch.no_grad():
        for _ in range(20):  # statistics of BatchNorm
            net(x)
    ends = None if name == "values" else 8
    prepare(net.eval(), weight_bits=bits, activation_bits=bits, quantizer=quantizer, first_last_bits=ends)
    calibrate(net, [x])
    return net, x, None


def trained_on_digits(quantizer: str, bits: int) -> tuple[nn.Module, Tensor, Tensor]:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from task import Classifier, Images

    data, net = Images("digits"), Classifier(1)
    qinit = QuantInitCallback(weight_bits=bits, activation_bits=bits, quantizer=quantizer, print_report=False)
    for epochs, callbacks in ((6, []), (2, [qinit])):
        bare_trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu").fit(net, data)
        net.learning_rate /= 5
    x = torch.stack([x for part in (data.train, data.val, data.test) for x, _ in part])
    return net.eval(), x, torch.stack([y for _, y in data.test])


@torch.no_grad()
def measure(name: str, quantizer: str, bits: int, samples: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    net, x, y = network(name, quantizer, bits, samples)
    snap_offsets(net)
    path = folder / "network.onnx"
    export_onnx(net, x, path)
    flips, difference = count_flips(net, x, path)
    expected = net(x)
    row = {"network": name, "quantizer": quantizer, "bits": bits, "given_inputs": difference, **summary(flips)}
    export_onnx(net, x, folder / "folded.onnx", batchnorm=True)  # for the integer kernels
    # onnxruntime's rewriting of signed 8-bit inputs fails across a reshape or a transposition
    more = {"session_qdqisint8allowed": "1"} if name in ("vit", "lstm") else {}
    folded = session(folder / "folded.onnx", True, **more)
    runtimes = {"raw": session(path), "optimized": session(path, True, **more), "integers": folded}
    for kind, runtime in runtimes.items():
        output = torch.from_numpy(runtime.run(None, {runtime.get_inputs()[0].name: x.numpy()})[0])
        row[f"{kind}_difference"] = float((output - expected).abs().max() / expected.abs().max())
        row[f"{kind}_same"] = float((output.argmax(1) == expected.argmax(1)).double().mean())
        row[f"{kind}_accuracy"] = accuracy(output, y)
    row["accuracy"] = accuracy(expected, y)
    return row | {"inputs": [asdict(flip) for flip in flips]}


def accuracy(output: Tensor, y: Tensor | None) -> float | None:
    return None if y is None else float((output[-len(y) :].argmax(1) == y).double().mean())


def summary(flips: list[Flips]) -> dict[str, float]:
    """Per million elements: of all inputs, and of the worst."""
    elements = sum(flip.elements for flip in flips)
    rates: dict[str, float] = {"elements": elements, "difference": max(flip.difference for flip in flips)}
    for count in COUNTS:
        rates[count] = 1e6 * sum(getattr(flip, count) for flip in flips) / elements
        rates[f"{count}_worst"] = max(1e6 * getattr(flip, count) / flip.elements for flip in flips)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["digits", *NETWORKS], choices=["digits", *NETWORKS])
    parser.add_argument("--quantizers", nargs="+", default=["lsq", "lsq+"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--samples", type=int, default=16, help="of networks with random weights")
    parser.add_argument("--json", default="deployment.json", help="where to write the result")
    arguments = parser.parse_args()
    hush()
    print(f"{'':29}{'flips per million: all (worst input)':^57}{'same class':>27}{'difference':>20}")
    print(
        f"{'network':29}" + "".join(f"{count:>19}" for count in COUNTS),
        f"{'raw':>8}{'opt.':>9}{'int.':>9}{'layer':>10}{'raw':>10}",
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            for quantizer in arguments.quantizers:
                for bits in arguments.bits:
                    row = measure(name, quantizer, bits, arguments.samples, Path(folder))
                    rows.append(row)
                    rates = "".join(f"{row[c]:9.1f} ({row[f'{c}_worst']:7.0f})" for c in COUNTS)
                    same = f"{100 * row['raw_same']:8.2f}%{100 * row['optimized_same']:8.2f}%"
                    same += f"{100 * row['integers_same']:8.2f}%"
                    differences = f"{row['difference']:10.1e}{row['raw_difference']:10.1e}"
                    print(f"{name:19}{quantizer:5}{bits:2} bits{rates}{same}{differences}", flush=True)
    write(arguments, rows)


if __name__ == "__main__":
    main()
