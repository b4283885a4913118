"""What compiling the quantizers' kernels adds to a run: to the first, to the next with the cache, and to a dry one.

python examples/benchmarks/compilation.py

Every run is a process of its own: a Trainer that quantizes a network of torchvision and trains a few steps, with
`kernels="auto"` and a cache folder that starts empty, and with `kernels="eager"`, which compiles nothing. Seconds are
those of `fit`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from result import write
from runs import apart, bare_trainer, hush, seconds
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

from lightning_qinit import QuantInitCallback

BATCHES, BATCH, SIZE = 2, 8, 64


class Classifier(pl.LightningModule):
    def __init__(self, network: str) -> None:
        super().__init__()
        self.net = get_model(network, num_classes=10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(network: str, kernels: Any, dry: bool) -> float:
    """Train in this process; the seconds that it takes."""
    hush()
    torch.manual_seed(0)
    x, y = torch.randn(BATCHES * BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCHES * BATCH,))
    qinit = QuantInitCallback(kernels=kernels, calibration_batches=BATCHES, print_report=False)
    trainer = bare_trainer(max_epochs=2, fast_dev_run=dry, callbacks=[qinit])
    return seconds(lambda: trainer.fit(Classifier(network), DataLoader(TensorDataset(x, y), BATCH)))


def fit_apart(cache: str, network: str, kernels: str, dry: bool = False) -> float:
    """:func:`fit` in a process of its own."""
    took = apart(__file__, "--fit", network, kernels, int(dry), TORCHINDUCTOR_CACHE_DIR=cache)
    return float(took["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "mobilenet_v3_small"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="compilation.json", help="where to write the result")
    parser.add_argument("--fit", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fit:
        network, kernels, dry = arguments.fit
        print(json.dumps({"seconds": fit(network, kernels, dry == "1")}))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'network':22}{'eager':>9}{'first':>9}{'next':>9}{'adds':>17}{'':9}{'dry run caches':>16}")
    for network in arguments.networks:
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as cache:
                fit_apart(empty, network, "auto", dry=True)
                files = sum(path.is_file() for path in Path(empty).rglob("*"))
                first, following, eager = (fit_apart(cache, network, kernels) for kernels in ("auto", "auto", "eager"))
            rows.append({"network": network, "eager": eager, "first": first, "next": following, "dry_files": files})
            took = "".join(f"{value:8.1f}s" for value in (eager, first, following))
            added = "".join(f"{value - eager:8.1f}s" for value in (first, following))
            print(f"{network:22} {took}{added:>26}{files:10} files", flush=True)
    write(arguments, rows)


if __name__ == "__main__":
    main()
