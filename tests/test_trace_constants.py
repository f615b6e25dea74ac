# SPDX-License-Identifier: Apache-2.0
"""Constants that numpy or legacy constructors make are constants; what they make of data is not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Variable

from spikenm_fx.trace import trace

RAMP = np.linspace(0.1, 0.9, 16).astype("float32")
Made = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A hand-written neuron whose membrane, given (v, current), is ``charge``; x: (N, 16)."""

    def __init__(self, charge: Made) -> None:
        super().__init__()
        self.charge = charge
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, steps: int = 4) -> Tensor:
        v, out = torch.zeros(x.shape[0], 16), 0
        for _ in range(steps):
            v = self.charge(v, self.a(x.reshape(x.shape[0], np.prod(x.shape[1:]))))
            spikes = (v > 0.2).float()
            v = v * (1 - spikes)
            out = out + self.b(spikes)
        return out


@torch.jit.script
def scripted(v: Tensor, current: Tensor) -> Tensor:
    return 0.5 * v + current


CONSTANTS: dict[str, Made] = {
    "np.sqrt": lambda v, i: v * np.sqrt(0.25) + i,
    "float32": lambda v, i: np.float32(0.5) * v + i * np.float32(1.0),
    "mean of a shape": lambda v, i: v / np.mean(v.shape) + i,
    "from_numpy": lambda v, i: v * torch.from_numpy(RAMP) + i,
    "tensor": lambda v, i: v * torch.tensor(RAMP) + i,
    "Tensor": lambda v, i: v * torch.Tensor(RAMP) + i,
    "FloatTensor": lambda v, i: v * torch.FloatTensor([0.5] * 16) + i,
    "filled": lambda v, i: v * torch.Tensor(16).fill_(0.5) + i,
    "dropout by numpy": lambda v, i: v + i * torch.from_numpy(np.random.rand(16) > 0.5),
    "Variable of zeros": lambda v, i: Variable(torch.zeros(i.shape)) + 0.5 * v + i,
    "Variable of data": lambda v, i: 0.5 * Variable(v) + Variable(i, requires_grad=False),
    "Variable written": lambda v, i: Variable(v).mul_(0.5) + i,
    "scripted function beside them": lambda v, i: scripted(v, i * torch.from_numpy(RAMP)),
    "indices": lambda v, i: 0.5 * v[:, np.arange(16)] + i,
}

OF_DATA: dict[str, Made] = {
    "numpy": lambda v, i: torch.from_numpy(0.5 * v.detach().cpu().numpy()) + i,
    "array": lambda v, i: torch.from_numpy(np.tanh(np.asarray(i))) + 0.5 * v,
}


@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("steps", [4, 30])
def test_constants_do_not_stop_the_tracer(kind: str, steps: int) -> None:
    """The model is followed to its end: one neuron, driven by the layer before it, no fallback."""
    graph = trace(Net(CONSTANTS[kind]), torch.rand(3, 16), example_kwargs={"steps": steps})
    assert graph.route == "fx"
    assert not graph.notes
    assert len(graph.neurons) == 1
    (neuron,) = graph.neurons
    assert graph.layers["a"].post == (neuron,)
    assert graph.layers["a"].multiplies_input
    assert graph.layers["b"].pre == (neuron,)
    assert graph.layers["b"].calls == steps


@pytest.mark.parametrize("kind", OF_DATA)
def test_what_is_computed_out_of_sight_is_no_constant(kind: str) -> None:
    """Data that went through numpy is read from the execution instead."""
    graph = trace(Net(OF_DATA[kind]), torch.rand(3, 16))
    assert graph.route == "execution"
    assert graph.notes
    assert graph.layers["b"].calls == 4
