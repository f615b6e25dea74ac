# SPDX-License-Identifier: Apache-2.0
"""All hypothesis strategies in one place, so that a new kind of layer meets every property.

``cases()`` draws a layer of any kind with a pattern, a dtype and weights that may hold ties, zeros
or extreme values; ``networks()`` and ``trees()`` compose layers into models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from spikenm_fx import NM, Rule

CONVS = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "tconv1d": nn.ConvTranspose1d,
    "tconv2d": nn.ConvTranspose2d,
    "tconv3d": nn.ConvTranspose3d,
}
KINDS = ("linear", *CONVS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FILLS = ("normal", "ties", "zeros", "equal", "huge")


@st.composite
def patterns(draw: st.DrawFn, most: int = 16) -> NM:
    """Any pattern with M up to ``most``; the usual ones often."""
    usual = [(2, 4), (1, 4), (1, 8), (2, 8), (4, 8), (1, 2), (1, 16), (3, 3), (1, 1)]
    fitting = [NM(*pair) for pair in usual if pair[1] <= most]
    of = draw(st.integers(1, most))
    return draw(st.sampled_from(fitting) | st.builds(NM, st.integers(1, of), st.just(of)))


@dataclass(frozen=True)
class Case:
    """A recipe for one layer: builds the same layer and inputs each time."""

    kind: str
    nm: NM
    channels: int  # that one output sees
    outputs: int  # per group
    groups: int = 1
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    bias: bool = True
    dtype: torch.dtype = torch.float32
    fill: str = "normal"
    batch: int = 2
    seed: int = 0

    @property
    def transposed(self) -> bool:
        return self.kind.startswith("t")

    def layer(self) -> nn.Module:
        """The layer, with weights of the asked-for kind."""
        inputs, outputs = self.channels * self.groups, self.outputs * self.groups
        if self.kind == "linear":
            layer: nn.Module = nn.Linear(inputs, outputs, bias=self.bias)
        else:
            layer = CONVS[self.kind](
                inputs,
                outputs,
                self.kernel,
                stride=self.stride,
                dilation=self.dilation,
                groups=self.groups,
                bias=self.bias,
            )
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            weight = layer.weight
            values = torch.randn(weight.shape, generator=generator)
            if self.fill == "ties":
                values = values.sign() * 0.5
            elif self.fill == "zeros":
                values *= torch.rand(weight.shape, generator=generator) > 0.6
            elif self.fill == "equal":
                values = torch.full_like(values, 0.25)
            elif self.fill == "huge":
                values *= 10.0 ** torch.randint(-4, 4, weight.shape, generator=generator)
            weight.copy_(values)
        return layer.to(self.dtype)

    def model(self) -> nn.Module:
        """A model of this one layer, which a default plan therefore makes sparse."""
        return nn.Sequential(self.layer())

    def inputs(self, batch: int | None = None) -> Tensor:
        """Spikes of the layer's dtype."""
        inputs, batch = self.channels * self.groups, self.batch if batch is None else batch
        dims = 0 if self.kind == "linear" else int(self.kind[-2])
        shape = (batch, inputs, *[self.kernel * self.dilation + 1] * dims)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return (torch.rand(shape, generator=generator) < 0.4).to(self.dtype)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    most: int = 16,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    depthwise: bool = False,
    batches: tuple[int, ...] = (0, 1, 2),
) -> Case:
    """Layers of every kind, M dividing their channels or not."""
    nm = draw(patterns(most))
    kind = draw(st.sampled_from(KINDS))
    fewest = 1 if depthwise else 2
    whole = nm.of * draw(st.integers(1, 3))
    channels = draw(st.sampled_from([max(whole, fewest), draw(st.integers(fewest, 20))]))
    linear, flat = kind == "linear", kind.endswith("3d")
    return Case(
        kind,
        nm,
        channels,
        draw(st.integers(1, 4)),
        groups=1 if linear else draw(st.integers(1, 3)),
        kernel=1 if linear else draw(st.integers(1, 2 if flat else 3)),
        stride=1 if linear else draw(st.integers(1, 2)),
        dilation=1 if linear else draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        fill=draw(st.sampled_from(FILLS)),
        batch=draw(st.sampled_from(batches)),
        seed=draw(st.integers(0, 2**20)),
    )


special_values = st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e30])


@st.composite
def scores(draw: st.DrawFn, nm: NM) -> Tensor:
    """Blocks ``(lead, M, inner)`` with ties, zeros, NaN and infinities."""
    lead, inner = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.randn(lead, nm.of, inner, generator=generator)
    if draw(st.booleans()):
        values = values.round()
    for special in draw(st.lists(special_values, max_size=3)):
        values[torch.rand(values.shape, generator=generator) < 0.3] = special
    return values.to(draw(st.sampled_from(DTYPES)))


class Wrapped(nn.Linear):
    """A layer class of some framework: overrides forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """Random module trees: nested, with modules in two places and subclassed layers."""
    made: list[nn.Module] = []

    def leaf() -> nn.Module:
        kind = draw(st.sampled_from(["linear", "wrapped", "conv", "tconv", "depthwise", "other"]))
        return {
            "linear": lambda: nn.Linear(8, 8),
            "wrapped": lambda: Wrapped(8, 12),
            "conv": lambda: nn.Conv2d(8, 4, 3),
            "tconv": lambda: nn.ConvTranspose1d(8, 4, 2),
            "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
            "other": lambda: nn.BatchNorm1d(8),
        }[kind]()

    def node(depth: int) -> nn.Module:
        if made and draw(st.integers(0, 5)) == 0:
            return draw(st.sampled_from(made))
        if depth == 0 or draw(st.booleans()):
            made.append(leaf())
        else:
            children = [node(depth - 1) for _ in range(draw(st.integers(1, 3)))]
            container = draw(st.sampled_from([nn.Sequential, lambda *c: nn.ModuleList(c)]))
            made.append(container(*children))
        return made[-1]

    return nn.Sequential(*[node(3) for _ in range(draw(st.integers(1, 4)))])


class Spike(torch.autograd.Function):
    """Heaviside step with a triangular surrogate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.abs()).clamp(min=0)


class Neuron(nn.Module):
    """A stateless threshold neuron: spikes, and lets gradients through."""

    def forward(self, x: Tensor) -> Tensor:
        return Spike.apply(x)


def network(inputs: int = 8, hidden: int = 16, outputs: int = 4, *, seed: int = 0) -> nn.Module:
    """Linear layers with spikes between them; the default plan makes layer ``2`` sparse."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        Neuron(),
        nn.Linear(hidden, hidden),
        Neuron(),
        nn.Linear(hidden, outputs),
    )


ALL_LAYERS = (Rule("re:.*"),)
"""Turns on what the default plan keeps dense."""


def batches(count: int, *, size: int = 8, inputs: int = 8, seed: int = 1) -> list[Tensor]:
    """Inputs of a few training steps, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, inputs, generator=generator) for _ in range(count)]


def most_nonzero(weight: Tensor, nm: NM, *, transposed: bool = False, groups: int = 1) -> int:
    """The largest count of non-zeros in a block: an oracle that walks the indices one by one."""
    nonzero = (weight.detach() != 0).tolist()
    shape = tuple(weight.shape)
    counts: dict[tuple[int, ...], int] = {}
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        value = nonzero
        for i in index:
            value = value[i]
        channel, rest = (index[0], index[1:]) if transposed else (index[1], [index[0], *index[2:]])
        per_group = shape[0] // groups if transposed else shape[1]
        group, channel = divmod(channel, per_group)
        key = (group, channel // nm.of, *rest)
        counts[key] = counts.get(key, 0) + bool(value)
    return max(counts.values(), default=0)
