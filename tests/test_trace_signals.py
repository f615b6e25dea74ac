# SPDX-License-Identifier: Apache-2.0
"""Signals held against measurement: on the frameworks' models and on random networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from snn_strategies import random_nets
from torch import Tensor, nn

from spikenm_fx.bench.tracing import Row, _edges_by_measurement, _inputs_by_measurement
from spikenm_fx.bench.zoo import Case
from spikenm_fx.report import signal_kind
from spikenm_fx.trace import coupled_groups, permute_channels, trace
from spikenm_fx.trace.analysis.signal import ANALOG, SPIKE, Signal, join


@pytest.mark.slow
@tries(40)
@given(random_nets())
def test_random_networks(drawn: tuple[nn.Module, Tensor]) -> None:
    """On random networks: all layers found, spikes are spikes, groups permute exactly."""
    model, x = drawn
    graph = trace(model, x)
    assert graph.route == "fx"
    assert all(record.calls for record in graph.layers.values())
    row = Row("random")
    case = Case(model, (x,), lambda m: None)
    _edges_by_measurement(row, case, graph, seeds=2)
    _inputs_by_measurement(row, case, graph, seeds=2)
    assert (row.spike_wrong, row.input_wrong) == (0, 0)
    with torch.no_grad():
        before = model(x)
        for group in coupled_groups(graph):
            if not group.frozen:
                permute_channels(model, group, torch.randperm(group.size))
        after = model(x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-8)


def test_the_abstract_values() -> None:
    """Sums of spikes are integers, (1 - a) * b is a spike, half of one a scaled spike."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

        def forward(self, x: Tensor) -> list[Tensor]:
            a, b = (x > 0.5).float(), (x > 0.3).float()
            values = [a, a + b, (1 - a) * b, a * 0.5, a @ b.mT, torch.cat([a, b])]
            values += [torch.where(a > 0, b, a), (a + b).clamp(0, 1)]
            return [layer(value) for layer, value in zip(self.layers, values, strict=True)]

    graph = trace(Net(), torch.rand(4, 4))
    kinds = [str(graph.layers[f"layers.{i}"].input_signal) for i in range(8)]
    assert kinds == [
        *("spike", "integer", "spike", "scaled", "integer", "spike"),
        *("spike", "spike"),
    ]
    assert graph.layers["layers.3"].input_signal.step == 0.5


def test_joins_widen() -> None:
    """The join of signals holds each of them."""
    assert join([SPIKE, Signal(True, 0, 3)]).kind == "integer"
    assert join([SPIKE, ANALOG]).kind == "analog"
    assert join([SPIKE, SPIKE]).kind == "spike"


@given(st.lists(st.tuples(st.booleans(), st.floats(-9, 9), st.floats(0, 9)), min_size=1))
def test_join_is_an_upper_bound(drawn: list[tuple[bool, float, float]]) -> None:
    """No part of a join lies outside it."""
    signals = [Signal(integral, low, low + width) for integral, low, width in drawn]
    both = join(signals)
    assert all(both.low <= s.low and s.high <= both.high for s in signals)
    assert both.integral == all(s.integral for s in signals)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.0, 1.0], "spike"),
        ([True, False], "spike"),
        ([0, 3, -2], "integer"),
        ([0.0, 64.0], "integer"),
        ([0.0, 65.0], "analog"),
        ([0, 255], "analog"),
        ([0.5, 1.0], "analog"),
    ],
)
def test_trace_and_report_agree_on_values(values: list[float], kind: str) -> None:
    """One rule for what an input is, large whole numbers (pixels, codes) included."""
    x = torch.tensor(values)
    assert signal_kind(x) == kind
    model = nn.Sequential(nn.Identity(), nn.Linear(len(values), 2))
    graph = trace(model, x.float()[None])
    signal = graph.layers["1"].input_signal
    assert signal is not None
    assert signal.kind == kind
