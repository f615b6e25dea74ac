# SPDX-License-Identifier: Apache-2.0
"""Models of the table in ``spikenm_fx.export``: folded at 2:4, and inputs at which they fire."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.trace import NeuronSpec, register_neuron

STEPS = 5


def folded(model: nn.Module, gain: float = 2.0) -> nn.Module:
    """At 2:4 in every layer, weights scaled and shifted so that neurons fire."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(gain).add_(parameter[0].numel() ** -0.5 / 2)
    spikenm_fx.sparsify(model, "2:4", rules=[Rule("re:.*")], remainder="pad", method="magnitude")
    return spikenm_fx.fold(model.eval())


def over_time(*shape: int) -> Tensor:
    return torch.rand(STEPS, 3, *shape)


# -- SpikingJelly ---------------------------------------------------------------------------------


def spikingjelly_net(mode: str, *parts: nn.Module) -> nn.Module:
    from spikingjelly.activation_based import functional

    net = nn.Sequential(*parts)
    functional.set_step_mode(net, mode)
    return net


def jelly_mlp(mode: str = "m", **options: object) -> nn.Module:
    from spikingjelly.activation_based import layer, neuron

    return spikingjelly_net(
        mode,
        layer.Linear(16, 32),
        neuron.LIFNode(**options),
        layer.Linear(32, 16, bias=False),
        neuron.IFNode(),
        layer.Linear(16, 8),
        neuron.ParametricLIFNode(3.0),
    )


def jelly_conv(mode: str = "m", pool: str = "AvgPool2d", **options: object) -> nn.Module:
    from spikingjelly.activation_based import layer, neuron

    net = spikingjelly_net(
        mode,
        layer.Conv2d(4, 8, (3, 1), padding=(1, 0)),
        layer.BatchNorm2d(8),
        neuron.LIFNode(),
        getattr(layer, pool)(2),
        layer.Conv2d(8, 8, 3, padding=1, **options),
        neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(128, 10),
    )
    norm = net[1]
    norm.running_var.uniform_(0.5, 1.0)
    norm.running_mean.normal_()
    norm.weight.data.uniform_(1.0, 3.0)
    return net


class Residual(nn.Module):
    """Spikes of two layers are added; ``apart``: both come from a third."""

    def __init__(self, apart: bool = False) -> None:
        from spikingjelly.activation_based import functional, layer, neuron

        super().__init__()
        self.conv1, self.lif1 = layer.Conv2d(4, 8, 3, padding=1), neuron.LIFNode()
        self.conv2, self.lif2 = layer.Conv2d(8, 8, 3, padding=1), neuron.LIFNode()
        self.conv3, self.lif3 = layer.Conv2d(8, 8, 1), neuron.LIFNode()
        self.head, self.apart = layer.Linear(8 * 64, 5), apart
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        first = self.lif1(self.conv1(x))
        second = self.lif2(self.conv2(first))
        third = self.lif3(self.conv3(first if self.apart else first + second))
        last = second + third if self.apart else third
        return self.head(last.flatten(2)).mean(0)


class Feedback(nn.Module):
    """Spikes of the step before come back through a weight with a bias."""

    def __init__(self) -> None:
        from spikingjelly.activation_based import neuron

        super().__init__()
        self.fc, self.back = nn.Linear(16, 32), nn.Linear(32, 32)
        self.lif, self.out = neuron.LIFNode(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        spikes, total = torch.zeros(x.shape[1], 32), 0
        for step in range(x.shape[0]):
            spikes = self.lif(self.fc(x[step]) + self.back(spikes))
            total = total + self.out(spikes)
        return total / x.shape[0]


# -- snnTorch -------------------------------------------------------------------------------------


class Loop(nn.Module):
    """snnTorch's tutorials: a loop over time, the state handed on."""

    def __init__(self, recurrent: bool = False, **options: object) -> None:
        import snntorch as snn

        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 8)
        self.recurrent = recurrent
        kind = snn.RLeaky if recurrent else snn.Leaky
        first = {"linear_features": 32} if recurrent else {}
        self.lif1 = kind(beta=0.9, **first, **options)
        self.lif2 = snn.Leaky(beta=0.8, **options)

    def forward(self, x: Tensor) -> Tensor:
        spikes, mem1 = self.lif1.init_rleaky() if self.recurrent else (None, None)
        mem1 = mem1 if self.recurrent else self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        out = []
        for step in range(x.shape[0]):
            current = self.fc1(x[step])
            given = (spikes, mem1) if self.recurrent else (mem1,)
            spikes, mem1 = self.lif1(current, *given)
            last, mem2 = self.lif2(self.fc2(spikes), mem2)
            out.append(last)
        return torch.stack(out)


def snn_conv(groups: int = 1) -> nn.Module:
    import snntorch as snn

    options = {"beta": 0.9, "init_hidden": True, "reset_mechanism": "zero"}
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=groups),
        snn.Leaky(**options),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
        snn.Leaky(**options),
    )


# -- Norse ----------------------------------------------------------------------------------------


class NorseLoop(nn.Module):
    def __init__(self, cell: str = "LIFBoxCell") -> None:
        super().__init__()
        self.net = norse_net(nn.Linear(16, 32), "IAFCell", nn.Linear(32, 8), cell)

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for step in x:
            spikes, state = self.net(step, state)
            out.append(spikes)
        return torch.stack(out)


def norse_net(*parts: object) -> nn.Module:
    import norse.torch as norse
    from norse.torch.module.lif_box import LIFBoxCell, LIFBoxParameters

    def made(part: object) -> nn.Module:
        if part == "LIFBoxCell":
            return LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.as_tensor(300.0)))
        return getattr(norse, part)() if isinstance(part, str) else part

    return norse.SequentialState(*map(made, parts))


def norse_conv() -> nn.Module:
    return norse_net(
        *(nn.Conv2d(4, 8, 3, padding=1), "LIFBoxCell", nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 8), "LIFBoxCell"),
    )


# -- sinabs ---------------------------------------------------------------------------------------


def sinabs_mlp(single: bool = False) -> nn.Module:
    import sinabs.layers as sl
    from sinabs.activation import MembraneReset, SingleSpike

    options = {"spike_fn": SingleSpike, "reset_fn": MembraneReset()} if single else {}
    return nn.Sequential(
        *(nn.Linear(16, 32), sl.LIF(tau_mem=5.0, **options)),
        *(nn.Linear(32, 8), sl.IAF(**options)),
    )


def sinabs_conv() -> nn.Module:
    import sinabs.layers as sl

    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3), sl.IAFSqueeze(batch_size=3), sl.SumPool2d(2), nn.Flatten()),
        *(nn.Linear(72, 8), sl.LIFSqueeze(tau_mem=20.0, batch_size=3)),
    )


# -- by hand --------------------------------------------------------------------------------------


class HandLIF(nn.Module):
    """Leaky integrate-and-fire over ``[T, ...]``, hard reset, a sigmoid as surrogate."""

    def forward(self, currents: Tensor) -> Tensor:
        v, spikes = 0.0, []
        for current in currents:
            v = v + (current - v) / 2
            soft = torch.sigmoid(4 * (v - 1))
            spikes.append((v >= 1).float() + (soft - soft.detach()))
            v = v * (v < 1)
        return torch.stack(spikes)


class ToldLIF(HandLIF):
    """The same, its rule told."""


register_neuron(
    ToldLIF,
    lambda _: NeuronSpec(
        *("by hand", "ToldLIF"),
        kind="lif",
        exact=True,
        decay=0.5,
        gain=0.5,
        time_axis=0,
        step_mode="multi",
        state=(),
    ),
)


def by_hand(neuron: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), neuron(), nn.Linear(32, 8))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "SpikingJelly MLP, all steps": lambda: (folded(jelly_mlp(), 3.0), over_time(16)),
    "SpikingJelly MLP, one step": lambda: (folded(jelly_mlp("s"), 3.0), torch.rand(3, 16)),
    "SpikingJelly conv, norm, pool": lambda: (folded(jelly_conv()), over_time(4, 8, 8)),
    "SpikingJelly residual": lambda: (folded(Residual(), 3.0), over_time(4, 8, 8)),
    "SpikingJelly branches": lambda: (folded(Residual(True), 3.0), over_time(4, 8, 8)),
    "SpikingJelly soft reset": lambda: (folded(jelly_mlp(v_reset=None)), over_time(16)),
    "SpikingJelly max pool": lambda: (folded(jelly_conv(pool="MaxPool2d")), over_time(4, 8, 8)),
    "SpikingJelly depthwise": lambda: (folded(jelly_conv(groups=8)), over_time(4, 8, 8)),
    "hand-written feedback": lambda: (folded(Feedback(), 3.0), over_time(16)),
    "snnTorch loop, reset to zero": lambda: (
        folded(Loop(reset_mechanism="zero")),
        over_time(16),
    ),
    "snnTorch loop, as it comes": lambda: (folded(Loop()), over_time(16)),
    "snnTorch conv, one step": lambda: (folded(snn_conv()), torch.rand(3, 4, 8, 8)),
    "snnTorch conv, 2 groups": lambda: (folded(snn_conv(2)), torch.rand(3, 4, 8, 8)),
    "snnTorch recurrent": lambda: (
        folded(Loop(True, reset_mechanism="zero", reset_delay=False)),
        over_time(16),
    ),
    "Norse loop": lambda: (folded(NorseLoop(), 4.0), over_time(16)),
    "Norse conv, one step": lambda: (folded(norse_conv(), 6.0), torch.rand(3, 4, 8, 8)),
    "Norse with synapse": lambda: (folded(NorseLoop("LIFCell"), 4.0), over_time(16)),
    "sinabs, several spikes": lambda: (folded(sinabs_mlp(), 4.0), torch.rand(3, STEPS, 16)),
    "sinabs conv": lambda: (folded(sinabs_conv()), torch.rand(3 * STEPS, 4, 8, 8)),
    "sinabs, single spikes": lambda: (folded(sinabs_mlp(True), 4.0), torch.rand(3, STEPS, 16)),
    "hand-written, rule told": lambda: (folded(by_hand(ToldLIF)), over_time(16)),
    "hand-written": lambda: (folded(by_hand(HandLIF)), over_time(16)),
}


def each_step(name: str, x: Tensor) -> Tensor:
    """The input of each step, ``[T, N, ...]``, of a model of :data:`NETS`."""
    if "one step" in name or "2 groups" in name:
        return x.expand(STEPS, *x.shape)
    if name == "sinabs conv":
        return x.unflatten(0, (3, STEPS)).transpose(0, 1)
    return x.transpose(0, 1) if name.startswith("sinabs") else x
