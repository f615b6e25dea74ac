# SPDX-License-Identifier: Apache-2.0
"""Random networks that have a program: convolutions, pools, joins and neurons of any rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from pack_strategies import prune
from torch import Tensor, nn

from spikenm_fx.pattern import NM
from spikenm_fx.trace import NeuronSpec, register_neuron
from spikenm_fx.trace.neurons.spec import Synapse, simulate

__all__ = ["Example", "RuleNeuron", "examples"]

RESETS = st.sampled_from(["hard", "subtract", "none"])


class RuleNeuron(nn.Module):
    """A neuron that computes what its spec says, in plain torch, and keeps its state.

    Args:
        spec: its rule; time is axis 0 of its input where ``time_axis`` is 0.
    """

    def __init__(self, spec: NeuronSpec) -> None:
        super().__init__()
        self.spec = spec
        self.v: Any = None

    def reset(self) -> None:
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        steps = x if self.spec.time_axis == 0 else x[None]
        spikes, self.v = simulate(self.spec, steps, self.v)
        return spikes if self.spec.time_axis == 0 else spikes[0]


def _spec(module: Any) -> NeuronSpec:
    spec: NeuronSpec = module.spec
    return spec


register_neuron(RuleNeuron, read=_spec)


class Folded(nn.Module):
    """Layers without state on ``[T, N, ...]``."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x.flatten(0, 1))
        folded: Tensor = y.unflatten(0, x.shape[:2])
        return folded


class Net(nn.Module):
    """Stem, blocks that keep width and size, a pool, and a head; over time, or one step a call."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        fold = Folded if parts.multi else nn.Sequential
        width = parts.width
        self.stem = fold(nn.Conv2d(parts.inputs, width, 3, parts.stride, 1), nn.BatchNorm2d(width))
        self.first = parts.neuron(0)
        self.blocks = nn.ModuleList()
        self.neurons = nn.ModuleList()
        for at, kind in enumerate(parts.kinds):
            groups = {"grouped": 2, "depthwise": width}.get(kind, 1)
            wide = 2 * width if kind == "cat" else width
            conv = nn.Conv2d(wide, width, 3, 1, 1, groups=groups, bias=at % 2 == 0)
            self.blocks.append(fold(conv, nn.BatchNorm2d(width)))
            self.neurons.append(parts.neuron(at + 1))
        pools = {"max": nn.MaxPool2d(2), "mean": nn.AvgPool2d(3, 2, 1), "none": nn.Identity()}
        pools |= {"adaptive": nn.AdaptiveAvgPool2d(2), "odd": nn.MaxPool2d(3, 2, 1)}
        self.pool = fold(pools[parts.pool])
        self.head = nn.LazyLinear(5)
        self.readout = parts.neuron(99) if parts.reads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        for kind, block, neuron in zip(self.parts.kinds, self.blocks, self.neurons, strict=True):
            y = torch.cat([x, x], dim=-3) if kind == "cat" else x
            y = block(y)
            if kind == "residual":
                x = neuron(y + x)
                continue
            y = neuron(y)
            x = y + x if kind == "sew" else y * x if kind == "and" else y
            x = (1 - y) * x if kind == "iand" else x
        x = self.readout(self.head(self.pool(x).flatten(-3)))
        return x.mean(0) if self.parts.multi and self.parts.averages else x


@dataclass(frozen=True)
class Parts:
    """What a random network is made of."""

    kinds: tuple[str, ...]
    rules: tuple[NeuronSpec, ...]
    pool: str
    inputs: int
    width: int
    stride: int
    multi: bool
    averages: bool
    reads: bool

    def neuron(self, which: int) -> RuleNeuron:
        return RuleNeuron(self.rules[which % len(self.rules)])


@dataclass(frozen=True)
class Example:
    """A network at rest and one input, whole: ``[T, N, C, H, W]``, or ``[N, C, H, W]``."""

    model: Net
    x: Tensor
    multi: bool


@st.composite
def rules(draw: st.DrawFn, *, multi: bool) -> NeuronSpec:
    """Any rule that a program runs."""
    reset: Any = draw(RESETS)
    timing: Any = draw(st.sampled_from(["now", "next", "corrected"]))
    if timing == "corrected" and reset == "hard":
        timing = "now"
    output: Any = draw(st.sampled_from(["spike", "spike", "spike", "integer"]))
    synapse = draw(
        st.sampled_from([None, None, Synapse(0.5), Synapse(0.8, 0.2, "undecayed")]),
    )
    return NeuronSpec(
        framework="test",
        class_name="RuleNeuron",
        kind="lif",
        exact=True,
        decay=draw(st.sampled_from([1.0, 0.5, 0.9])),
        gain=draw(st.sampled_from([1.0, 0.5])),
        rest=draw(st.sampled_from([0.0, 0.0, -0.1])),
        synapse=synapse,
        threshold=draw(st.sampled_from([0.3, 0.7, 1.0])),
        strict=draw(st.booleans()),
        reset=reset,
        reset_timing=timing if output == "spike" else "now",
        floor=draw(st.sampled_from([None, None, -0.2])),
        output=output,
        time_axis=0 if multi else None,
        step_mode="multi" if multi else "single",
    )


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A network with random weights at a random N:M, and an input with few or many zeros."""
    multi = draw(st.booleans())
    blocks = ["plain", "residual", "sew", "and", "iand", "cat", "grouped", "depthwise"]
    parts = Parts(
        tuple(draw(st.lists(st.sampled_from(blocks), max_size=3))),
        tuple(draw(st.lists(rules(multi=multi), min_size=1, max_size=3))),
        draw(st.sampled_from(["max", "mean", "none", "adaptive", "odd"])),
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([2, 6, 12, 18])),
        draw(st.sampled_from([1, 2])),
        multi,
        draw(st.booleans()),
        draw(st.booleans()),
    )
    torch.manual_seed(draw(st.integers(0, 9999)))
    model = Net(parts).eval()
    size = draw(st.sampled_from([(4, 4), (5, 3), (7, 6)]))
    batch, steps = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = (*((steps,) if multi else ()), batch, parts.inputs, *size)
    x = torch.rand(shape) * (torch.rand(shape) < draw(st.sampled_from([0.1, 0.6, 1.0])))
    x = x.round() if draw(st.booleans()) else x
    with torch.no_grad():
        model(x)
        pattern = NM.parse(draw(st.sampled_from(["1:1", "2:4", "1:2", "1:4"])))
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(prune(2 * module.weight, pattern))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.normal_(0, 0.2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.2, 0.2)
            if isinstance(module, RuleNeuron):
                module.reset()
    return Example(model, x, multi)
