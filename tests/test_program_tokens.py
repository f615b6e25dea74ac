# SPDX-License-Identifier: Apache-2.0
"""Transformers whose layers are Linear on words, which are an axis of each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from program_strategies import RuleNeuron
from test_program import LIF, STEP, program, reset
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pack import native_status, packing

pytestmark = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")


@dataclass(frozen=True)
class Sizes:
    """Of one transformer and its input."""

    steps: int = 3
    batch: int = 2
    words: int = 5
    width: int = 12
    heads: int = 3


class Norm(nn.Module):
    """A batch norm over the channels of ``[*, N, C]``, as such code turns its input for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-2]
        y: Tensor = self.norm(x.reshape(-1, *x.shape[-2:]).transpose(-1, -2)).transpose(-1, -2)
        return y.reshape(*lead, *x.shape[-2:])


class Block(nn.Module):
    """Linear, norm, neuron on ``[T, B, N, C]`` or, in each step, ``[B, N, C]``."""

    def __init__(self, inputs: int, outputs: int, norm: str, neuron: Callable[[], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=norm == "none")
        norms: dict[str, Callable[[int], nn.Module]] = {
            "batch": Norm, "layer": nn.LayerNorm, "none": lambda _: nn.Identity(),
        }  # fmt: skip
        self.norm, self.fire = norms[norm](outputs), neuron()

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.fire(self.norm(self.linear(x)))
        out: Tensor = spikes[0] if isinstance(spikes, tuple) else spikes
        return out


class Transformer(nn.Module):
    """Words embedded, a block of attention by Linear, a perceptron, and a head over their mean.

    Args:
        kind: whose attention.
        sizes: of all.
        neuron: makes one.
        norm: behind each Linear.
        loops: over time in its own forward, on ``[T, B, N, C]``; else in each module.
        folded: layers see ``[T * B, N, C]``.
        places: a parameter is added to each word.
    """

    def __init__(
        self,
        kind: str,
        sizes: Sizes,
        neuron: Callable[[], Any],
        *,
        norm: str = "batch",
        loops: bool = False,
        places: bool = False,
    ) -> None:
        super().__init__()
        c, self.heads = sizes.width, sizes.heads
        self.kind, self.loops = kind, loops
        self.places = nn.Parameter(torch.rand(1, sizes.words, c)) if places else None
        self.embed = Block(4, c, norm, neuron)
        self.q, self.k, self.v, self.project = (Block(c, c, norm, neuron) for _ in range(4))
        self.attend, self.up = neuron(), Block(c, 2 * c, norm, neuron)
        self.down, self.head = Block(2 * c, c, norm, neuron), nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.loops:
            return self.step(x)
        return torch.stack([self.step(frame) for frame in x])

    def step(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.places is not None:
            x = x + self.places
        x = x + self.project(getattr(self, self.kind)(x))
        x = x + self.down(self.up(x))
        out: Tensor = self.head(x.mean(-2))
        return out

    def per_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def fired(self, x: Tensor) -> Tensor:
        spikes = self.attend(x)
        out: Tensor = spikes[0] if isinstance(spikes, tuple) else spikes
        return out

    def merged(self, y: Tensor) -> Tensor:
        return self.fired(y.transpose(-2, -3).flatten(-2))

    def spikformer(self, x: Tensor) -> Tensor:
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        return self.merged((q @ k.transpose(-2, -1)) * 0.25 @ v)

    def keys_first(self, x: Tensor) -> Tensor:
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        return self.merged(q @ (k.transpose(-2, -1) @ v) * 0.25)

    def softmax(self, x: Tensor) -> Tensor:
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        return self.merged((q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v)

    def driven(self, x: Tensor) -> Tensor:
        """Of the Spike-driven Transformer: a mask of channels."""
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        mask = self.fired((k * v).sum(dim=-2, keepdim=True))
        return (q * mask).transpose(-2, -3).flatten(-2)

    def token_mask(self, x: Tensor) -> Tensor:
        """Of QKFormer: which words matter to a head."""
        q, k = (self.per_head(f(x)) for f in (self.q, self.k))
        mask = self.fired(q.sum(dim=-1, keepdim=True))
        return (mask * k).transpose(-2, -3).flatten(-2)

    def heads_in_the_batch(self, x: Tensor) -> Tensor:
        """By ``bmm``, as multi-head attention is often written."""
        lead = x.shape[:-2]
        q, k, v = (self.per_head(f(x)).reshape(-1, x.shape[-2], x.shape[-1] // self.heads)
                   for f in (self.q, self.k, self.v))  # fmt: skip
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)), v) * 0.25
        return self.merged(y.reshape(*lead, self.heads, *y.shape[-2:]))

    def by_letters(self, x: Tensor) -> Tensor:
        lead = "tb"[-(x.dim() - 2) :]
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        scores = torch.einsum(f"{lead}hnd,{lead}hmd->{lead}hnm", q, k)
        seen = scores * torch.tril(torch.ones(x.shape[-2], x.shape[-2]))
        return self.merged(torch.einsum(f"{lead}hnm,{lead}hmd->{lead}hnd", seen, v) * 0.25)

    def by_torch(self, x: Tensor) -> Tensor:
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        return self.merged(nn.functional.scaled_dot_product_attention(q, k, v))


KINDS = ["spikformer", "keys_first", "softmax", "driven", "token_mask", "heads_in_the_batch"]
WRITTEN_OTHERWISE = ["by_letters", "by_torch"]


def lively(model: nn.Module) -> nn.Module:
    """Weights that make neurons fire, and norms that are none of the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(2)
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            module.weight.data.uniform_(0.7, 1.5)
            module.bias.data.normal_(0.4, 0.2)
    return model.eval()


def held_to(model: nn.Module, x: Tensor, at_rest: Callable[[nn.Module], Any]) -> Any:
    """The program, as far from its model as rounding; also on more samples and steps."""
    at_rest(model)
    engine = program(model, x)
    assert packing(engine).proof is not None
    with torch.no_grad():
        for y in (x, torch.cat([x, x.flip(1)], dim=1), torch.cat([x, x])):
            engine.reset()
            at_rest(model)
            torch.testing.assert_close(engine(y), model(y), rtol=1e-4, atol=1e-4)
    at_rest(model)
    engine.reset()
    return engine


@tries(25)
@given(st.data())
def test_attention_by_linear_runs_natively(data: st.DataObject) -> None:
    """Of any size, kind and norm; over all steps at once, or in a loop."""
    heads, loops = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.booleans())
    sizes = Sizes(
        *(data.draw(st.integers(low, high)) for low, high in ((1 + 2 * loops, 4), (1, 3), (1, 6))),
        width=heads * data.draw(st.sampled_from([2, 4, 6])),
        heads=heads,
    )
    torch.manual_seed(data.draw(st.integers(0, 999)))
    kind, norm = (
        data.draw(st.sampled_from([*KINDS, *WRITTEN_OTHERWISE])),
        data.draw(st.sampled_from(["batch", "layer", "none"])),
    )
    rule = STEP if loops else LIF
    model = lively(
        Transformer(
            kind, sizes, lambda: RuleNeuron(rule), norm=norm, loops=loops,
            places=data.draw(st.booleans()),
        )
    )  # fmt: skip
    held_to(model, 2 * torch.rand(sizes.steps, sizes.batch, sizes.words, 4), reset)


@pytest.mark.parametrize("kind", KINDS)
def test_spikingjellys_neurons_over_all_steps(kind: str) -> None:
    """``[T, B, N, C]``, neurons that step through time themselves."""
    pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based import functional, neuron

    torch.manual_seed(0)
    sizes = Sizes()
    model = lively(Transformer(kind, sizes, lambda: neuron.LIFNode(step_mode="m")))
    x = 4 * torch.rand(sizes.steps, sizes.batch, sizes.words, 4)
    engine = held_to(model, x, functional.reset_net)
    with torch.no_grad():
        assert model(x).std() > 0
    with pytest.raises(PackError, match="axis 2 of the input has size 4; the network was made for"):
        engine(x[:, :, 1:])


@pytest.mark.parametrize("kind", KINDS)
def test_snntorchs_neurons_in_a_loop(kind: str) -> None:
    """``[B, N, C]`` in each step of the forward's own loop."""
    snn = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    sizes = Sizes()

    def neuron() -> Any:
        return snn.Leaky(beta=0.8, threshold=0.6, init_hidden=True)

    def at_rest(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, snn.Leaky):
                module.reset_mem()

    model = lively(Transformer(kind, sizes, neuron, loops=True))
    held_to(model, 2 * torch.rand(sizes.steps, sizes.batch, sizes.words, 4), at_rest)


def test_one_step_a_call() -> None:
    """``[B, N, C]`` with states that stay from call to call."""
    torch.manual_seed(0)
    sizes = Sizes()
    model = lively(Transformer("spikformer", sizes, lambda: RuleNeuron(STEP), norm="layer"))
    frames = 2 * torch.rand(4, sizes.batch, sizes.words, 4)
    engine = program(model, frames[0])
    reset(model)
    with torch.no_grad():
        for frame in frames:
            torch.testing.assert_close(engine(frame), model(frame), rtol=1e-4, atol=1e-4)


class Series(nn.Module):
    """A time series ``[B, L, C]`` whose encoder makes steps of channels, as iSpikformer's does.

    Args:
        by: the layer that makes them.
        neuron: makes one, of all steps.
    """

    def __init__(self, by: str, neuron: Callable[[], Any], sizes: Sizes, length: int) -> None:
        super().__init__()
        self.by = by
        layer = {
            "conv": nn.Sequential(
                nn.Conv2d(1, sizes.steps, (1, 3), padding=(0, 1)), nn.BatchNorm2d(sizes.steps)
            ),
            "linear": nn.Linear(1, sizes.steps),
        }
        self.encode, self.fire = layer[by], neuron()
        self.body = Transformer("spikformer", sizes, neuron)
        self.body.embed = Block(length, sizes.width, "batch", neuron)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        if self.by == "conv":
            steps = self.encode(y.unsqueeze(1)).permute(1, 0, 2, 3)
        else:
            steps = self.encode(y.unsqueeze(-1)).permute(3, 0, 1, 2)
        out: Tensor = self.body(self.fire(steps))
        return out.mean(0)


@pytest.mark.parametrize("by", ["conv", "linear"])
def test_an_encoder_that_makes_steps_of_channels(by: str) -> None:
    """Each call makes all of its steps: of any batch, and of no other length; it has no single."""
    torch.manual_seed(0)
    sizes = Sizes()
    model = lively(Series(by, lambda: RuleNeuron(LIF), sizes, length=7))
    x = 4 * torch.randn(sizes.batch, 7, sizes.words)
    engine = program(model, x)
    with torch.no_grad():
        for y in (x, torch.cat([x, -x])):
            engine.reset()
            reset(model)
            torch.testing.assert_close(engine(y), model(y), rtol=1e-4, atol=1e-4)
        assert engine(y).std() > 0
    with pytest.raises(PackError, match="no single ones"):
        engine.step(x)
    with pytest.raises(PackError, match="axis 1 of the input has size 6"):
        engine(x[:, 1:])


class Mixer(nn.Module):
    """Layers along words and along channels in turn, norms of both, and joined words."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed, self.fire = nn.Linear(4, width), RuleNeuron(LIF)
        self.across, self.along = nn.Linear(words, words), nn.Linear(width, width)
        self.of_words, self.both = nn.BatchNorm1d(words), nn.LayerNorm((words, width))
        self.last, self.head = RuleNeuron(LIF), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fire(self.embed(x))
        y = y + self.across(y.transpose(-1, -2)).transpose(-1, -2)
        y = self.of_words(self.along(y).flatten(0, 1)).unflatten(0, x.shape[:2])
        y = self.last(self.both(torch.cat([y, y], dim=2)[:, :, : y.shape[2]]))
        out: Tensor = self.head(y.mean(2))
        return out


def test_layers_and_norms_along_words() -> None:
    """A Linear, a batch norm, a layer norm of both axes, and a concatenation, all along words."""
    torch.manual_seed(0)
    held_to(lively(Mixer(5, 8)), 2 * torch.rand(3, 2, 5, 4), reset)


class Pooled(nn.Module):
    """Products of words, reduced over steps and words at once."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.layer, self.fire, self.head = nn.Linear(4, 8), RuleNeuron(LIF), nn.Linear(8, 3)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        y = self.fire(self.layer(x))
        y = y @ y.transpose(-1, -2) @ y
        out: Tensor = self.head(y.mean((0, 2)) if self.mean else y.sum((0, -2)))
        return out


@pytest.mark.parametrize("mean", [True, False])
def test_steps_and_words_are_reduced_at_once(mean: bool) -> None:
    """Both axes of one mean or sum."""
    torch.manual_seed(0)
    model, x = lively(Pooled(mean)), 2 * torch.rand(3, 2, 5, 4)
    engine = program(model, x)
    with torch.no_grad():
        for y in (x, torch.cat([x, x]), torch.cat([x, x], dim=1)):
            engine.reset()
            reset(model)
            torch.testing.assert_close(engine(y), model(y), rtol=1e-4, atol=1e-4)


class Similar(nn.Module):
    """Products of samples with each other: what one of them gives depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fire, self.head = nn.Linear(6, 8), RuleNeuron(LIF), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fire(self.layer(x))
        out: Tensor = self.head(y @ y.transpose(-1, -2) @ y)
        return out


def test_samples_that_meet_each_other_are_of_a_fixed_number() -> None:
    """An axis that a product mixes is one of the token: another size of it is refused by name."""
    torch.manual_seed(0)
    model, x = lively(Similar()), 2 * torch.rand(3, 4, 6)
    engine = program(model, x)
    with torch.no_grad():
        reset(model)
        torch.testing.assert_close(engine(x), model(x))
    with pytest.raises(PackError, match="axis 1 of the input has size 3"):
        engine(x[:, 1:])
