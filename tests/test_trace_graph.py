# SPDX-License-Identifier: Apache-2.0
"""What a trace says about layers, neurons and signals, on real models of every framework."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from zoo_cases import build

from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.bench.tracing import (
    Row,
    _edges_by_measurement,
    _inputs_by_measurement,
    refusal,
    train_sparse,
)
from spikenm_fx.bench.zoo import RUNNING, ZOO, Case
from spikenm_fx.errors import TraceError
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import SpikingGraph, trace


def traced(name: str) -> tuple[Case, SpikingGraph]:
    case = build(name)
    return case, trace(case.model, case.inputs)


@pytest.fixture(scope="module", params=RUNNING)
def running(request: pytest.FixtureRequest) -> tuple[str, Case, SpikingGraph]:
    """Each model that runs, and its trace, for tests that leave both as they are."""
    return request.param, *traced(request.param)


def test_layers_and_pairs(running: tuple[str, Case, SpikingGraph]) -> None:
    """The layers are exactly the module tree's, all seen in use; pairs agree both ways."""
    _, case, graph = running
    modules = {n for n, m in case.model.named_modules() if is_weight_layer(m)}
    assert modules == {n for n, r in graph.layers.items() if r.kind != "functional"}
    assert [r.name for r in graph.layers.values() if not r.calls] == []
    assert graph.route == "fx"
    for layer in graph.layers.values():
        assert layer.pre or layer.inside
        assert layer.post or layer.is_readout or layer.feeds
        for neuron in layer.post:
            assert layer.name in graph.neurons[neuron].layers
        spiking = [n for n in layer.post if graph.neurons[n].spec.kind != "integrator"]
        assert not (layer.is_readout and spiking)
    for chain in graph.chains:
        assert graph.layers[chain.layer].post == (chain.neuron,)


def test_spike_edges_carry_only_spikes(running: tuple[str, Case, SpikingGraph]) -> None:
    """In real forwards on random inputs no edge marked spike carries anything but {0,1}."""
    name, case, graph = running
    row = Row(name)
    _edges_by_measurement(row, case, graph, seeds=2)
    _inputs_by_measurement(row, case, graph, seeds=3)
    assert (row.spike_wrong, row.input_wrong) == (0, 0)
    assert row.spike_missed == 0
    assert row.silent <= len(graph.layers) // 2


def test_spiking_resnet_block() -> None:
    """In spiking_resnet18 a block's second conv meets the shortcut before its neuron."""
    _, graph = traced("spikingjelly/spiking_resnet18/m")
    first, second = graph.layers["layer2.0.conv1"], graph.layers["layer2.0.conv2"]
    assert first.pre == ("layer1.1.sn2",)
    assert first.post == ("layer2.0.sn1",)
    assert second.post == ("layer2.0.sn2",)
    assert graph.layers["layer2.0.downsample.0"].post == ("layer2.0.sn2",)
    assert graph.neurons["layer2.0.sn2"].layers == ("layer2.0.conv2", "layer2.0.downsample.0")
    assert graph.layers["conv1"].sees_input
    assert graph.why("conv1") == "input is analog image"
    assert graph.why("fc") == "feeds no neuron: readout"
    assert graph.layers["fc"].is_head
    chain = graph.chain("layer2.0.conv1")
    assert chain is not None
    assert (chain.norm, chain.neuron) == ("layer2.0.bn1", "layer2.0.sn1")
    assert graph.chain("layer2.0.conv2") is None


def test_sew_signals() -> None:
    """SEW's ADD makes integers out of spikes; AND and IAND keep spikes."""
    _, add = traced("spikingjelly/sew_resnet18/m")
    assert str(add.layers["layer1.1.conv1"].input_signal) == "integer"
    assert str(add.layers["layer1.1.conv2"].input_signal) == "spike"
    for variant in ("and", "iand"):
        _, graph = traced(f"spikingjelly/sew_resnet18_{variant}/m")
        signals = {str(r.input_signal) for r in graph.layers.values() if not r.sees_input}
        assert "integer" not in signals


def test_snntorch_loop_counts_its_calls() -> None:
    """A layer in a Python loop over T is one layer with T calls, its neuron the same."""
    _, graph = traced("snntorch/loop")
    fc2 = graph.layers["fc2"]
    assert (fc2.calls, fc2.pre, fc2.post) == (4, ("lif1",), ("lif2",))
    assert graph.chain("fc1") is not None
    chain = graph.chain("fc2")
    assert chain is not None
    assert chain.state_read


def test_recurrent_weights_inside_neurons() -> None:
    """RLeaky's all-to-all weight is a layer that its own neuron feeds and is fed by."""
    _, graph = traced("snntorch/rleaky")
    recurrent = graph.layers["lif1.recurrent"]
    assert (recurrent.inside, recurrent.calls) == ("lif1", 4)
    assert recurrent.pre == recurrent.post == ("lif1",)
    assert str(recurrent.input_signal) == "spike"
    _, norse = traced("norse/recurrent")
    assert norse.layers["0.recurrent_weights"].inside == "0"
    assert norse.layers["0.input_weights"].pre == ("input_0",)
    assert norse.layers["0.input_weights"].post == ("0",)
    assert norse.layers["0.recurrent_weights"].pre == ("0",)
    assert any("0.input_weights" in str(note) for note in norse.notes)


def test_functional_neurons() -> None:
    """Surrogates called in forward are neurons by their line, with their layers."""
    _, graph = traced("hand/functional")
    first, second = graph.neurons
    assert graph.neurons[first].functional
    assert set(graph.neurons[first].layers) == {"fc1", "rec"}
    assert graph.neurons[second].layers == ("fc2",)
    assert graph.layers["rec"].pre == (first,)


def test_functions_that_are_no_steps_are_no_neurons() -> None:
    """A delay or a gradient scaler written as an autograd Function passes signals on."""

    class Delay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.cat([torch.zeros_like(x[:1]), x[:-1]])

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.lif, self.b = nn.Linear(4, 16), SequenceLIF(), nn.Linear(16, 2)

        def forward(self, x):
            return self.b(Delay.apply(self.lif(self.a(x))))

    graph = trace(Net(), torch.rand(4, 2, 4) * 3)
    assert set(graph.neurons) == {"lif"}
    assert graph.layers["b"].pre == ("lif",)


def test_functional_weights() -> None:
    """Raw parameters used by F.conv2d, through arithmetic, and by @ are layers; unused are told."""
    _, graph = traced("hand/raw")
    assert set(graph.layers) == {"w1", "w2", "w3"}
    assert graph.layers["w2"].pre == ("lif1",)
    assert graph.layers["w2"].post == ("lif2",)
    assert str(graph.layers["w2"].input_signal) == "spike"
    assert graph.layers["w3"].is_readout
    assert any(note.where == "spare" for note in graph.notes)


def test_scripted_helper_is_followed() -> None:
    """What it computes of data reaches the dispatcher, and is recorded there."""
    _, graph = traced("hand/scripted")
    assert graph.route == "fx"
    assert graph.notes == ()
    assert graph.layers["fc2"].pre == ("lif1",)
    assert graph.layers["fc2"].post == ("lif2",)


def test_only_the_failing_submodule_becomes_opaque() -> None:
    """A factor made of data by numpy inside one block leaves the rest to the tracer."""

    def helper(x: torch.Tensor) -> torch.Tensor:
        return x * torch.from_numpy(x.numpy() * 0.5 + 0.5)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(8, 8), SequenceLIF()

        def forward(self, x):
            return self.lif(self.fc(helper(x)))

    model = nn.Sequential(nn.Linear(4, 8), SequenceLIF(), Block(), nn.Linear(8, 2))
    graph = trace(model, torch.rand(3, 2, 4))
    assert graph.route == "fx+execution"
    assert [note.where for note in graph.notes] == ["2"]
    assert "test_trace_graph.py" in graph.notes[0].text
    assert graph.layers["2.fc"].pre == ("1",)
    assert graph.layers["2.fc"].post == ("2.lif",)
    assert graph.layers["3"].pre == ("2.lif",)


def test_data_dependent_control_flow() -> None:
    """Branches on values, lengths, shapes and iteration are answered by the example."""

    class Branchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.lif = nn.Linear(4, 4), nn.Linear(4, 4), SequenceLIF()

        def forward(self, x):
            if x.ndim == 3 and len(x) == 3 and bool(x.sum() > 0) and float(x.max()) < 9:
                x = torch.stack([self.a(step) for step in x])
            return self.b(self.lif(x)) * int(x.shape[0])

    graph = trace(Branchy(), torch.rand(3, 2, 4))
    assert graph.route == "fx"
    assert graph.layers["a"].calls == 3
    assert graph.layers["b"].pre == ("lif",)


def test_in_place_writes_are_followed() -> None:
    """Values written through indices, views and in-place operators reach their readers."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
            self.lif = SequenceLIF()

        def forward(self, x):
            buffer = torch.zeros(x.shape[0], x.shape[1], 8)
            buffer[..., :4] = self.a(x)
            half = buffer[..., 4:]
            half += self.b(x)
            return self.lif(self.c(buffer))

    graph = trace(InPlace(), torch.rand(3, 2, 4))
    assert set(graph.layers["c"].pre) == {"a", "b"}
    assert graph.layers["a"].feeds == ("c",)


@pytest.mark.slow
def test_wrappers_keep_their_names() -> None:
    """DataParallel and compiled wrappers are looked through, with the wrapper's own names."""
    model = nn.Sequential(nn.Linear(4, 8), SequenceLIF(), nn.Linear(8, 2))
    parallel = nn.DataParallel(model)
    graph = trace(parallel, torch.rand(3, 2, 4))
    assert set(graph.layers) == {n for n, m in parallel.named_modules() if is_weight_layer(m)}
    assert graph.layers["module.2"].pre == ("module.1",)
    compiled = trace(torch.compile(model), torch.rand(3, 2, 4))
    assert compiled.layers["_orig_mod.2"].pre == ("_orig_mod.1",)
    assert any("OptimizedModule" in str(note) for note in compiled.notes)


def test_without_examples() -> None:
    """A model that plain symbolic tracing reads gives its pairs; another its module tree."""
    simple = trace(nn.Sequential(nn.Linear(4, 8), SequenceLIF(), nn.Linear(8, 2)))
    assert simple.route == "symbolic"
    assert simple.layers["2"].pre == ("1",)
    case = ZOO["hand/module"].build()
    tree = trace(case.model)
    assert tree.route == "modules"
    assert set(tree.layers) == {"conv1", "conv2", "fc"}
    assert set(tree.neurons) == {"lif1", "lif2"}
    assert "example_inputs" in str(tree.notes[0])


def test_time_axis_is_named() -> None:
    """Edges tell which axis is time: the first in multi-step, none in single-step models."""
    _, multi = traced("spikingjelly/sew_resnet18/m")
    assert {r.time_axis for r in multi.layers.values()} == {0}
    _, single = traced("spikingjelly/cifar10dvs/s")
    assert {r.time_axis for r in single.layers.values()} == {None}


@pytest.mark.parametrize("name", RUNNING)
def test_sparse_training_on_every_model(name: str) -> None:
    """Each model of the list can be sparsified, trained a step, folded, and is then N:M."""
    assert train_sparse(partial(build, name)) == "ok"


@pytest.mark.parametrize("name", [n for n in ZOO if n not in RUNNING])
def test_step_modes_that_a_framework_refuses(name: str) -> None:
    """Where the framework's own forward fails, trace says the same, with the line."""
    if not ZOO[name].available:
        pytest.skip(f"{ZOO[name].framework} is not installed")
    refusal(ZOO[name])
    case = ZOO[name].build()
    with pytest.raises(TraceError, match=ZOO[name].refuses):
        trace(case.model, case.inputs)
