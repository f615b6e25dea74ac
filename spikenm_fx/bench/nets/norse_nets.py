# SPDX-License-Identifier: Apache-2.0
"""Norse networks: SequentialState a step, in a loop, lifted over time, and recurrent."""

from __future__ import annotations

import norse.torch as norse
import torch
from torch import Tensor, nn

__all__ = ["make"]


class Loop(nn.Module):
    """The usual MNIST model: convolutions and LIF cells in a loop over time, LI readout."""

    def __init__(self) -> None:
        super().__init__()
        p = norse.LIFParameters(v_th=torch.as_tensor(0.3))
        self.conv1, self.lif1 = nn.Conv2d(1, 8, 5), norse.LIFCell(p=p)
        self.conv2, self.lif2 = nn.Conv2d(8, 12, 5), norse.LIFCell(p=p)
        self.fc1, self.lif3 = nn.Linear(12 * 4 * 4, 24), norse.LIFCell(p=p)
        self.out = norse.LILinearCell(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 1, 28, 28]`` to voltages ``[T, N, 10]``."""
        s1 = s2 = s3 = so = None
        voltages = []
        for step in range(x.shape[0]):
            z, s1 = self.lif1(self.conv1(x[step]), s1)
            z = nn.functional.max_pool2d(z, 2, 2)
            z, s2 = self.lif2(10 * self.conv2(z), s2)
            z = nn.functional.max_pool2d(z, 2, 2).flatten(1)
            z, s3 = self.lif3(10 * self.fc1(z), s3)
            v, so = self.out(nn.functional.relu(z), so)
            voltages.append(v)
        return torch.stack(voltages)


def make(name: str) -> tuple[nn.Module, Tensor]:
    """One of the networks and an input that makes it spike."""
    p = norse.LIFParameters(v_th=torch.as_tensor(0.2))
    if name == "loop":
        return Loop(), torch.rand(4, 2, 1, 28, 28) * 20
    if name == "sequential":
        return (
            norse.SequentialState(
                nn.Linear(16, 32), norse.LIFCell(p=p), nn.Linear(32, 10), norse.LICell()
            ),
            torch.rand(2, 16) * 80,
        )
    if name == "lift":
        return (
            norse.SequentialState(
                norse.Lift(nn.Conv2d(2, 8, 3)),
                norse.LIF(p=p),
                norse.Lift(nn.Flatten()),
                norse.Lift(nn.Linear(8 * 36, 10)),
                norse.LI(),
            ),
            torch.rand(4, 2, 2, 8, 8) * 40,
        )
    return (
        norse.SequentialState(
            norse.LIFRecurrent(16, 32, p=p), norse.Lift(nn.Linear(32, 10)), norse.LIF(p=p)
        ),
        torch.rand(4, 2, 16) * 20,
    )
