"""What only a GPU can show: the same numbers as on the CPU, and what torch forbids there. Skipped without one."""

import copy
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from conftest import SmallNet, loader, quiet, small_data
from test_kernels import KINDS
from torch import nn
from torch.utils.data import DataLoader

from lightning_qinit import calibrate, load_from_checkpoint, prepare
from lightning_qinit.calibration.sketch import Sketch
from lightning_qinit.export import fold, integer_state_dict
from lightning_qinit.functional import optimal_scale, uniform_levels
from lightning_qinit.insertion import named_quantizers, quantized_layers
from lightning_qinit.quantizers import LSQ, Quantizer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch's own, where it compiles
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:GPU available but not used", "ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part"),  # quantized ones are not one block of memory
]


def results(quantizer: Quantizer, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = quantizer(x)
    return [y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y, (x, *quantizer.parameters()), upstream))]


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_quantizers_as_on_the_cpu(kind: str, dtype: torch.dtype, kernels: str) -> None:
    quantizer = KINDS[kind]()
    quantizer.start(torch.tensor([0.4]), quantizer.n_bits, True, torch.tensor([-0.7]))
    quantizer.kernels = "eager"
    plain = torch.randn(4, 3, 64, 64)
    for x in (plain, plain.to(memory_format=torch.channels_last)):
        x, upstream = x.to(dtype), torch.randn(x.shape).to(dtype)
        expected = results(quantizer, x, upstream)
        twin = copy.deepcopy(quantizer).cuda()
        twin.kernels = kernels
        got = results(twin, x.cuda(), upstream.cuda())
        off = (got[0] != expected[0]).double().mean()
        assert off < 1e-4  # 1 / step and the sum with an offset may round otherwise, at the edge of two levels
        assert ((got[1] != expected[1]).double().mean()) < 1e-4
        for ours, theirs in zip(got[2:], expected[2:], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_step_per_channel(channels_last: bool) -> None:
    quantizer, x = LSQ(4, 64, 0), torch.randn(64, 32, 3, 3)
    quantizer.start(torch.rand(64) + 0.1, 4, True)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    upstream = torch.randn(x.shape)
    expected = results(quantizer, x, upstream)
    for kernels in ("eager", "compiled"):
        twin = copy.deepcopy(quantizer).cuda()
        twin.kernels = kernels
        got = results(twin, x.cuda(), upstream.cuda())
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert torch.allclose(got[2], expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [5, 2**18, 3 * 2**20 + 1])
def test_the_same_sketch_bit_for_bit(size: int) -> None:
    x = torch.randn(size).relu() * 3
    x[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    here, there = Sketch(), Sketch("cuda")
    for part in x.split(2**21):
        here.update(part)
        there.update(part.cuda())
    assert torch.equal(there.table.cpu(), here.table)
    assert torch.equal(there.extremes.cpu(), here.extremes)
    assert (there.count, there.nonfinite, there.minimum, there.maximum) == (
        here.count,
        here.nonfinite,
        here.minimum,
        here.maximum,
    )


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_same_optimum(bits: int, axis: int | None) -> None:
    x, levels = torch.randn(64, 5000), uniform_levels(bits, signed=True)
    here, there = optimal_scale(x, levels, axis), optimal_scale(x.cuda(), levels.cuda(), axis)
    assert there.scale.is_cuda
    assert torch.allclose(there.scale.cpu(), here.scale, rtol=1e-9)
    assert torch.allclose(there.error.cpu(), here.error, rtol=1e-9)


def fitted(make_trainer: Callable, data: DataLoader | None = None, **settings) -> SmallNet:
    trainer_settings = {name: settings.pop(name) for name in ("precision", "deterministic") if name in settings}
    torch.manual_seed(0)
    model = SmallNet()
    trainer = make_trainer(quiet(**settings), accelerator="gpu", devices=1, max_epochs=2, **trainer_settings)
    trainer.fit(model, data or loader())
    model.trained_by = [trainer]
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"quantizer": "lsq+"},
        {"quantizer": "apot", "criterion": "hessian"},
        {"criterion": "fisher", "sequential": True},
        {"criterion": "output"},
        {"recalibrate_batchnorm": True, "average_bits": 3},
        {"damp_oscillation": 0.1, "freeze_oscillating": 0.1, "log_quantizers": ["oscillation", "to_optimal"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_fit(make_trainer, precision: str, settings: dict) -> None:
    model = fitted(make_trainer, precision=precision, **settings)
    for name, quantizer in named_quantizers(quantized_layers(model)).items():
        assert quantizer.is_calibrated and bool(quantizer.step.isfinite().all()), name
        assert all(p.dtype == torch.float32 for p in quantizer.parameters()), name


@pytest.mark.parametrize("settings", [{}, {"criterion": "fisher"}, {"quantizer": "lsq+"}], ids=str)
def test_deterministic_training_repeats_itself(make_trainer, monkeypatch, settings: dict) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        first, second = (fitted(make_trainer, deterministic=True, **settings) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_same_start_as_on_the_cpu(make_trainer) -> None:
    torch.manual_seed(0)
    model = SmallNet()
    make_trainer(quiet(), max_epochs=1).fit(model, loader())
    there = named_quantizers(quantized_layers(fitted(make_trainer)))
    for name, quantizer in named_quantizers(quantized_layers(model)).items():
        # convolutions differ in the last bits, and the optimum of an input at 8 bits is flat
        assert torch.allclose(there[name].initial_step.cpu(), quantizer.initial_step, rtol=1e-3), name


def test_training_never_waits_for_the_gpu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).cuda()
    prepare(model, weight_bits=4, activation_bits=4, quantizer="lsq+")
    x = torch.randn(16, 3, 8, 8, device="cuda")
    calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("criterion", ["mse", "fisher"])
def test_recurrent_layers(criterion: str, make_trainer) -> None:
    """cuDNN has no backward pass of recurrent layers in eval mode, which is that of the Fisher pass."""

    class Last(nn.Module):
        def forward(self, x: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return x[0][:, -1]

    class Recurrent(SmallNet):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            self.learning_rate = 0.05
            self.net = nn.Sequential(nn.LSTM(6, 8, 2, batch_first=True), Last(), nn.Linear(8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x[:, 0])

    model = Recurrent()
    make_trainer(quiet(criterion=criterion), accelerator="gpu", devices=1).fit(model, loader())
    assert all(quantizer.is_calibrated for quantizer in named_quantizers(quantized_layers(model)).values())


def test_attention(make_trainer) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).cuda()
    prepare(layer, weight_bits=4, activation_bits=4)
    x = torch.randn(4, 5, 8, device="cuda")
    calibrate(layer, [x])
    layer(x).sum().backward()
    for name, quantizer in named_quantizers(quantized_layers(layer)).items():
        # of one tensor that is query, key and value, one quantizer serves
        assert (quantizer.relative_step.grad is None) == name.endswith((".key", ".value")), name


@pytest.mark.parametrize("quantizer", ["lsq", "lsq+", "apot"])
def test_compiled_module(quantizer: str) -> None:
    convolution = nn.Conv2d(3, 8, 3, bias=False)  # a bias before a BatchNorm has no gradient but for rounding
    model = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 900, 4)).cuda()
    prepare(model, weight_bits=4, activation_bits=4, quantizer=quantizer, first_last_bits=None)
    x = torch.randn(8, 3, 32, 32, device="cuda")
    calibrate(model, [x])
    outputs, gradients = [], []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = forward(x)
        y.square().mean().backward()
        outputs.append(y.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=2e-2, atol=1e-3 * float(one.abs().max()))


def test_frozen_layers_under_autocast() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(216, 3)).cuda(), torch.randn(2, 4, 8, 8)
    prepare(model)
    calibrate(model, [x.cuda()])
    model.requires_grad_(False)
    x = x.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert x.grad is not None and bool(x.grad.isfinite().all() and x.grad.any())


def test_checkpoints_move_between_devices(make_trainer, tmp_path) -> None:
    model = fitted(make_trainer)
    path = tmp_path / "trained.ckpt"
    model.trained_by[0].save_checkpoint(path)
    here = load_from_checkpoint(SmallNet, path, map_location="cpu").eval()
    there = copy.deepcopy(here).cuda().eval()
    x = small_data().tensors[0]
    with torch.no_grad():
        assert torch.allclose(there(x.cuda()).cpu(), here(x), rtol=1e-3, atol=1e-3)
        folded = fold(there)
        assert torch.equal(folded(x.cuda()), there(x.cuda()))
    state = integer_state_dict(there)
    assert all(torch.equal(state[name].cpu(), value) for name, value in integer_state_dict(here).items())


def test_monitoring_in_tensorboard(make_trainer, tmp_path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    model = SmallNet()
    logger, settings = TensorBoardLogger(tmp_path), dict(accelerator="gpu", devices=1, max_epochs=2)
    make_trainer(quiet(log_figures=1), logger=logger, log_every_n_steps=2, **settings).fit(model, loader())
    assert any(tmp_path.rglob("events.*"))
