# SPDX-License-Identifier: Apache-2.0
"""Spiking networks as people write them by hand: no framework, every style once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NAMES", "make", "reset"]

NAMES = ("module", "stateful", "functional", "raw", "scripted")


class Step(torch.autograd.Function):
    """Heaviside step with a rectangular surrogate derivative."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """1 where x > 0, elementwise."""
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        """Pass gradients where x is near 0."""
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.mul(grads[0], (x.abs() < 0.5).to(x))


class SequenceLIF(nn.Module):
    """Leaky neuron over ``[T, N, *]``."""

    def __init__(self, decay: float = 0.5, threshold: float = 0.5) -> None:
        super().__init__()
        self.decay, self.threshold = decay, threshold
        self.act: Callable[[Tensor], Tensor] = Step.apply

    def forward(self, x: Tensor) -> Tensor:
        """``[T, ...]`` currents to spikes of the same shape."""
        mem = torch.zeros_like(x[0])
        out = []
        for t in range(x.shape[0]):
            mem = mem * self.decay + x[t]
            spike = self.act(mem - self.threshold)
            mem = mem * (1 - spike)
            out.append(spike)
        return torch.stack(out)


class StatefulLIF(nn.Module):
    """Leaky neuron that keeps its membrane between calls."""

    def __init__(self, decay: float = 0.5, threshold: float = 0.5) -> None:
        super().__init__()
        self.decay, self.threshold = decay, threshold
        self.mem: Tensor | None = None

    def reset(self) -> None:
        """Forget the membrane."""
        self.mem = None

    def forward(self, x: Tensor) -> Tensor:
        """One step: ``[N, ...]`` currents to spikes of the same shape; the membrane stays."""
        mem = x if self.mem is None else self.mem * self.decay + x
        spike = Step.apply(mem - self.threshold)  # type: ignore[no-untyped-call]
        self.mem = mem - self.threshold * spike
        return spike  # type: ignore[no-any-return]


class ModuleNet(nn.Module):
    """Convolutions over folded time, neurons over ``[T, N, *]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.lif1 = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), SequenceLIF()
        self.conv2, self.bn2, self.lif2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), SequenceLIF()
        self.fc = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 2, 8, 8]`` to ``[N, 10]``."""
        t, n = x.shape[:2]
        x = self.bn1(self.conv1(x.flatten(0, 1)))
        x = self.lif1(x.reshape(t, n, *x.shape[1:]))
        x = self.bn2(self.conv2(x.flatten(0, 1)))
        x = self.lif2(x.view(t, n, *x.shape[1:]))
        return self.fc(x.flatten(2)).mean(0)  # type: ignore[no-any-return]


class StatefulNet(nn.Module):
    """A loop over time around stateful neurons; a block used twice shares its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 32), StatefulLIF()
        self.shared = nn.Linear(32, 32)
        self.lif2, self.lif3 = StatefulLIF(), StatefulLIF()
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 16]`` to ``[T, N, 10]``, written into a tensor made beforehand."""
        out = torch.zeros(*x.shape[:2], 10)
        for t in range(x.shape[0]):
            z = self.lif1(self.fc1(x[t]))
            z = self.lif2(self.shared(z)) + z
            z = self.lif3(self.shared(z))
            out[t] = self.fc2(z)
        return out


class FunctionalNet(nn.Module):
    """No neuron modules: membranes and surrogates in forward, as in many papers' code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.rec = nn.Linear(16, 32), nn.Linear(32, 10), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, N, 16]`` to spikes and the last membrane."""
        n = x.shape[1]
        mem1, mem2 = torch.zeros(n, 32), torch.zeros(n, 10)
        spk1 = torch.zeros(n, 32)
        out = []
        for current in x:
            mem1 = 0.9 * mem1 + self.fc1(current) + self.rec(spk1)
            spk1 = Step.apply(mem1 - 1.0)  # type: ignore[no-untyped-call]
            mem1 = mem1 - spk1
            mem2 = 0.9 * mem2 + self.fc2(spk1)
            spk2 = Step.apply(mem2 - 1.0)  # type: ignore[no-untyped-call]
            mem2 = mem2 * (1 - spk2)
            out.append(spk2)
        return torch.stack(out), mem2


class RawNet(nn.Module):
    """Weights as raw parameters: ``F.conv2d(x, self.w)``, a scaled one, and a plain product."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(8, 2, 3, 3) * 0.4)
        self.w2 = nn.Parameter(torch.randn(12, 8 * 36) * 0.1)
        self.gain = nn.Parameter(torch.ones(12, 1) * 2)
        self.w3 = nn.Parameter(torch.randn(12, 10))
        self.spare = nn.Parameter(torch.randn(3, 3))
        self.lif1, self.lif2 = SequenceLIF(), SequenceLIF()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 2, 8, 8]`` to ``[T, N, 10]``."""
        t, n = x.shape[:2]
        z = self.lif1(F.conv2d(x.flatten(0, 1), self.w1).unflatten(0, (t, n)))
        z = self.lif2(F.linear(z.flatten(2), self.w2 * self.gain))
        return torch.matmul(z, self.w3)


@torch.jit.script
def _scripted_gate(x: Tensor, scale: float) -> Tensor:
    if bool(x.sum() > 0):
        return x * scale
    return x / scale


class ScriptedNet(nn.Module):
    """A scripted helper between its layers, which no tracer of Python can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(16, 32), SequenceLIF()
        self.fc2, self.lif2 = nn.Linear(32, 10), SequenceLIF()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 16]`` to ``[T, N, 10]``."""
        return self.lif2(self.fc2(_scripted_gate(self.lif1(self.fc1(x)), 2.0)))  # type: ignore[no-any-return]


def make(name: str) -> tuple[nn.Module, Tensor]:
    """One of the networks and an input that makes it spike."""
    nets = {
        "module": ModuleNet,
        "stateful": StatefulNet,
        "functional": FunctionalNet,
        "raw": RawNet,
        "scripted": ScriptedNet,
    }
    image = name in ("module", "raw")
    return nets[name](), torch.rand(4, 2, 2, 8, 8) * 2 if image else torch.rand(4, 2, 16) * 4


def reset(model: nn.Module) -> None:
    """Forget the membranes."""
    for module in model.modules():
        if isinstance(module, StatefulLIF):
            module.reset()
