# SPDX-License-Identifier: Apache-2.0
"""Wide convolutions of a program gather their sums: the bits of layers that scatter theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from program_strategies import Folded, RuleNeuron, prune, rules
from test_program import LIF, STEP, program, reset
from torch import Tensor, nn

from spikenm_fx.pack import native_status
from spikenm_fx.pattern import NM
from spikenm_fx.trace import NeuronSpec

pytestmark = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")


@dataclass(frozen=True)
class Wide:
    """Two convolutions with a neuron each, and an input ``[N, C, H, W]`` of one step."""

    model: nn.Sequential
    steps: Tensor  # [T, N, C, H, W]


@st.composite
def wide(draw: st.DrawFn) -> Wide:
    """Any geometry that is gathered, with enough pixels and channels; inputs of any density."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    channels = draw(st.sampled_from([1, 3, 8, 17, 64, 70, 256]))
    hidden = draw(st.sampled_from([32, 48, 64, 100, 160]))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    first = nn.Conv2d(
        channels,
        hidden,
        kernel,
        stride=draw(st.sampled_from([1, (1, 2), (2, 1), 2])),
        padding=(
            draw(st.integers(0, kernel[0] // 2 + 1)),
            draw(st.integers(0, kernel[1] // 2 + 1)),
        ),
        dilation=(draw(st.integers(1, 2)), 1),
    )
    second = nn.Conv2d(hidden, draw(st.sampled_from([32, 40])), 3, padding=1)
    with torch.no_grad():
        for layer in (first, second):
            pattern = "2:4" if layer.in_channels % 4 == 0 else "1:1"
            layer.weight.copy_(prune(3 * layer.weight, NM.parse(pattern)))
    rule: NeuronSpec = draw(rules(multi=False))
    model = nn.Sequential(first, RuleNeuron(rule), second, RuleNeuron(rule)).eval()
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), channels, 7, draw(st.integers(6, 9)))
    there = torch.rand(shape) < draw(st.sampled_from([0.02, 0.3, 1.0]))
    return Wide(model, there * (torch.rand(shape) if draw(st.booleans()) else 1.0))


@tries(40)
@given(wide())
def test_gathered_sums_have_the_bits_of_packed_rows(case: Wide) -> None:
    """Weights that stay packed are added input by input, in memory: another way to the same sums.

    ``pack`` has compared both with the model before.
    """
    spikes = (case.steps != 0).float()
    fast, small = (program(case.model, spikes[0], memory=memory) for memory in ("fast", "small"))
    for x in spikes:
        assert torch.equal(fast(x), small(x))


@tries(20)
@given(wide())
def test_a_neuron_that_takes_the_sums_fires_as_one_that_reads_them(case: Wide) -> None:
    """Who observes sees the layers' outputs, which are not written otherwise."""
    engine = program(case.model, case.steps[0])
    alone = [engine(x) for x in case.steps]
    engine.reset()
    engine._net.observe(lambda *_: None)
    assert all(torch.equal(engine(x), y) for x, y in zip(case.steps, alone, strict=True))


def test_a_floor_holds_where_a_neuron_takes_the_sums() -> None:
    """Inhibition beyond the floor is forgotten, whoever adds it up."""
    torch.manual_seed(0)
    layers = (Folded(nn.Conv2d(4, 32, 3, padding=1)), RuleNeuron(replace(LIF, floor=-0.05)))
    model = nn.Sequential(*layers, Folded(nn.Conv2d(32, 32, 1))).eval()
    x = 3 * torch.randn(6, 2, 4, 8, 8)
    with torch.no_grad():
        for engine in (program(model, x), program(model, x, memory="small")):
            reset(model)
            torch.testing.assert_close(engine(x), model(x))


@tries(15)
@given(wide())
def test_gathered_sums_do_not_depend_on_threads_batches_and_levels(case: Wide) -> None:
    """Spikes alone are added, so that the level without fused multiply-adds agrees as well."""
    engine = program(case.model, case.steps[0])
    x = (case.steps[0] != 0).float()
    expected, threads = engine(x), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        engine.reset()
        assert torch.equal(engine(x), expected)
    torch.set_num_threads(threads)
    engine.reset()
    assert torch.equal(engine(torch.cat([x, x])), torch.cat([expected, expected]))
    for level in range(4):
        engine.reset()
        if engine._net.level(level):
            assert torch.equal(engine(x), expected)


def whole(spec: NeuronSpec) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), RuleNeuron(spec), nn.Conv2d(64, 32, 1))


def test_an_image_given_at_each_step_costs_no_other_bits_than_different_ones() -> None:
    """A layer that sees the same at all steps is computed once; its neuron still sees them all."""

    class OverTime(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = whole(STEP).eval()

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.layers(step) for step in x])

    model = OverTime().eval()
    x = torch.rand(1, 2, 3, 6, 6).repeat(4, 1, 1, 1, 1)
    engine = program(model, x)
    same = engine(x)
    engine.reset()
    other = torch.cat([x[:3], torch.rand(1, 2, 3, 6, 6)])
    assert torch.equal(engine(other)[:3], same[:3])


def test_a_long_sequence_is_taken_in_parts_and_gives_what_its_halves_give() -> None:
    """So many steps that their sums would leave the caches; the membranes go on."""
    torch.manual_seed(0)
    layers = (Folded(nn.Conv2d(4, 32, 3, padding=1)), RuleNeuron(LIF), Folded(nn.Conv2d(32, 32, 1)))
    model = nn.Sequential(*layers).eval()
    x = torch.rand(300, 1, 4, 3, 7)
    engine = program(model, x)
    whole = engine(x)
    engine.reset()
    assert torch.equal(torch.cat([engine(x[:77]), engine(x[77:])]), whole)


def test_a_large_batch_is_taken_in_parts_and_gives_what_its_samples_give() -> None:
    """What the first parts write leaves what the last ones read as it is."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 64, 1), RuleNeuron(STEP), nn.Conv2d(64, 64, 3, padding=1))
    model = nn.Sequential(*layers, RuleNeuron(STEP), nn.Conv2d(64, 32, 1)).eval()
    x = torch.rand(300, 4, 16, 16)
    engine = program(model, x[:2])
    whole = engine(x)
    for part in (slice(0, 3), slice(298, 300)):
        engine.reset()
        assert torch.equal(engine(x[part]), whole[part])


def test_nan_reaches_what_a_wide_convolution_makes_of_it_and_nothing_else() -> None:
    """As in torch: only the pixels that read it, and no other sample."""
    model = nn.Sequential(nn.Conv2d(2, 40, 3, padding=1)).eval()
    x = torch.rand(2, 2, 5, 5)
    engine = program(model, x)
    x[1, 0, 2, 2] = float("nan")
    with torch.no_grad():
        assert torch.equal(engine(x).isnan(), model(x).isnan())


def test_zeros_times_what_is_not_finite_are_no_numbers() -> None:
    """Products leave zeros out only where nothing else could come of them."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2)
            return (x @ x.transpose(-1, -2)) @ x

    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), Attention()).eval()
    x = torch.rand(2, 4, 3, 4)
    engine = program(model, x)
    with torch.no_grad():
        assert torch.allclose(engine(x), model(x))
        x[1, 2, 1, 3] = float("inf")
        assert torch.equal(engine(x).isfinite(), model(x).isfinite())
