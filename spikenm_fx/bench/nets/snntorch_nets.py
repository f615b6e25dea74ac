# SPDX-License-Identifier: Apache-2.0
"""The networks of snnTorch's tutorials, small: explicit states, hidden states, recurrence."""

from __future__ import annotations

import snntorch as snn
import torch
from snntorch import utils
from torch import Tensor, nn

__all__ = ["make", "reset"]


class Loop(nn.Module):
    """Tutorial 5: two Leaky layers, states carried by the loop over time in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 32), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(32, 10), snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, N, 16]`` to spikes and membranes ``[T, N, 10]``."""
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spikes, membranes = [], []
        for step in range(x.size(0)):
            spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            membranes.append(mem2)
        return torch.stack(spikes, dim=0), torch.stack(membranes, dim=0)


class Recurrent(nn.Module):
    """RLeaky with all-to-all recurrence and with one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.lif1 = snn.RLeaky(beta=0.9, linear_features=32)
        self.fc2 = nn.Linear(32, 10)
        self.lif2 = snn.RLeaky(beta=0.9, all_to_all=False, V=0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 16]`` to spikes ``[T, N, 10]``."""
        spk1, mem1 = self.lif1.init_rleaky()
        spk2, mem2 = self.lif2.init_rleaky()
        out = []
        for step in range(x.size(0)):
            spk1, mem1 = self.lif1(self.fc1(x[step]), spk1, mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), spk2, mem2)
            out.append(spk2)
        return torch.stack(out)


class Synaptic(nn.Module):
    """Linear layers with second-order neurons, synaptic current and membrane handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 32), snn.Synaptic(alpha=0.8, beta=0.9)
        self.fc2, self.lif2 = nn.Linear(32, 10), snn.Synaptic(alpha=0.8, beta=0.9)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 16]`` to spikes ``[T, N, 10]``."""
        syn1, mem1 = self.lif1.init_synaptic()
        syn2, mem2 = self.lif2.init_synaptic()
        out = []
        for step in range(x.size(0)):
            spk1, syn1, mem1 = self.lif1(self.fc1(x[step]), syn1, mem1)
            spk2, syn2, mem2 = self.lif2(self.fc2(spk1), syn2, mem2)
            out.append(spk2)
        return torch.stack(out)


def _sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, 32),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(32, 10),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )


def _conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 12, 5),
        nn.MaxPool2d(2),
        snn.Leaky(beta=0.5, init_hidden=True),
        nn.Conv2d(12, 32, 5),
        nn.MaxPool2d(2),
        snn.Leaky(beta=0.5, init_hidden=True),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
        snn.Leaky(beta=0.5, init_hidden=True, output=True),
    )


def make(name: str) -> tuple[nn.Module, Tensor]:
    """One of the networks and an input that makes it spike."""
    sequence = torch.rand(4, 2, 16) * 3
    if name == "conv":
        return _conv(), torch.rand(2, 2, 28, 28) * 4
    if name == "sequential":
        return _sequential(), torch.rand(2, 16) * 8
    return {"loop": Loop, "rleaky": Recurrent, "synaptic": Synaptic}[name](), sequence


def reset(model: nn.Module) -> None:
    """Forget hidden states, as the tutorials do before each batch."""
    utils.reset(model)
