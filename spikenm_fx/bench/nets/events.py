# SPDX-License-Identifier: Apache-2.0
"""Small spiking classifiers of event frames ``[T, B, 2, H, W]``: feed-forward and recurrent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikenm_fx.demo.networks import LIF, AtanSpike

__all__ = ["FeedForward", "Recurrent"]


class FeedForward(nn.Module):
    """Three linear layers with leaky neurons, the scores averaged over time.

    Args:
        features: input values of a frame.
        hidden: neurons of each layer.
        classes: outputs.
        tau: time constant of the neurons, in steps.
    """

    def __init__(
        self, features: int, hidden: int = 128, classes: int = 8, tau: float = 4.0
    ) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(features, hidden), LIF(tau, threshold=0.1)
        self.fc2, self.lif2 = nn.Linear(hidden, hidden), LIF(tau, threshold=0.1)
        self.fc3, self.lif3 = nn.Linear(hidden, hidden), LIF(tau, threshold=0.1)
        self.readout = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 2, H, W]`` events to class scores ``[B, classes]``."""
        x = self.lif1(self.fc1(x.flatten(2)))
        x = self.lif3(self.fc3(self.lif2(self.fc2(x))))
        return self.readout(x).mean(0)  # type: ignore[no-any-return]


class Cell(nn.Module):
    """One step of a leaky neuron whose state the caller carries, hard reset."""

    def __init__(self, tau: float, threshold: float) -> None:
        super().__init__()
        self.tau, self.threshold = tau, threshold

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C]`` current and membrane to spikes and the next membrane."""
        v = v + (x - v) / self.tau
        spike = AtanSpike.apply(v - self.threshold)  # type: ignore[no-untyped-call]
        return spike, v * (1 - spike.detach())


class Recurrent(nn.Module):
    """A layer whose spikes come back through weights of its own at the next step, and one more.

    Arguments as of :class:`FeedForward`.
    """

    def __init__(
        self, features: int, hidden: int = 128, classes: int = 8, tau: float = 4.0
    ) -> None:
        super().__init__()
        self.fc1, self.back = nn.Linear(features, hidden), nn.Linear(hidden, hidden, bias=False)
        self.cell1, self.cell2 = Cell(tau, 0.1), Cell(tau, 0.1)
        self.fc2 = nn.Linear(hidden, hidden)
        self.readout = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 2, H, W]`` events to class scores ``[B, classes]``."""
        driven = self.fc1(x.flatten(2))
        spikes = torch.zeros_like(driven[0])
        v1, v2 = torch.zeros_like(spikes), torch.zeros_like(spikes)
        scores = []
        for current in driven:
            spikes, v1 = self.cell1(current + self.back(spikes), v1)
            out, v2 = self.cell2(self.fc2(spikes), v2)
            scores.append(self.readout(out))
        return torch.stack(scores).mean(0)
