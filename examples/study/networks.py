"""The networks of the study, as plain modules: what a practitioner would write, none knows of quantization."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions with BatchNorm; the shortcut subsamples and pads channels with zeros (He et al., option A)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.added = stride, out_channels - channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        short = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        return (out + functional.pad(short, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))).relu()


class ResNet(nn.Module):
    """The residual network for small images of He et al., 2016, section 4.2: three stages; ResNet-20 is ``blocks=3``.

    Args:
        channels: of the input.
        width: channels of the first stage.
        blocks: of each stage.
        stride: of the first convolution.
    """

    def __init__(self, channels: int = 3, width: int = 16, blocks: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [Block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Block(channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions on CPUs
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Separable(nn.Module):
    """A depthwise and a pointwise convolution over time with BatchNorm, and a shortcut."""

    def __init__(self, channels: int, width: int = 9) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, width, padding=width // 2, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.pointwise = nn.Conv1d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.pointwise(self.bn1(self.depthwise(x)).relu()))).relu()


class SpeechNet(nn.Module):
    """A 1-D convolutional network on the log spectrogram, the bands of which are the channels."""

    def __init__(self, bands: int = 32, width: int = 48, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv1d(bands, width, 5, stride=2, padding=2, bias=False)
        self.bn = nn.BatchNorm1d(width)
        self.middle = nn.Conv1d(width, width, 5, padding=2, bias=False)
        self.bn_middle = nn.BatchNorm1d(width)
        self.blocks = nn.Sequential(*(Separable(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = self.bn_middle(self.middle(x)).relu()
        return self.head(self.blocks(x).mean(2))


class Attention(nn.Module):
    """Causal self-attention; its four projections are ordinary linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class CharTransformer(nn.Module):
    """A small decoder-only transformer with pre-norm blocks and GELU."""

    def __init__(
        self, vocabulary: int = 65, width: int = 48, heads: int = 4, layers: int = 2, length: int = 32
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.attentions = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position[: x.shape[1]]
        for k, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * k](x))
            x = x + mlp(self.norms[2 * k + 1](x))
        return self.head(self.norms[-1](x))


class Forecaster(nn.Module):
    """An LSTM that forecasts all variables, relative to their last values."""

    def __init__(self, variables: int = 7, width: int = 48, horizon: int = 24) -> None:
        super().__init__()
        self.shape = (horizon, variables)
        self.embed = nn.Linear(variables, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, horizon * variables)

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1:]
        states, _ = self.lstm(self.embed(x - last).relu())
        return last + self.head(self.hidden(states[:, -1]).relu()).unflatten(1, self.shape)
