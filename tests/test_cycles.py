# SPDX-License-Identifier: Apache-2.0
"""Cycles of processing elements, connection by connection and spike by spike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.pattern import NM, BlockView
from spikenm_fx.report.cycles import cycles_of, work_of_channels


def rounds(work: list[float], pes: int) -> float:
    """Of one sample: each round of elements takes as long as the busiest."""
    return sum(max(work[first : first + pes]) for first in range(0, len(work), pes))


@pytest.mark.parametrize("pes", [1, 3, 16])
def test_cycles_of_a_linear_layer_by_three_loops(pes: int) -> None:
    """Samples, outputs, inputs: each spike that meets a connection is a cycle of its element."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 7, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(7, 6) < 0.5)
    spikes = (torch.rand(4, 2, 6) < 0.4).float()
    by_spikes, by_weights = 0.0, 0.0
    for sample in spikes.flatten(0, 1).tolist():
        work, every = [0.0] * 7, [0.0] * 7
        for o in range(7):
            for i in range(6):
                if layer.weight[o, i] != 0:
                    work[o] += sample[i]
                    every[o] += 1
        by_spikes += rounds(work, pes)
        by_weights += rounds(every, pes)
    found = spikenm_fx.report(nn.Sequential(layer), [spikes], batch_dim=1, pes=pes)
    assert found.layers[0].cycles_spikes == by_spikes
    assert found.layers[0].cycles_weights == by_weights
    assert found.cycles == (by_spikes / 2, by_weights / 2)
    total = found.to_dict()["total"]
    assert total["cycles_spikes_per_sample"] == by_spikes / 2
    assert total["cycles_weights_per_sample"] == by_weights / 2
    assert f"{pes} PEs, which need" in str(found)


@given(cases(most=4, dtypes=(torch.float32,)), st.integers(0, 99))
def test_work_of_every_kind_of_layer(case, seed: int) -> None:
    """The work of all channels is what the layer's own arithmetic counts, channel by channel."""
    layer = case.layer()
    view = BlockView.of_layer(layer, NM(1, 1))
    channels = case.channels * case.groups
    dims = layer.weight.dim() - 2
    generator = torch.Generator().manual_seed(seed)
    shape = (3, channels, *[case.kernel * case.dilation + 1] * dims) if dims else (3, channels)
    events = torch.randint(0, 3, shape, generator=generator).float()
    with torch.no_grad():
        out = tuple(layer(events).shape[2:])
    mask = layer.weight.detach() != 0
    found = work_of_channels(layer, mask, events, out)
    ones = nn.Module.__new__(type(layer))
    ones.__dict__.update(layer.__dict__)
    ones._parameters = {"weight": nn.Parameter(mask.float()), "bias": None}
    with torch.no_grad():
        expected: Tensor = ones(events)
    assert torch.equal(found, expected.double().reshape(3, found.shape[1], -1).sum(2))
    assert view.output_major(mask).shape[0] == found.shape[1]


def test_spikes_make_even_weights_uneven() -> None:
    """All weights there, utilisation 1; only spikes show that one element has all the work."""
    layer = nn.Conv1d(4, 4, 1, groups=4, bias=False)
    spikes = F.one_hot(torch.zeros(5, dtype=torch.int64), 4).float().unsqueeze(-1)
    found = spikenm_fx.report(nn.Sequential(layer), [spikes], pes=4).layers[0]
    assert found.utilisation == 1.0
    assert found.cycles_weights == found.cycles_spikes == 5
    assert found.operations.synops / (4 * found.cycles_spikes) == 0.25


def test_rounds_add_up() -> None:
    """Two rounds of two elements: the busiest of each."""
    assert cycles_of(torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, 0.0, 5.0, 1.0]]), 2) == 7 + 5
