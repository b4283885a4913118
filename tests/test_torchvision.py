"""Modules nobody here wrote: torchvision's classification models, one or more of every family, through a whole life.

Those that would take long are built from their family's own classes with fewer or narrower layers of every kind.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from lightning_qinit import QuantInitCallback
from lightning_qinit.checks import shorten
from lightning_qinit.insertion import named_quantizers, quantized_layers

CLASSES = 10
Build = Callable[[], nn.Module]


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        outputs = self.net(batch[0])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)  # with auxiliary heads
        return torch.stack([nn.functional.cross_entropy(output, batch[1]) for output in outputs]).sum()

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.predictions = self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.001)


def published(name: str, **arguments) -> Build:
    return lambda: models.get_model(name, weights=None, num_classes=CLASSES, **arguments)


def narrow_head(name: str) -> Build:
    """The published model, with 64 features instead of 4096 between the linear layers at its end."""

    def build() -> nn.Module:
        net = models.get_model(name, weights=None)
        at = [i for i, layer in enumerate(net.classifier) if isinstance(layer, nn.Linear)]
        widths = [net.classifier[at[0]].in_features, 64, 64, CLASSES]
        for i, inputs, outputs in zip(at, widths, widths[1:], strict=False):
            net.classifier[i] = nn.Linear(inputs, outputs)
        return net

    return build


def convnext() -> nn.Module:
    widths = [24, 48, 96, 192]
    blocks = [CNBlockConfig(*io, num_layers=1) for io in zip(widths, [*widths[1:], None], strict=True)]
    return models.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=CLASSES)


def densenet() -> nn.Module:
    return models.DenseNet(growth_rate=16, block_config=(2, 2, 2, 2), num_init_features=32, num_classes=CLASSES)


def efficientnet_v2() -> nn.Module:
    blocks = [
        FusedMBConvConfig(1, 3, 1, 24, 24, 1),
        FusedMBConvConfig(4, 3, 2, 24, 48, 1),
        FusedMBConvConfig(4, 3, 2, 48, 64, 1),
        MBConvConfig(4, 3, 2, 64, 128, 1),
        MBConvConfig(6, 3, 1, 128, 160, 1),
        MBConvConfig(6, 3, 2, 160, 256, 1),
    ]
    return models.EfficientNet(blocks, dropout=0.2, last_channel=1280, num_classes=CLASSES)


def maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(SIZE, SIZE),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 64, 128],
        block_layers=[1, 1, 2, 1],
        head_dim=8,
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
    )


def resnext() -> nn.Module:
    return models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=32, width_per_group=4)


def swin(window: int, **arguments) -> Build:
    return lambda: models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2, 2, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[window, window],
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
        **arguments,
    )


def vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=2, num_heads=3, hidden_dim=96, mlp_dim=384, num_classes=CLASSES
    )


# By the name that torchvision lists.
MODELS: dict[str, Build] = {
    "alexnet": narrow_head("alexnet"),
    "convnext_tiny": convnext,
    "densenet121": densenet,
    "efficientnet_b0": published("efficientnet_b0"),
    "efficientnet_v2_s": efficientnet_v2,
    "googlenet": published("googlenet", init_weights=True),
    "inception_v3": published("inception_v3", init_weights=False, aux_logits=False),  # at 299 pixels only
    "maxvit_t": maxvit,
    "mnasnet0_5": published("mnasnet0_5"),
    "mobilenet_v2": published("mobilenet_v2"),
    "mobilenet_v3_small": published("mobilenet_v3_small"),
    "regnet_y_400mf": published("regnet_y_400mf"),
    "resnet18": published("resnet18"),
    "resnext50_32x4d": resnext,
    "shufflenet_v2_x0_5": published("shufflenet_v2_x0_5"),
    "squeezenet1_0": published("squeezenet1_0"),
    "swin_t": swin(7),
    "swin_v2_t": swin(8, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "vgg11": narrow_head("vgg11"),
    "vit_b_16": vit,
}

SIZE = 64  # of images: all others take it, and train on two; at 32 some BatchNorms see two values per channel
SIZES = {"inception_v3": 107}  # the least with two by two values at its end

# Layers that calibration never sees run, so that they stay in float, and the callback says so.
AUXILIARY_HEADS = "net.[aA]ux*"  # run in train mode only, and calibration runs in eval mode
LINEARS_OF_WINDOW_ATTENTION = "*.attn.[qp]*"  # qkv and proj: Swin reads their weights and calls F.linear itself
STAY_FLOAT = {
    "googlenet": AUXILIARY_HEADS,
    "swin_t": LINEARS_OF_WINDOW_ATTENTION,
    "swin_v2_t": LINEARS_OF_WINDOW_ATTENTION,
}
WARNS = {"vit_b_16": "Calibration saw only zeros in net.heads.head.weight"}  # a head that starts at zero


def test_no_family_is_missing() -> None:
    def families(names: Iterable[str]) -> set[str]:
        return {models.get_model_builder(name).__module__ for name in names}

    assert families(MODELS) == families(models.list_models(module=models))


@pytest.mark.parametrize("name", MODELS)
def test_insert_calibrate_train_reload_and_test(name: str, make_trainer: Callable[..., pl.Trainer], tmp_path: Path):
    build, size = MODELS[name], SIZES.get(name, SIZE)
    x, y = torch.randn(4, 3, size, size), torch.randint(CLASSES, (4,))
    model = Classifier(build())
    float_keys = model.state_dict().keys()
    unseen = [
        f"{layer}.{what}"
        for layer, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and fnmatchcase(layer, STAY_FLOAT.get(name, ""))
        for what in ("weight", "input")
    ]

    trainer = make_trainer(callback(), max_steps=2)
    message = f"Calibration saw no data for {shorten(unseen)}, which stay in float" if unseen else WARNS.get(name)
    with pytest.warns(UserWarning, match=re.escape(message)) if message else nullcontext():  # any other is an error
        trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=2))
    assert trainer.global_step == 2

    assert float_keys < model.state_dict().keys()
    quantizers = named_quantizers(quantized_layers(model))
    idle = [name for name, quantizer in quantizers.items() if not quantizer.is_calibrated]
    served = (".self_attention.key", ".self_attention.value")  # the same tensor as the query
    assert [name for name in idle if not name.endswith(served)] == unseen
    trained = Counter(id(p) for group in trainer.optimizers[0].param_groups for p in group["params"])
    for quantizer in quantizers.values():
        assert trained[id(quantizer.relative_step)] == 1
        assert ((quantizer.step > 0) & quantizer.step.isfinite()).all()
    assert any(not q.step.equal(q.initial_step) for q in quantizers.values())

    path = tmp_path / "trained.ckpt"
    trainer.save_checkpoint(path)
    fresh = Classifier(build())
    test_data = DataLoader(TensorDataset(x[:2], y[:2]), batch_size=2)
    make_trainer(callback()).test(fresh, test_data, ckpt_path=path, verbose=False)
    make_trainer(callback()).test(model, test_data, verbose=False)
    assert fresh.predictions.isfinite().all()
    assert fresh.predictions.equal(model.predictions)


def callback() -> QuantInitCallback:
    # what takes long and has tests of its own is left out: compiling, and solving for the optimum while training
    settings = {"kernels": "eager", "log_quantizers": ["step", "error", "levels_used"], "print_report": False}
    return QuantInitCallback(weight_bits=4, activation_bits=4, calibration_batches=1, **settings)
