"""ResNet-18, ResNet-50 and ViT-B/16, with the layers and the parameters' names of torchvision, and small ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from oracle import randomise_norms
from torch import Tensor, nn


def _conv(channels: int, filters: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a 3x3 convolution between two 1x1 ones."""

    def __init__(self, channels: int, width: int, stride: int, deep: bool) -> None:
        super().__init__()
        out = 4 * width if deep else width
        self.conv1 = _conv(channels, width, 1 if deep else 3, 1 if deep else stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride if deep else 1)
        self.bn2 = nn.BatchNorm2d(width)
        if deep:
            self.conv3, self.bn3 = _conv(width, out, 1), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet (He et al., 2015), with the stride of a deep block at its 3x3 convolution."""

    def __init__(self, blocks: tuple[int, ...], deep: bool, classes: int, width: int = 64) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = _conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, self.stages = width, len(blocks)
        for k, count in enumerate(blocks):
            layer = []
            for j in range(count):
                layer.append(Block(channels, width << k, 2 if k and not j else 1, deep))
                channels = (4 if deep else 1) * (width << k)
            self.add_module(f"layer{k + 1}", nn.Sequential(*layer))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    @property
    def first(self) -> nn.Module:
        return self.conv1

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for k in range(self.stages):
            x = getattr(self, f"layer{k + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    def __init__(self, tokens: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.Sequential()
        for k in range(depth):
            self.layers.add_module(f"encoder_layer_{k}", EncoderBlock(width, heads))
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(x + self.pos_embedding))


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2020)."""

    def __init__(self, size: int, classes: int, width: int = 768, heads: int = 12, depth: int = 12) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 16, 16)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.encoder = Encoder((size // 16) ** 2 + 1, width, heads, depth)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(width, classes))

    @property
    def first(self) -> nn.Module:
        return self.conv_proj

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return self.heads(self.encoder(x)[:, 0])


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": lambda size, classes: ResNet((2, 2, 2, 2), False, classes),
    "resnet50": lambda size, classes: ResNet((3, 4, 6, 3), True, classes),
    "vit_b_16": ViT,
    "small resnet": lambda size, classes: ResNet((1, 1), True, classes, 4),
    "small vit": functools.partial(ViT, width=24, heads=2, depth=2),
}


def network(
    name: str, size: int, device: torch.device, dtype: torch.dtype = torch.float32, classes: int = 10
) -> nn.Module:
    """A network in evaluation mode, with norms away from their initial values; the same weights at every call."""
    torch.manual_seed(0)
    made = randomise_norms(NETWORKS[name](size, classes))
    return made.to(device=device, dtype=dtype, memory_format=torch.channels_last)
