# SPDX-License-Identifier: Apache-2.0
"""Latency of processing elements that take one output channel each and wait for the slowest.

The model of Workload-Balanced Pruning (u-Ticket, arXiv 2302.06746), as far as it could be read: a
connection costs a cycle.  In each time step of each sample P elements work on P output channels,
round after round, and a round takes as long as its busiest element.  With every input value counted
that tells how evenly the weights are spread; with spikes alone it tells what their real
distribution makes of it, which no utilisation of the weights shows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikenm_fx.pattern import WeightLayer
from spikenm_fx.report.correlation import correlated

__all__ = ["cycles_of", "work_of_channels"]


@torch.no_grad()
def work_of_channels(
    layer: WeightLayer, mask: Tensor, events: Tensor, out: tuple[int, ...]
) -> Tensor:
    """Connections that each output channel has to add up, float64 ``[N, C_out]``.

    Args:
        layer: Linear, Conv or ConvTranspose.
        mask: non-zero where the weight is, of the weight's shape.
        events: ``[N, C]`` or ``[N, C, *spatial]``: how many spikes each input value is.
        out: the output's spatial shape.
    """
    events = events.float()
    kernel = (mask != 0).to(events)
    if isinstance(layer, nn.Linear):
        return F.linear(events, kernel).double()
    return correlated(layer, events, kernel, out).double().flatten(2).sum(2)


def cycles_of(work: Tensor, pes: int) -> int:
    """Cycles of all rounds of ``pes`` elements over work ``[N, C_out]``."""
    return sum(round(float(part.amax(1).sum())) for part in work.split(pes, 1) if part.numel())
