# SPDX-License-Identifier: Apache-2.0
"""What a report finds out by itself, and what it says of how it counts."""

import pytest
import torch
from torch import Tensor, nn

import spikenm_fx

functional = pytest.importorskip("spikingjelly.activation_based.functional")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")


def chain(mode: str) -> nn.Module:
    """Two neurons and a readout of SpikingJelly's."""
    torch.manual_seed(0)
    parts = (layer.Linear(8, 16), neuron.IFNode(), layer.Linear(16, 16), neuron.IFNode())
    model = nn.Sequential(*parts, layer.Linear(16, 4))
    functional.set_step_mode(model, mode)
    return model


class Loop(nn.Module):
    """The same, one step at a time, along an axis of its input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = chain("s"), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "second":
            return torch.stack([self.net(x[:, t]) for t in range(x.shape[1])]).mean(0)
        if self.how == "permuted":
            x = x.permute(1, 0, 2)
        steps = list(x) if self.how == "iterated" else [x[t] for t in range(x.shape[0])]
        return torch.stack([self.net(step) for step in steps]).mean(0)


@pytest.mark.parametrize("steps", [2, 5, 30])
@pytest.mark.parametrize("how", ["multi", "first", "iterated", "second", "permuted"])
def test_samples_are_found_along_their_axis(how: str, steps: int) -> None:
    """Whatever goes along time, three samples are three, and operations are per sample."""
    model = chain("m") if how == "multi" else Loop(how)
    late = how in ("second", "permuted")
    x = torch.rand(3, steps, 8) if late else torch.rand(steps, 3, 8)
    found = spikenm_fx.report(model, [x])
    assert found.samples == 3
    assert found.operations == spikenm_fx.report(model, [x], batch_dim=0 if late else 1).operations
    assert any("batch_dim" in note for note in found.notes) != late


def test_a_given_axis_counts() -> None:
    """batch_dim says otherwise."""
    assert spikenm_fx.report(chain("m"), [torch.rand(4, 3, 8)], batch_dim=0).samples == 4


def test_a_loop_that_was_left_outside_is_named() -> None:
    """A single-step model that is called once is silent; the note says how to give its loop."""
    model, x = chain("s"), torch.rand(3, 8) / 4
    silent = spikenm_fx.report(model, [x])
    assert any("range(T)" in note for note in silent.notes)
    looped = spikenm_fx.report(model, [x], forward=lambda model, x: [model(x) for _ in range(60)])
    assert looped.firing_rate
    assert looped.samples == 3
    assert not any("range(T)" in note for note in looped.notes)


def test_counts_are_said_to_be_additions_and_remove_nothing_below_zero() -> None:
    """Many spikes in one value are many additions; no share of products is negative."""
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.full((2, 8), 3.0)
    x[0, 0] = 2.0
    found = spikenm_fx.report(model, [x])
    assert found.layers[0].signal == "integer"
    assert found.operations.synops == int(x.sum()) * 4
    assert found.layers[0].dual_sparsity == 0.0
    assert found.dual_sparsity == 0.0
    assert any("k additions" in note for note in found.notes)


def test_zeros_of_analog_inputs_are_told_beside_the_macs() -> None:
    """MACs count them; the note says how many there are."""
    x = torch.rand(2, 8)
    x[:, :4] = 0
    found = spikenm_fx.report(nn.Sequential(nn.Linear(8, 4)), [x])
    assert found.operations.macs == 2 * 8 * 4
    assert any("50%" in note for note in found.notes)
