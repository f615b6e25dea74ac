# SPDX-License-Identifier: Apache-2.0
"""Neurons by what they do: whatever turns analog data into spikes, however it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.trace.execution.values import kind_of_values


class Fire(torch.autograd.Function):
    """A surrogate: the step forwards, the identity backwards."""

    @staticmethod
    def forward(ctx, x):
        """Ones where x is positive."""
        return (x > 0).float()

    @staticmethod
    def backward(ctx, g):
        """Straight through."""
        return g


def _straight_through(mem: Tensor) -> Tensor:
    soft = torch.sigmoid(4 * mem - 2)
    return ((mem > 0.5).float() - soft).detach() + soft


def _straight_through_turned(mem: Tensor) -> Tensor:
    soft = mem.clamp(0, 1)
    return soft + ((mem >= 0.5).to(mem.dtype) - soft).detach()


def _by_mask(mem: Tensor) -> Tensor:
    out = torch.zeros_like(mem)
    out[mem >= 0.5] = 1.0
    return out


def _ternary(mem: Tensor) -> Tensor:
    out = torch.zeros_like(mem)
    out[mem > 0.5] = 1.0
    out[mem < -0.5] = -1.0
    return out


def _heaviside(mem: Tensor) -> Tensor:
    return torch.heaviside(mem - 0.5, torch.zeros(()))


STYLES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "surrogate": (lambda mem: Fire.apply(mem - 0.5), "spike"),
    "comparison": (lambda mem: (mem >= 0.5).float(), "spike"),
    "type_as": (lambda mem: torch.gt(mem, 0.5).type_as(mem), "spike"),
    "where": (lambda mem: torch.where(mem > 0.5, 1.0, 0.0), "spike"),
    "detach trick": (_straight_through, "spike"),
    "detach trick turned": (_straight_through_turned, "spike"),
    "boolean mask": (_by_mask, "spike"),
    "heaviside": (_heaviside, "spike"),
    "sign of the rectified": (lambda mem: torch.sign(torch.relu(mem - 0.5)), "spike"),
    "ternary": (_ternary, "integer"),
    "ternary by a difference": (
        lambda mem: (mem > 0.5).float() - (mem < -0.5).float(),
        "integer",
    ),
    "levels": (lambda mem: torch.round(torch.clamp(mem, 0, 4)), "integer"),
    "scaled": (lambda mem: (mem >= 0.5).float() * 0.7, "scaled"),
    "scaled levels": (lambda mem: torch.floor(mem.clamp(0, 1) * 4 + 0.5) / 4, "scaled"),
}


class Neuron(nn.Module):
    """A leaky membrane, or none at all, around one of the styles of firing."""

    def __init__(self, style: str, decay: float | None) -> None:
        super().__init__()
        self.fire, self.decay = STYLES[style][0], decay

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, C] to the same."""
        if self.decay is None:
            return self.fire(x)
        mem, out = torch.zeros_like(x[0]), []
        for step in x:
            mem = self.decay * mem + step
            spikes = self.fire(mem)
            mem = mem - spikes * 0.5
            out.append(spikes)
        return torch.stack(out)


networks = st.lists(
    st.tuples(st.sampled_from(sorted(STYLES)), st.sampled_from([None, 0.5, 0.9])),
    min_size=1,
    max_size=3,
)


@tries(25)
@given(networks)
def test_neurons_of_every_style_are_found_once_with_their_layers(styles):
    """Each layer drives the neuron behind it, sees the one before it, and its signal is true."""
    parts: list[nn.Module] = []
    for style, decay in styles:
        parts += [nn.Linear(8, 8), Neuron(style, decay)]
    torch.manual_seed(len(styles))
    net, x = nn.Sequential(*parts, nn.Linear(8, 4)), torch.randn(3, 2, 8) * 3
    graph = spikenm_fx.trace(net, x)
    assert len(graph.neurons) == len(styles)
    seen: dict[str, Tensor] = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        net(x)
    for place, (style, _) in enumerate(styles):
        before, after = graph.layers[str(2 * place)], graph.layers[str(2 * place + 2)]
        assert len(before.post) == 1
        assert after.pre == before.post
        assert after.input_signal.kind == STYLES[style][1]
        _is_true(after.input_signal, seen[after.name])
        assert graph.neurons[before.post[0]].layers == (before.name,)


def _is_true(signal, values: Tensor) -> None:
    """The values are whole multiples of the signal's step, within its range."""
    if signal.kind in ("spike", "integer"):
        assert kind_of_values(values) in ("spike", signal.kind)
    steps = values / signal.step
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert float(values.min()) >= signal.low - 1e-6
    assert float(values.max()) <= signal.high + 1e-6


class Odd(nn.Module):
    """Between two layers something that is no neuron."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 4), between
        self.gate = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 8] to [B, 4]."""
        return self.b(self.between(self, self.a(x)))


NO_NEURONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "relu by hand": lambda m, x: x * (x > 0),
    "relu by a float mask": lambda m, x: x * (x > 0).float(),
    "leaky relu by where": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "clamped in place": lambda m, x: x.clone().masked_fill(x > 1, 1.0),
    "a gate of a learned parameter": lambda m, x: x * (m.gate > 0).float(),
    "a surrogate of a learned parameter": lambda m, x: x * Fire.apply(m.gate),
    "largest values kept": lambda m, x: x * (x >= x.topk(2).values[..., -1:]),
    "absolute value": lambda m, x: x * torch.sign(x),
    "clamp": lambda m, x: x.clamp(0, 6),
}


@pytest.mark.parametrize("kind", NO_NEURONS)
def test_what_only_gates_is_no_neuron(kind):
    """Gates leave analog values; nothing is called a spike."""
    graph = spikenm_fx.trace(Odd(NO_NEURONS[kind]), torch.randn(4, 8))
    assert not graph.neurons
    assert graph.layers["b"].input_signal.kind == "analog"
    assert graph.layers["b"].pre == ("a",)


def test_a_rate_code_is_no_neuron_but_spikes():
    """Comparing with random numbers encodes; what comes out are spikes all the same."""
    graph = spikenm_fx.trace(
        Odd(lambda m, x: (torch.rand_like(x) < x.sigmoid()).float()), torch.randn(4, 8)
    )
    assert not graph.neurons
    assert graph.layers["b"].input_signal.kind == "spike"


class Weighted(nn.Module):
    """A conversion's module: its own weight, a membrane, a comparison and a height."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.weight, self.height, self.potential_left = nn.Parameter(torch.randn(8, 8)), height, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """One step."""
        self.potential_left = self.potential_left + F.linear(x, self.weight)
        spikes = (self.potential_left >= self.height).float() * self.height
        self.potential_left = self.potential_left - spikes
        return spikes


@given(st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([1, 3]))
@tries(6)
def test_scaled_spikes_have_their_scale(height, steps):
    """A height per layer is known; the average of pooled spikes is a scale as well."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = Weighted(height), Weighted(height), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.a.potential_left = self.b.potential_left = 0.0
            out = [F.avg_pool1d(self.b(self.a(x)), 4) for _ in range(steps)]
            return sum(self.head(one) for one in out)

    graph = spikenm_fx.trace(Net(), torch.rand(2, 8) * 4)
    assert len(graph.neurons) == 2
    assert graph.layers["b.weight"].input_signal.step == pytest.approx(height)
    assert graph.layers["head"].input_signal.step == pytest.approx(height / 4)
    assert graph.layers["head"].input_signal.kind == "scaled"


def test_a_membrane_compared_again_to_reset_it_is_one_neuron() -> None:
    """A surrogate fires; ``rst[v > 0] = threshold`` beside it only takes the charge away."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            mems, total = [torch.zeros(x.shape[0], 8) for _ in range(2)], 0.0
            for _ in range(3):
                spikes = x
                for i, layer in enumerate((self.one, self.two)):
                    mems[i] = 0.9 * mems[i] + layer(spikes)
                    above = mems[i] / 0.2 - 1.0
                    spikes = Fire.apply(above)
                    taken = torch.zeros_like(mems[i])
                    taken[above > 0] = 0.2
                    mems[i] = mems[i] - taken
                total = total + self.out(spikes)
            return total

    graph = spikenm_fx.trace(Net(), torch.rand(2, 8))
    assert len(graph.neurons) == 2
    assert [graph.layers[name].post for name in ("one", "two")] == [(n,) for n in graph.neurons]


class Local(nn.Module):
    """A layer with its neuron, reset by the spikes that it sees; its output is the membrane too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.state = layer, None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        refractory, spikes = (0.0, torch.zeros(())) if self.state is None else self.state
        refractory = 0.6 * refractory - 0.4 * spikes
        u = self.layer(x) + refractory
        spikes = Fire.apply(u)
        self.state = (refractory, spikes)
        for tensor in self.state:
            tensor.detach_()
        return spikes, u


class Locally(nn.Module):
    """Fires from the pooled membranes of two such layers, in a first loop and in a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.lifs = nn.ModuleList([
            Local(nn.Conv2d(2, 4, 3, padding=1)), Local(nn.Conv2d(4, 4, 3, padding=1))
        ])  # fmt: skip
        self.pool = nn.MaxPool2d(2)
        self.readout = nn.Linear(16, 5)

    def step(self, x: Tensor) -> Tensor:
        """One step's output."""
        for lif in self.lifs:
            _, u = lif(x)
            x = Fire.apply(self.pool(u)).detach()
        return self.readout(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        for lif in self.lifs:
            lif.state = None
        for t in range(2):
            self.step(x[t])
        return torch.stack([self.step(x[t]) for t in range(2, len(x))])


def test_a_membrane_reset_inside_and_fired_from_outside_is_one_neuron() -> None:
    """The step inside a layer that only resets it, and the one on its pooled membrane, are one."""
    graph = spikenm_fx.trace(Locally(), torch.rand(6, 2, 2, 8, 8))
    assert graph.route == "fx"
    assert [n.layers for n in graph.neurons.values()] == [("lifs.0.layer",), ("lifs.1.layer",)]
    assert graph.layers["lifs.1.layer"].input_signal.kind == "spike"
    assert graph.layers["readout"].input_signal.kind == "spike"


def test_two_steps_of_one_membrane_that_both_go_on_are_two_neurons() -> None:
    """Branches that fire from one current, each to a layer of its own, stay apart."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(Fire.apply(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.branch, self.last = nn.Linear(8, 8), Branch(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            current = self.first(x)
            return self.last(Fire.apply(current)) + self.branch(current)[:, :4]

    graph = spikenm_fx.trace(Net(), torch.rand(3, 8))
    assert len(graph.neurons) == 2


def test_spikes_times_a_gain_of_each_channel_are_spikes_of_a_neuron() -> None:
    """A constant vector between the step and the next layer makes it no gate; data would."""

    class Net(nn.Module):
        def __init__(self, gain: str) -> None:
            super().__init__()
            self.one, self.two, self.kind = nn.Linear(8, 8), nn.Linear(8, 4), gain
            self.register_buffer("gain", torch.linspace(0.5, 1.0, 8))

        def forward(self, x: Tensor) -> Tensor:
            current = self.one(x)
            spikes = (current > 0.1).float()
            return self.two(spikes * (self.gain if self.kind == "constant" else current))

    assert len(spikenm_fx.trace(Net("constant"), torch.rand(3, 8)).neurons) == 1
    assert not spikenm_fx.trace(Net("data"), torch.rand(3, 8)).neurons
