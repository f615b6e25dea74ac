# SPDX-License-Identifier: Apache-2.0
"""Random spiking networks by composition: blocks over one channel width, joined at random."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from spikenm_fx.bench.nets.handwritten import SequenceLIF

__all__ = ["random_nets"]

BLOCKS = ("plain", "residual", "sew", "iand", "concat", "depthwise", "grouped", "heads", "gate")


class ChannelLIF(SequenceLIF):
    """A threshold for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(0.2 + 0.5 * torch.rand(channels, 1, 1))


class Fold(nn.Module):
    """A stateless module on ``[T, N, ...]``."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], *y.shape[1:])


class Block(nn.Module):
    """One block that keeps the channel width."""

    def __init__(self, kind: str, width: int, per_channel: bool) -> None:
        super().__init__()
        self.kind = kind
        groups = {"depthwise": width, "grouped": 2}.get(kind, 1)
        self.first = Fold(
            nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.BatchNorm2d(width)
        )
        self.lif1 = ChannelLIF(width) if per_channel else SequenceLIF()
        wide = 2 * width if kind == "concat" else width
        self.second = Fold(nn.Conv2d(wide, width, 1), nn.BatchNorm2d(width))
        self.lif2 = SequenceLIF()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif1(self.first(x))
        if self.kind == "concat":
            y = torch.cat([y, x], dim=2)
        if self.kind == "heads":
            t, n, c, h, w = y.shape
            heads = y.reshape(t, n, 2, c // 2, h * w)
            y = ((heads @ heads.mT) @ heads).reshape(t, n, c, h, w)
        y = self.second(y)
        if self.kind == "residual":
            return self.lif2(y + x)
        y = self.lif2(y)
        if self.kind == "sew":
            return y + x
        if self.kind == "gate":
            return y * x.mean(dim=(3, 4), keepdim=True)
        return (1 - y) * x if self.kind == "iand" else y


class RandomNet(nn.Module):
    """Stem, blocks, and a head on flattened or averaged features."""

    def __init__(self, kinds: list[str], width: int, flat: bool, per_channel: bool) -> None:
        super().__init__()
        self.stem = Fold(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width))
        self.lif = SequenceLIF()
        self.blocks = nn.ModuleList(Block(kind, width, per_channel) for kind in kinds)
        self.flat = flat
        self.head = nn.Linear(width * 16 if flat else width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = x.flatten(2) if self.flat else x.mean(dim=(3, 4))
        return self.head(x).mean(0)


@st.composite
def random_nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A network in float64 and an input ``[T, N, 2, 4, 4]``."""
    kinds = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4))
    width = draw(st.sampled_from([2, 4, 6, 8]))
    flat, per_channel = draw(st.booleans()), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 9999)))
    model = RandomNet(kinds, width, flat, per_channel).double()
    return model.eval(), torch.rand(3, 2, 2, 4, 4, dtype=torch.float64) * 3
