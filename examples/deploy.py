"""From a checkpoint of quickstart.py to a file that onnxruntime runs.

python examples/quickstart.py                            # trains, and keeps checkpoints under runs/
python examples/deploy.py                                # the newest of them
python examples/deploy.py --checkpoint path/to/it.ckpt --latency resnet18

Prints what the integers save, whether onnxruntime gives the module's answers over the test set, and how long INT8 takes
relative to float on this CPU.
"""

import argparse
import statistics
import time
from pathlib import Path

import onnxruntime
import torch
from task import Classifier, Images
from torch import Tensor, nn

from lightning_qinit import calibrate, load_from_checkpoint, prepare
from lightning_qinit.export import export_onnx, format_size, size_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of a quantized Classifier; the newest under --logs if not given")
    parser.add_argument("--logs", default="runs", help="folder that quickstart.py wrote")
    parser.add_argument("--data", default="digits", choices=["digits", "fashion-mnist", "cifar10"])
    parser.add_argument("--root", default="data", help="folder of torchvision's datasets, downloaded if absent")
    parser.add_argument("--out", default="classifier.onnx")
    parser.add_argument("--batchnorm", action="store_true", help="fold BatchNorm into steps where codes have 8 bits")
    parser.add_argument("--latency", default="resnet18", help="model of torchvision to time in 8 bits; '' for none")
    parser.add_argument("--size", type=int, default=224, help="of the images of that model")
    arguments = parser.parse_args()

    checkpoint = arguments.checkpoint or newest(arguments.logs, arguments.data)
    data = Images(arguments.data, arguments.root)
    model = load_from_checkpoint(Classifier, checkpoint, channels=data.channels).eval()
    data.setup("test")
    batches = [(x, y) for x, y in data.test_dataloader()]
    dynamic = {"x": {0: torch.export.Dim("batch")}}
    sample = batches[0][0]
    report = export_onnx(model, sample, arguments.out, batchnorm=arguments.batchnorm, dynamic_shapes=dynamic)
    print(f"{checkpoint} -> {arguments.out}\n\n{format_size(size_report(model))}\n")
    if report.zero_points:
        print(f"Rounding the offsets moved the outputs by {100 * report.change:.2f} %.")
    compare(model, arguments.out, batches)
    if arguments.latency:
        latency(arguments.latency, torch.randn(1, 3, arguments.size, arguments.size), Path(arguments.out).parent)


def newest(logs: str, data: str) -> Path:
    found = sorted(Path(logs).glob(f"{data}-optimal/**/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"No checkpoint under {logs}/{data}-optimal: run examples/quickstart.py first.")
    return found[-1]


def session(path: str | Path, optimized: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answer(session: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@torch.no_grad()
def compare(model: nn.Module, path: str, batches: list[tuple[Tensor, Tensor]]) -> None:
    labels = torch.cat([y for _, y in batches])
    expected = torch.cat([model(x) for x, _ in batches])
    title = f"over {len(labels)} test samples"
    print(f"{title:28}{'accuracy':>10}{'same class':>12}{'largest difference':>20}")
    print(f"{'torch, fake quantization':28}{100 * (expected.argmax(1) == labels).double().mean():9.2f}%")
    for name, optimized in (("onnxruntime, as written", False), ("onnxruntime, optimized", True)):
        runtime = session(path, optimized)
        outputs = torch.cat([answer(runtime, x) for x, _ in batches])
        accuracy = 100 * (outputs.argmax(1) == labels).double().mean()
        same = int((outputs.argmax(1) == expected.argmax(1)).sum())
        print(f"{name:28}{accuracy:9.2f}%{same:12}{(outputs - expected).abs().max() / expected.abs().max():20.1e}")


def latency(name: str, x: Tensor, folder: Path) -> None:
    """Milliseconds of a model in float and in 8 bits, taking turns."""
    from torchvision.models import get_model

    model = get_model(name).eval()
    torch.onnx.export(model, (x,), folder / "float.onnx", dynamo=True, verbose=False, external_data=False)
    prepare(model, weight_bits=8, activation_bits=8)
    calibrate(model, [x])
    export_onnx(model, x, folder / "int8.onnx", batchnorm=True)
    runtimes = {kind: session(folder / f"{kind}.onnx", True) for kind in ("float", "int8")}
    for runtime in runtimes.values():
        answer(runtime, x)
    times: dict[str, list[float]] = {kind: [] for kind in runtimes}
    for _ in range(20):
        for kind, runtime in runtimes.items():
            begin = time.perf_counter()
            answer(runtime, x)
            times[kind].append(1e3 * (time.perf_counter() - begin))
    ratios = sorted(fast / slow for fast, slow in zip(times["float"], times["int8"], strict=True))
    sizes = [(folder / f"{kind}.onnx").stat().st_size / 1e6 for kind in runtimes]
    print(
        f"\n{name}, one image, one thread: float {statistics.median(times['float']):.1f} ms, "
        f"INT8 {statistics.median(times['int8']):.1f} ms, "
        f"{statistics.median(ratios):.2f} times as fast ({ratios[2]:.2f}-{ratios[-3]:.2f}); "
        f"files {sizes[0]:.1f} and {sizes[1]:.1f} MB; CPU with {', '.join(instructions()) or 'no known extensions'}."
    )


def instructions() -> list[str]:
    """Of those that matter to integer kernels, which Linux says the CPU has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8") if flag in flags]


if __name__ == "__main__":
    main()
