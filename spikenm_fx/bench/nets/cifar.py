# SPDX-License-Identifier: Apache-2.0
"""Spiking image classifiers of the literature, compactly: plain torch, time folded into the batch.

ResNet-19 (Zheng et al., arXiv 2011.05280), VGGSNN (Deng et al., arXiv 2202.11946) and
Spikformer-4-256 (Zhou et al., arXiv 2209.15425); widths and depths as there, written from their
descriptions.  Input is ``[T, B, C, H, W]``, output ``[B, classes]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from spikenm_fx.bench.nets.events import FeedForward, Recurrent
from spikenm_fx.demo.networks import LIF, OverTime, SpikingConvNet

__all__ = ["NETWORKS", "VGGSNN", "ResNet19", "Spikformer", "build"]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> OverTime:
    return OverTime(
        nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )
    )


class _Block(nn.Module):
    """Two convolutions; the shortcut joins before the last neuron."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.lif1 = _conv(inputs, outputs, stride=stride), LIF()
        self.conv2, self.lif2 = _conv(outputs, outputs), LIF()
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, C, H, W]`` spikes to spikes."""
        return self.lif2(self.conv2(self.lif1(self.conv1(x))) + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet19(nn.Module):
    """Stages of 3, 3 and 2 blocks with 128, 256 and 512 channels, two linear layers."""

    def __init__(self, inputs: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.lif = _conv(inputs, 128), LIF()
        blocks: list[nn.Module] = []
        width = 128
        for outputs, count, stride in ((128, 3, 1), (256, 3, 2), (512, 2, 2)):
            for index in range(count):
                blocks.append(_Block(width, outputs, stride if index == 0 else 1))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.hidden, self.hidden_lif = nn.Linear(512, 256), LIF()
        self.readout = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, C, H, W]`` to class scores, averaged over time."""
        features = self.blocks(self.lif(self.stem(x))).mean((-2, -1))
        return self.readout(self.hidden_lif(self.hidden(features))).mean(0)  # type: ignore[no-any-return]


class VGGSNN(nn.Module):
    """Eight convolutions of 64 to 512 channels with four average poolings, one linear layer."""

    def __init__(self, inputs: int = 2, classes: int = 10, size: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        plan = ((64, 0), (128, 1), (256, 0), (256, 1), (512, 0), (512, 1), (512, 0), (512, 1))
        for outputs, pool in plan:
            layers += [_conv(inputs, outputs), LIF()]
            if pool:
                layers.append(OverTime(nn.AvgPool2d(2)))
                size //= 2
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.readout = nn.Linear(512 * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, C, H, W]`` to class scores, averaged over time."""
        return self.readout(self.features(x).flatten(2)).mean(0)  # type: ignore[no-any-return]


class _Tokens(nn.Module):
    """Linear layer, batch norm over tokens, neuron, on ``[T, B, N, C]``."""

    def __init__(self, inputs: int, outputs: int, threshold: float = 1.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs)
        self.lif = LIF(threshold=threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Spikes ``[T, B, N, inputs]`` to spikes ``[T, B, N, outputs]``."""
        y = self.linear(x)
        return self.lif(self.norm(y.flatten(0, 2)).view(y.shape))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Spiking self attention: no softmax, scale 1/8."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (_Tokens(width, width) for _ in range(3))
        self.lif, self.out = LIF(threshold=0.5), _Tokens(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, N, C]`` to the same."""
        q, k, v = (self._split(part(x)) for part in (self.q, self.k, self.v))
        mixed = (q @ (k.transpose(-2, -1) @ v)) * 0.125
        return self.out(self.lif(mixed.transpose(2, 3).flatten(3)))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(2, 3)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(_Tokens(width, 4 * width), _Tokens(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        mixed: Tensor = self.mlp(x)
        return x + mixed


class Spikformer(nn.Module):
    """Convolutional patch splitting to 8 x 8 tokens (from 32 x 32), then transformer layers."""

    def __init__(
        self, depth: int = 4, width: int = 256, heads: int = 8, inputs: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for index, outputs in enumerate((width // 8, width // 4, width // 2, width)):
            stages += [_conv(inputs, outputs), LIF()]
            if index >= 2:
                stages.append(OverTime(nn.MaxPool2d(3, 2, 1)))
            inputs = outputs
        self.split = nn.Sequential(*stages)
        self.position, self.position_lif = _conv(width, width), LIF()
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.readout = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 3, 32, 32]`` to class scores, averaged over time."""
        x = self.split(x)
        x = x + self.position_lif(self.position(x))
        tokens = self.layers(x.flatten(3).transpose(2, 3))
        return self.readout(tokens.mean(2)).mean(0)  # type: ignore[no-any-return]


def _tiny(channels: int, size: int) -> nn.Module:
    return SpikingConvNet((16, 32, 32, 64), (0, 1, 2), inputs=channels, size=size, hidden=128)


def _small(channels: int, size: int) -> nn.Module:
    if size <= 8:
        return SpikingConvNet(inputs=channels, size=size)
    return SpikingConvNet((32, 64, 64, 128), (0, 1, 2, 3), inputs=channels, size=size, hidden=256)


NETWORKS: Mapping[str, Callable[[int, int], nn.Module]] = MappingProxyType(
    {
        "vgg-tiny": _tiny,
        "vgg-small": _small,
        "vggsnn": lambda channels, size: VGGSNN(channels, size=size),
        "resnet19": lambda channels, size: ResNet19(channels),
        "spikformer-4-256": lambda channels, size: Spikformer(inputs=channels),
        "events-feedforward": lambda channels, size: FeedForward(channels * size * size),
        "events-recurrent": lambda channels, size: Recurrent(channels * size * size),
    }
)
"""Builders by name, from input channels and image size."""


def _times(width: float, *channels: int) -> list[int]:
    """Multiples of 8, so that every pattern fits."""
    return [max(8 * round(count * width / 8), 8) for count in channels]


def _wide_tiny(channels: int, size: int, width: float) -> nn.Module:
    *convolutions, hidden = _times(width, 16, 32, 32, 64, 128)
    return SpikingConvNet(convolutions, (0, 1, 2), inputs=channels, size=size, hidden=hidden)


WIDE: Mapping[str, Callable[[int, int, float], nn.Module]] = MappingProxyType(
    {
        "vgg-tiny": _wide_tiny,
        "events-feedforward": lambda channels, size, width: FeedForward(
            channels * size * size, *_times(width, 128)
        ),
    }
)
"""Those that come in widths, from input channels, image size and width."""


def build(name: str, images: Tensor, seed: int) -> nn.Module:
    """A fresh network for images ``[N, C, H, W]``, the same for the same seed.

    ``NAME-xWIDTH`` is a network of :data:`WIDE` with so many times the hidden channels.  Event
    frames have time before the channels.
    """
    torch.manual_seed(seed)
    base, wide, width = name.partition("-x")
    channels, size = images.shape[-3], images.shape[-1]
    if wide:
        return WIDE[base](channels, size, float(width))
    return NETWORKS[name](channels, size)
