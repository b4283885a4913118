"""BatchNorm folded into the layer before it: the same outputs, and trained, saved and loaded like that."""

import copy
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quiet, small_data
from torch import Tensor, nn

from lightning_qinit import calibrate, fold_batchnorm, load_from_checkpoint, prepare
from lightning_qinit.export import fold, integer_state_dict, load_integers


class Residual(nn.Module):
    """As in a ResNet: the shortcut is normalized, and an activation works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return self.relu(out)


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.Hardswish(),
        nn.Conv2d(12, 12, 3, groups=12, bias=False, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(12, eps=1e-3, affine=False),
        nn.ReLU6(),
        nn.Conv2d(12, 4, 1),
        nn.BatchNorm2d(4),
    )


FOLDABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 5, 5)),
    "depthwise": (depthwise, (2, 3, 5, 5)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(4)),
        (2, 6, 3, 3),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2)), (4, 5)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 7, 2), nn.BatchNorm1d(7)), (2, 5, 6)),
}


def trained(module: nn.Module) -> nn.Module:
    """With statistics and factors of either sign, in eval mode."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
            child.running_mean.normal_()
            child.running_var.uniform_(0.1, 3)
            child.num_batches_tracked.fill_(1)
            for parameter in child.parameters():
                nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("name", FOLDABLE)
def test_outputs_are_those_of_the_module_but_for_rounding(name: str):
    make, shape = FOLDABLE[name]
    module, x = trained(make()).double(), torch.randn(shape, dtype=torch.float64)
    before = dict(module.named_parameters())
    with torch.no_grad():
        expected = module(x)
        assert fold_batchnorm(module.train(), x) == {}
        assert module.training and not any("Norm" in type(child).__name__ for child in module.modules())
        torch.testing.assert_close(module.eval()(x), expected, rtol=1e-12, atol=1e-12)  # a few roundings of 1e-16
    assert all(p is before[key] for key, p in module.named_parameters() if key in before)


def test_what_was_quantized_and_folded_can_be_merged_too():
    module, x = trained(Residual()), torch.randn(16, 3, 5, 5)
    prepare(module, first_last_bits=None)
    calibrate(module, [x])
    folded = fold(module)
    with torch.no_grad():
        expected = module(x)
        assert fold_batchnorm(folded, x) == {} and isinstance(folded.bn1, nn.Identity)
        actual = folded(x)
    # a value may fall on the other side of a rounding boundary in the second convolution
    assert ((actual - expected).abs() > 1e-5 * expected.abs().max()).double().mean() < 1e-2


class Odd(nn.Module):
    """A BatchNorm that cannot be folded beside one that can."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4, track_running_stats=kind != "statistics")
        self.last = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
        self.kind, self.linear, self.kept = kind, nn.Linear(4, 4), None
        if kind == "tied":
            self.linear.weight = nn.Parameter(torch.zeros(4, 4, 1))
            self.conv.weight = self.linear.weight
        if kind == "parametrized":
            nn.utils.parametrizations.weight_norm(self.conv)
        if kind == "hooked":
            self.norm.register_forward_hook(lambda module, args, output: output.relu())

    def forward(self, x: Tensor) -> object:
        out = self.linear(x) if self.kind == "axis" else self.conv(x)
        if self.kind == "in place":
            out.relu_()
        if self.kind == "held":
            self.kept = out
        if self.kind == "elsewhere":
            x = x + out.mean()
        if self.kind == "twice":
            x = self.conv(x + 1)
        if self.kind == "mean read":
            x = x + self.norm.running_mean.mean()
        if self.kind == "read":
            x = x + self.conv.weight.mean()
        if self.kind == "moved":
            out = out + 1
        normed = self.norm(out)
        if self.kind == "again":
            normed = self.norm(normed)
        result = self.last(x + normed)
        return (result, out) if self.kind == "returned" else result


@pytest.mark.parametrize(
    ("kind", "reason"),
    {
        "axis": "it does not normalize the channels of `linear`",
        "in place": "the output of `conv` is used elsewhere too",
        "held": "the output of `conv` is used elsewhere too",
        "elsewhere": "the output of `conv` is used elsewhere too",
        "returned": "the output of `conv` is used elsewhere too",
        "twice": "`conv` runs 2 times",
        "read": "its parameters or statistics, or those of `conv`, are used elsewhere too",
        "mean read": "its parameters or statistics, or those of `conv`, are used elsewhere too",
        "tied": "its parameters or statistics, or those of `conv`, are used elsewhere too",
        "moved": "it does not follow a convolution or Linear layer directly",
        "again": "it runs 2 times",
        "statistics": "it keeps no running statistics",
        "parametrized": "it does not follow a convolution or Linear layer directly",  # the type is another
        "hooked": "it or `conv` has hooks",
    }.items(),
)
def test_what_is_no_pair_stays_and_says_why(kind: str, reason: str):
    module, x = trained(Odd(kind)), torch.randn(3, 4, 4)
    before = copy.deepcopy(module)
    assert fold_batchnorm(module, x) == {"norm": reason}
    assert module.kept is None and isinstance(module.last[1], nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(module(x), before(x), rtol=1e-4, atol=1e-4)  # roundings of float32


def test_modules_in_which_nothing_can_be_folded_are_refused():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="Sequential has no BatchNorm that can be folded: it has none"):
        fold_batchnorm(nn.Sequential(nn.Linear(4, 4)), x)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="can be folded: `1`: its statistics were never trained"):
        fold_batchnorm(module, x)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Sequential has quantizers: call `fold_batchnorm` before"):
        fold_batchnorm(prepare(module), x)


class Plain(SmallNet):
    """Its convolution has no bias until it is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)


def test_folded_modules_train_resume_and_load_into_fresh_ones(make_trainer: Callable[..., pl.Trainer], tmp_path: Path):
    module = trained(Plain()).train()
    x = small_data()[:4][0]
    fold_batchnorm(module, x)
    before = module.stem.bias.detach().clone()
    trainer = make_trainer(quiet())
    trainer.fit(module, loader(shuffle=False))
    assert not torch.equal(module.stem.bias, before)  # it trains
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_from_checkpoint(Plain, path)
    assert loaded.state_dict().keys() == module.state_dict().keys() >= {"stem.bias", "norm.folded"}
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)

    fresh = Plain()
    make_trainer(quiet()).test(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    torch.testing.assert_close(fresh.state_dict(), module.state_dict(), rtol=0, atol=0)
    again = Plain()
    make_trainer(quiet(), max_epochs=2).fit(again, loader(shuffle=False), ckpt_path=path)
    assert not torch.equal(again.stem.bias, module.stem.bias)  # and goes on to

    expected = module.eval()(x)
    torch.testing.assert_close(load_integers(Plain(), integer_state_dict(module))(x), expected, rtol=0, atol=0)
