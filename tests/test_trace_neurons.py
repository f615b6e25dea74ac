# SPDX-License-Identifier: Apache-2.0
"""Neurons: every adapter's rule against the framework's own forward, detection by structure."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from spikenm_fx.bench.nets.handwritten import SequenceLIF, StatefulLIF, Step
from spikenm_fx.bench.zoo import BRAINCOG_NEVER_USES
from spikenm_fx.recipe.stand_in import stand_in
from spikenm_fx.trace import NeuronSpec, find_neurons, neuron_spec, register_neuron, simulate, trace

T, N, C = 12, 3, 5


def drive(scale: float = 1.5) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(T, N, C) * scale + 0.4


def check(spec: NeuronSpec | None, inputs: torch.Tensor, expected: torch.Tensor) -> None:
    """The spec reproduces the module, on a drive that makes it spike and pause."""
    assert spec is not None
    assert spec.exact
    got, _ = simulate(spec, inputs)
    if spec.output != "analog":
        assert expected.mean() > 0.05
        assert (expected == 0).any()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def jelly(name: str, **kwargs: object) -> nn.Module:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    return getattr(neuron, name)(**kwargs)


@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("IFNode", {}),
        ("LIFNode", {"tau": 2.5, "decay_input": True}),
        ("LIFNode", {"tau": 2.5, "decay_input": False}),
        ("ParametricLIFNode", {"init_tau": 3.0, "decay_input": True}),
        ("ParametricLIFNode", {"init_tau": 3.0, "decay_input": False}),
        ("SimpleLIFNode", {"tau": 2.0, "decay_input": False}),
    ],
)
@pytest.mark.parametrize("mode", ["s", "m"])
def test_spikingjelly(name: str, kwargs: dict, v_reset: float | None, mode: str) -> None:
    """SpikingJelly's specs give the same spikes as its neurons, in both step modes."""
    if name == "SimpleLIFNode" and v_reset is None:
        pytest.skip("SimpleLIFNode itself fails without v_reset")
    node = jelly(name, v_reset=v_reset, v_threshold=0.8, step_mode=mode, **kwargs)
    x = drive()
    with torch.no_grad():
        out = node(x) if mode == "m" else torch.stack([node(step) for step in x])
    spec = neuron_spec(node)
    check(spec, x, out)
    assert spec is not None
    assert (spec.time_axis == 0) == (mode == "m")
    assert spec.reset_call == "reset"
    assert spec.state[0] == "v"


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_snntorch_leaky(reset: str, delay: bool) -> None:
    """Leaky's delayed, corrected and absent resets are reproduced."""
    snn = pytest.importorskip("snntorch")
    lif = snn.Leaky(beta=0.8, threshold=0.7, reset_mechanism=reset, reset_delay=delay)
    x, mem, out = drive(), lif.init_leaky(), []
    for step in x:
        spike, mem = lif(step, mem)
        out.append(spike)
    check(neuron_spec(lif), x, torch.stack(out))


def test_snntorch_synaptic() -> None:
    """Synaptic's current and membrane are reproduced; its reset to zero is not called exact."""
    snn = pytest.importorskip("snntorch")
    lif = snn.Synaptic(alpha=0.6, beta=0.8)
    x, out = drive(), []
    syn, mem = lif.init_synaptic()
    for step in x:
        spike, syn, mem = lif(step, syn, mem)
        out.append(spike)
    check(neuron_spec(lif), x, torch.stack(out))
    spec = neuron_spec(snn.Synaptic(alpha=0.6, beta=0.8, reset_mechanism="zero"))
    assert spec is not None
    assert not spec.exact


@pytest.mark.parametrize("name", ["LIF", "LIFCell", "LIFBoxCell", "IAFCell", "LI", "LICell"])
def test_norse(name: str) -> None:
    """Norse cells and layers are reproduced from tau_syn_inv, tau_mem_inv, dt and v_leak."""
    norse = pytest.importorskip("norse.torch")
    module = norse if hasattr(norse, name) else pytest.importorskip("norse.torch.module.iaf")
    cell = getattr(module, name)()
    x, state, out = drive(12.0), None, []
    with torch.no_grad():
        if name in ("LIF", "LI"):
            expected, _ = cell(x)
        else:
            for step in x:
                value, state = cell(step, state)
                out.append(value)
            expected = torch.stack(out)
    check(neuron_spec(cell), x, expected)


@pytest.mark.parametrize("norm_input", [True, False])
@pytest.mark.parametrize("tau_syn", [None, 3.0])
@pytest.mark.parametrize("spikes", ["SingleSpike", "MultiSpike"])
@pytest.mark.parametrize("floor", [None, -0.0625])
def test_sinabs(norm_input: bool, tau_syn: float | None, spikes: str, floor: float | None) -> None:
    """Sinabs' alphas, synapse, several spikes, floor are reproduced; time is axis 1."""
    layers = pytest.importorskip("sinabs.layers")
    activation = pytest.importorskip("sinabs.activation")
    lif = layers.LIF(
        tau_mem=4.0,
        tau_syn=tau_syn,
        spike_threshold=torch.tensor(0.4),
        spike_fn=getattr(activation, spikes),
        norm_input=norm_input,
        min_v_mem=floor,
    )
    x = drive()
    with torch.no_grad():
        out = lif(x.transpose(0, 1)).transpose(0, 1)
    spec = neuron_spec(lif)
    check(spec, x, out)
    assert spec is not None
    assert spec.time_axis == 1
    assert spec.floor == floor
    assert spec.output == ("spike" if spikes == "SingleSpike" else "integer")


@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "PLIFNode"])
def test_braincog(name: str) -> None:
    """BrainCog's integrate, leak and learned leak are reproduced."""
    stand_in(*BRAINCOG_NEVER_USES)
    nodes = pytest.importorskip("braincog.base.node.node")
    node, x = getattr(nodes, name)(threshold=0.6), drive()
    with torch.no_grad():
        out = torch.stack([node(step) for step in x])
    check(neuron_spec(node), x, out)


def test_rockpool() -> None:
    """Rockpool's LIF is reproduced with its synapse and several spikes a step."""
    modules = pytest.importorskip("rockpool.nn.modules")
    lif, x = modules.LIFTorch(C), drive(2.0)
    with torch.no_grad():
        out, _, _ = lif(x.transpose(0, 1))
    check(neuron_spec(lif), x, out.transpose(0, 1))


@pytest.mark.parametrize(
    ("name", "arguments", "output"),
    [
        ("PSN", {"T": T}, "spike"),
        ("SlidingPSN", {"k": 2, "step_mode": "m"}, "spike"),
        ("GatedLIFNode", {"T": T, "step_mode": "m"}, "spike"),
        ("QIFNode", {"step_mode": "m"}, "spike"),
        ("ILIFNode", {"step_mode": "m"}, "integer"),
        ("TernaryIFNode", {"step_mode": "m"}, "integer"),
    ],
)
def test_unusual_spikingjelly_neurons(name: str, arguments: dict, output: str) -> None:
    """Neurons that are no plain LIF are leaves all the same, never exact, measured in a trace."""
    model = nn.Sequential(nn.Linear(C, C), jelly(name, **arguments), nn.Linear(C, 2))
    spec = neuron_spec(model[1])
    assert spec is not None
    assert not spec.exact
    graph = trace(model, drive())
    assert graph.layers["2"].pre == ("1",)
    assert str(graph.layers["2"].input_signal) == output


def test_lava_is_read_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """lava-dl's decays are 12-bit; its neurons take time last and are never called exact."""
    base = types.ModuleType("lava.lib.dl.slayer.neuron.base")

    class Neuron(nn.Module):
        pass

    class CubaLif(Neuron):
        def __init__(self) -> None:
            super().__init__()
            self.threshold, self.p_scale, self.tau_grad = 1.25, 1 << 12, 0.1
            self.register_buffer("current_decay", torch.tensor([1024.0]))
            self.register_buffer("voltage_decay", torch.tensor([512.0]))

    base.Neuron = Neuron  # type: ignore[attr-defined]
    assert neuron_spec(CubaLif()) is None
    monkeypatch.setitem(sys.modules, base.__name__, base)
    spec = neuron_spec(CubaLif())
    assert spec is not None
    assert (spec.framework, spec.threshold, spec.time_axis) == ("lava-dl", 1.25, -1)
    assert spec.decay == 0.875
    assert spec.synapse is not None
    assert spec.synapse.decay == 0.75
    assert not spec.exact


def test_simulate_refuses_what_is_not_exact() -> None:
    """A spec that does not tell everything is never silently simulated."""
    spec = neuron_spec(SequenceLIF())
    assert spec is not None
    with pytest.raises(ValueError, match="exact=False"):
        simulate(spec, drive())


@pytest.mark.parametrize("cls", [SequenceLIF, StatefulLIF])
def test_structure_finds_hand_written_neurons(cls: type[nn.Module]) -> None:
    """A surrogate reached by an attribute or by the forward's code makes a neuron."""
    spec = neuron_spec(cls())
    assert spec is not None
    assert spec.framework == "unknown"
    assert spec.threshold == 0.5


def test_structure_finds_factories_and_nested_functions() -> None:
    """Surrogates made in a factory or nested in the class are found."""

    def make_fire(gamma: float) -> object:
        class Fire(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return (x > 0).float()

            @staticmethod
            def backward(ctx, g):
                return g * gamma

        return Fire.apply

    class FromFactory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fire = make_fire(1.0)

        def forward(self, x):
            return self.fire(x)

    class Nested(nn.Module):
        class Fire(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return (x > 0).float()

        def forward(self, x):
            return self.Fire.apply(x)

    assert neuron_spec(FromFactory()) is not None
    assert neuron_spec(Nested()) is not None


def test_ordinary_modules_are_no_neurons() -> None:
    """Containers, activations, norms and modules with weights are not taken for neurons."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(2, 2), SequenceLIF()

    modules = [nn.ReLU(), nn.BatchNorm1d(3), nn.Sequential(SequenceLIF()), Block(), nn.LSTM(2, 2)]
    assert [neuron_spec(m) for m in modules] == [None] * len(modules)
    assert list(find_neurons(Block())) == ["lif"]


def test_a_neuron_can_be_registered() -> None:
    """Two lines make any module a neuron, with the user's own spec."""

    class Odd(nn.Module):
        def forward(self, x):
            return (torch.sin(x) > 0).float()

    class Other(nn.Module):
        def forward(self, x):
            return (torch.cos(x) > 0).float()

    assert neuron_spec(Odd()) is None
    register_neuron(Odd)
    register_neuron(Other, lambda m: NeuronSpec("mine", type(m).__name__, threshold=0.25))
    assert neuron_spec(Odd()) is not None
    spec = neuron_spec(Other())
    assert spec is not None
    assert (spec.framework, spec.threshold) == ("mine", 0.25)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        register_neuron(Step)  # type: ignore[type-var]


def test_no_framework_is_imported() -> None:
    """Finding neurons imports none of the frameworks."""
    code = (
        "import sys, torch; from spikenm_fx.trace import find_neurons;"
        "find_neurons(torch.nn.Linear(2, 2));"
        "names = {'spikingjelly', 'snntorch', 'norse', 'sinabs', 'braincog', 'rockpool', 'lava'};"
        "assert not names & {m.split('.')[0] for m in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
