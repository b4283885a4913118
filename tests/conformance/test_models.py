"""Architectures of every field in ten-line modules: small inputs, real training steps, every quantizer in use."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_qinit import QuantInitCallback, load_from_checkpoint
from lightning_qinit.insertion import named_quantizers, quantized_layers


class Module(pl.LightningModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Items(Dataset):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class TextModel(nn.Module):
    """Called as a Hugging Face model is: keyword arguments in, a mapping with the loss out; tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.Linear(32, 50, bias=False)
        self.decoder.weight = self.tokens.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        padding = None if attention_mask is None else attention_mask == 0
        logits = self.decoder(self.encoder(x, src_key_padding_mask=padding))
        loss = {} if labels is None else {"loss": F.cross_entropy(logits.transpose(1, 2), labels)}
        return {"logits": logits, **loss}


class Text(Module):
    """Upstream 15862, 7926, 8677, 7979: a wrapper around `forward` took one positional tensor only."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TextModel()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch)["loss"]

    @staticmethod
    def data() -> Dataset:
        ids = torch.randint(50, (8, 12))
        mask = torch.ones_like(ids)
        mask[:, 9:] = 0
        return Items(*({"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)))


class Forecaster(Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 16, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        states, _ = self.lstm(batch[0])
        return F.mse_loss(self.head(states[:, -1]), batch[1])

    @staticmethod
    def data() -> Dataset:
        series = torch.randn(8, 20, 3).cumsum(1)
        return Items(*zip(series[:, :-1], series[:, -1, :1], strict=True))


class VAE(Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 36))

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        mean, log_variance = self.encoder(batch).chunk(2, 1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).mean()
        return {"loss": F.mse_loss(self.decoder(latent), batch) + 0.1 * divergence}

    @staticmethod
    def data() -> Dataset:
        return Items(*torch.rand(8, 36))


class Contrastive(Module):
    """Two views through one encoder, a momentum copy of it, and a queue in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(36, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 16))
        self.momentum = nn.Sequential(nn.Linear(36, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 16))
        self.momentum.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(32, 16), dim=1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.momentum[0].parameters(), self.encoder[0].parameters(), strict=False):
                if slow.shape == fast.shape:
                    slow.lerp_(fast, 0.1)
            key = F.normalize(self.momentum(batch[1]), dim=1)
        query = F.normalize(self.encoder(batch[0]), dim=1)
        logits = torch.cat(((query * key).sum(1, keepdim=True), query @ self.queue.clone().T), 1) / 0.2
        self.queue.copy_(torch.cat((key, self.queue))[:32])
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))

    @staticmethod
    def data() -> Dataset:
        x = torch.rand(8, 36)
        return Items(*zip(x, x + 0.1 * torch.randn_like(x), strict=True))


class Detector(Module):
    """In eval mode it gives detections instead of losses, so calibration has a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 4, 1), nn.ReLU())
        backbone.out_channels = 16
        anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
        pool = torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2)
        head = torchvision.models.detection.faster_rcnn.TwoMLPHead(16 * 9, 32)
        self.model = torchvision.models.detection.FasterRCNN(
            backbone,
            min_size=64,
            max_size=64,
            rpn_anchor_generator=anchors,
            box_roi_pool=pool,
            box_head=head,
            box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(32, 3),
        )

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> Tensor:
        return sum(self.model(*batch).values())

    def calibration_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], batch_idx: int) -> None:
        self.model.train()
        self.model(*batch)

    @staticmethod
    def data() -> Dataset:
        target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
        return Items(*((torch.rand(3, 64, 64), target) for _ in range(4)))

    @staticmethod
    def collate(items: list) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        return [image for image, _ in items], [target for _, target in items]


class UNet(Module):
    """Down and up with a skip connection, as segmentation and diffusion have it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 3, 2, 1)
        self.middle = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Conv2d(5, 1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        noise = torch.randn_like(batch)
        x = self.down(batch + noise)
        return F.mse_loss(self.out(torch.cat((batch, self.up(x + self.middle(x))), 1)), noise)

    @staticmethod
    def data() -> Dataset:
        return Items(*torch.rand(8, 1, 16, 16))


MODELS = [Text, Forecaster, VAE, Contrastive, Detector, UNet]


@pytest.mark.parametrize("settings", [{}, {"quantizer": "lsq+", "recalibrate_batchnorm": True}], ids=["lsq", "lsq+"])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_architectures(make_trainer, tmp_path, kind: type[Module], settings: dict) -> None:
    model = kind()
    callback = QuantInitCallback(print_report=False, calibration_batches=2, **settings)
    data = DataLoader(kind.data(), 2, collate_fn=getattr(kind, "collate", None))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Untouched(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for name, value in before.items():
                if not (settings and "running" in name):
                    assert torch.equal(pl_module.state_dict()[name], value), name

    trainer = make_trainer(callback, Untouched(), max_steps=4)
    trainer.fit(model, data)
    layers = quantized_layers(model)
    served = {f"{name}.{what}" for name, layer in layers.items() for what in layer.optional_inputs}
    for name, quantizer in named_quantizers(layers).items():
        assert quantizer.is_calibrated or name in served, name
        frozen = not any(p.requires_grad for p in quantizer.parameters())
        assert frozen or name in served or not torch.equal(quantizer.step, quantizer.initial_step), name
    path = tmp_path / "trained.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_from_checkpoint(kind, path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
