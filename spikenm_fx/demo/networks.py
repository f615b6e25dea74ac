# SPDX-License-Identifier: Apache-2.0
"""A spiking network written by hand, in plain torch: no SNN framework is needed to try it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["LIF", "SpikingConvNet", "direct_code"]


class AtanSpike(torch.autograd.Function):
    """Heaviside step forward, derivative of arctan backward (Fang et al., arXiv 2007.05785)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, distance: Tensor) -> Tensor:
        """1 where the membrane is at or above the threshold, else 0, elementwise."""
        ctx.save_for_backward(distance)
        return (distance >= 0).to(distance.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        """Gradient 1 / (1 + (pi x)^2) of the surrogate (alpha = 2)."""
        distance: Tensor = ctx.saved_tensors[0]  # type: ignore[attr-defined]
        return grads[0] / (1 + (math.pi * distance).square())


class LIF(nn.Module):
    """Leaky integrate-and-fire over a whole sequence ``[T, ...]``, hard reset to zero.

    v[t] = v[t-1] + (x[t] - v[t-1]) / tau;  s[t] = 1 where v[t] >= threshold;  v[t] = 0 there.
    """

    def __init__(self, tau: float = 2.0, threshold: float = 1.0) -> None:
        super().__init__()
        self.tau, self.threshold = tau, threshold

    def forward(self, x: Tensor) -> Tensor:
        """``[T, ...]`` currents to ``[T, ...]`` spikes in {0, 1}."""
        v = torch.zeros_like(x[0])
        spikes = []
        for current in x:
            v = v + (current - v) / self.tau
            spike = AtanSpike.apply(v - self.threshold)  # type: ignore[no-untyped-call]
            v = v * (1 - spike.detach())
            spikes.append(spike)
        return torch.stack(spikes)


class OverTime(nn.Module):
    """Apply a stateless module to ``[T, B, ...]`` by folding time into the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, ...]`` to ``[T, B, ...]``."""
        folded: Tensor = self.module(x.flatten(0, 1))
        return folded.view(*x.shape[:2], *folded.shape[1:])


class SpikingConvNet(nn.Module):
    """Convolutions with batch norm and LIF, average pooling, one hidden layer, a readout.

    Args:
        channels: output channels of each 3x3 convolution; a pooling by 2 follows each of ``pools``.
        pools: indices of the convolutions that are followed by pooling.
        size: height and width of the input.
        inputs: input channels.
        hidden: neurons of the fully connected layer.
        classes: outputs.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 64),
        pools: Sequence[int] = (1, 2),
        *,
        size: int = 8,
        inputs: int = 1,
        hidden: int = 128,
        classes: int = 10,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for index, outputs in enumerate(channels):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            blocks += [OverTime(nn.Sequential(conv, nn.BatchNorm2d(outputs))), LIF()]
            if index in pools:
                blocks.append(OverTime(nn.MaxPool2d(2)))
                size //= 2
            inputs = outputs
        self.features = nn.Sequential(*blocks)
        self.hidden = nn.Linear(inputs * size * size, hidden)
        self.lif = LIF()
        self.readout = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, C, H, W]`` to class scores ``[B, classes]``, averaged over time."""
        spikes = self.lif(self.hidden(self.features(x).flatten(2)))
        return self.readout(spikes).mean(0)  # type: ignore[no-any-return]


def direct_code(images: Tensor, steps: int) -> Tensor:
    """Repeat ``[B, ...]`` images over ``steps`` time steps: ``[T, B, ...]``."""
    return images.unsqueeze(0).expand(steps, *images.shape)
