"""The data of the study, as tensors in memory: what is trained on, what choices are made on, what is reported."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets of three parts that do not overlap.

    Attributes:
        train: what is trained on.
        held_out: a part of the training data that choices (the learning rate) are made on.
        test: what is reported.
    """

    train: Pair
    held_out: Pair
    test: Pair


def _part(x: Tensor, y: Tensor, index: Tensor | slice) -> Pair:
    return x[index], y[index]


def digits(root: Path) -> Data:
    """scikit-learn's 1,797 scans of 8x8; no official split, so a seeded one."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16 - 0.3) / 0.38
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Data(*(_part(x, y, part) for part in order.split([1200, 197, 400])))


def fashion(root: Path) -> Data:
    """Fashion-MNIST; the last 5,000 training images are held out, and 2,000 test images reported."""
    from torchvision.datasets import FashionMNIST

    def load(train: bool) -> Pair:
        found = FashionMNIST(str(root), train=train, download=True)
        return (found.data[:, None].float() / 255 - 0.286) / 0.353, found.targets

    x, y = load(True)
    return Data(_part(x, y, slice(-5000)), _part(x, y, slice(-2000, None)), _part(*load(False), slice(2000)))


def cifar10(root: Path, tested: int = 10000) -> Data:
    """CIFAR-10 from ``cifar10.npz`` (``x_train``, ``y_train``, ``x_test``, ``y_test``; uint8, height, width, channels).

    The last 5,000 training images are held out; the first ``tested`` test images are reported.
    """
    arrays = np.load(root / "cifar10.npz")
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def load(kind: str, index: slice) -> Pair:
        x = torch.from_numpy(arrays[f"x_{kind}"][index]).permute(0, 3, 1, 2)
        return (x.float() / 255 - mean) / std, torch.from_numpy(arrays[f"y_{kind}"][index])

    return Data(load("train", slice(-5000)), load("train", slice(-5000, None)), load("test", slice(tested)))


def speech(root: Path) -> Data:
    """Spoken digits from ``fsdd.npz`` as log spectrograms of 32 bands and 63 frames; the official test split."""
    arrays = np.load(root / "fsdd.npz")
    sound = torch.from_numpy(arrays["x"]).float() / 2**15
    window = torch.hann_window(256)
    power = torch.stft(sound, 256, 128, window=window, return_complex=True).abs().square()[:, 1:]
    x = (power.unflatten(1, (32, 4)).mean(2) + 1e-6).log()
    y, is_test = torch.from_numpy(arrays["y"]).long(), torch.from_numpy(arrays["is_test"]).bool()
    train = (~is_test).nonzero()[:, 0]
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    mean, std = x[train].mean((0, 2), keepdim=True), x[train].std((0, 2), keepdim=True)
    x = (x - mean) / std
    return Data(_part(x, y, train[300:]), _part(x, y, train[:300]), _part(x, y, is_test.nonzero()[:, 0]))


def chars(root: Path) -> Data:
    """Next characters of ``tinyshakespeare.txt``, in windows of 32; the last tenth is the test text.

    Reported on 300 windows spread over it; the tenth before it is held out.
    """
    text = (root / "tinyshakespeare.txt").read_text()
    code = {character: k for k, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([code[character] for character in text])
    windows = (len(ids) - 1) // 32
    x, y = ids[: 32 * windows].view(-1, 32), ids[1 : 32 * windows + 1].view(-1, 32)
    tenth = windows // 10

    def spread(start: int) -> Pair:
        return _part(x, y, torch.arange(start, start + tenth)[:: tenth // 300][:300])

    return Data(_part(x, y, slice(-2 * tenth)), spread(windows - 2 * tenth), spread(windows - tenth))


def ett(root: Path) -> Data:
    """``ETTh1.csv``, hourly: 48 hours of seven variables in, the next 24 out. The usual 12, 4 and 4 months."""
    with open(root / "ETTh1.csv") as file:
        table = np.genfromtxt(file, delimiter=",", skip_header=1, usecols=range(1, 8), dtype=np.float32)
    series = torch.from_numpy(table)
    series = (series - series[:8640].mean(0)) / series[:8640].std(0)
    windows = series.unfold(0, 72, 1).transpose(1, 2)  # window k holds the hours k to k + 71

    def part(first: int, last: int, every: int) -> Pair:
        chosen = windows[first : last - 71 : every].contiguous()
        return chosen[:, :48].contiguous(), chosen[:, 48:].contiguous()

    return Data(part(0, 8640, 1), part(8640, 11520, 12), part(11520, 14400, 6))
