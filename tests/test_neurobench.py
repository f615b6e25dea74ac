# SPDX-License-Identifier: Apache-2.0
"""Counts agree with neurobench 2.3.0 to the last operation, or differ for a reason that is listed.

Where they differ, on the layer at hand:

==========================  =======================  ==============================================
input                       neurobench               here
==========================  =======================  ==============================================
analog                      MACs at values not 0     all MACs; the zeros stand in ``input_density``
counts {0, 1, 2, ...}       MACs, one for each       ACs: a count of k is k additions
scaled spikes {0, s}        MACs                     ACs: the scale goes into the next weight
weights of a convolution    what reaches an output   the same
ConnectionSparsity          rounded to 4 digits      exact
==========================  =======================  ==============================================
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.report import Report
from spikenm_fx.trace import trace

workload = pytest.importorskip("neurobench.metrics.workload")
static = pytest.importorskip("neurobench.metrics.static")
models = pytest.importorskip("neurobench.models")
snntorch = pytest.importorskip("snntorch")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
functional = pytest.importorskip("spikingjelly.activation_based.functional")

T, N = 4, 3


class OverTime(nn.Module):
    """snnTorch neurons that are handed their state; ``x`` is (N, T, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(72, 32), nn.Linear(32, 5)
        for name in ("lif1", "lif2", "lif3", "lif4"):
            self.add_module(name, snntorch.Leaky(beta=0.8, threshold=0.15))

    def forward(self, x: Tensor) -> Tensor:
        lifs = self.lif1, self.lif2, self.lif3, self.lif4
        mems, out = [lif.init_leaky() for lif in lifs], []
        for step in x.unbind(1):
            spikes = step
            for i, weigh in enumerate((self.conv1, self.conv2, self.fc1, self.fc2)):
                current = weigh(spikes.flatten(1) if i == 2 else spikes)
                spikes, mems[i] = lifs[i](current, mems[i])
            out.append(spikes)
        return torch.stack(out, 1)


class Multistep(nn.Module):
    """SpikingJelly's layers and neurons over all steps at once; ``x`` is (N, T, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        node = {"v_threshold": 0.15, "step_mode": "m"}
        self.body = nn.Sequential(
            layer.Conv2d(1, 8, 3, bias=False, step_mode="m"),
            layer.BatchNorm2d(8, step_mode="m"),
            neuron.IFNode(**node),
            layer.MaxPool2d(2, 2, step_mode="m"),
            layer.Conv2d(8, 8, 3, padding=1, groups=2, step_mode="m"),
            neuron.LIFNode(**node),
            layer.Flatten(2, step_mode="s"),
            nn.Linear(72, 32),
            neuron.IFNode(**node),
            nn.Linear(32, 5),
            neuron.IFNode(**node),
        )

    def forward(self, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return self.body(x.transpose(0, 1)).transpose(0, 1)


BUILDERS = {"snntorch": OverTime, "spikingjelly": Multistep}


def spikes(seed: int = 0) -> Tensor:
    """Spikes (N, T, 1, 8, 8)."""
    return torch.bernoulli(torch.full((N, T, 1, 8, 8), 0.4), generator=_random(seed))


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(framework: str, state: str) -> nn.Module:
    """A model: dense, with masks (``unfolded``), or with the zeros they leave (``folded``)."""
    torch.manual_seed(1)
    model = BUILDERS[framework]().eval()
    if state != "dense":
        spikenm_fx.sparsify(model, "2:4", example_inputs=spikes())
        if state == "folded":
            spikenm_fx.fold(model)
    return model.eval()


def neurobench(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What neurobench says of one batch."""
    wrapped = models.TorchModel(model)
    for kind in (neuron.base_node.BaseNode, snntorch.SpikingNeuron):
        wrapped.add_activation_module(kind)
    wrapped.register_hooks()
    with torch.no_grad():
        out = wrapped(x)
        found = workload.SynapticOperations()(wrapped, out, (x, None))
        active = workload.ActivationSparsity()(wrapped, out, (x, None))
    wrapped.cleanup_hooks()
    sparsity = static.ConnectionSparsity()(wrapped)
    return found | {"activations": active, "connections": sparsity}


def per_sample(report: Report, name: str) -> float:
    """One of the report's counts, of all layers together."""
    return sum(getattr(each.operations, name) for each in report.layers) / N


@pytest.mark.framework
@pytest.mark.parametrize("state", ["dense", "unfolded", "folded"])
@pytest.mark.parametrize("framework", list(BUILDERS))
def test_spikes_are_counted_alike(framework: str, state: str) -> None:
    """All four layers see spikes: accumulations, dense operations and sparsities are the same."""
    model, x = built(framework, state), spikes(2)
    theirs = neurobench(copy.deepcopy(model), x)
    ours = spikenm_fx.report(model, [x], batch_dim=0)
    assert theirs["Effective_MACs"] == per_sample(ours, "macs") == 0
    assert float(theirs["Effective_ACs"]) == pytest.approx(per_sample(ours, "synops"), rel=1e-7)
    assert float(theirs["Dense"]) == pytest.approx(per_sample(ours, "dense"), rel=1e-7)
    zeros = 1 - sum(e.density * e.weights for e in ours.layers) / sum(
        e.weights for e in ours.layers
    )
    assert theirs["connections"] == pytest.approx(zeros, abs=5e-5)
    assert (zeros > 0.2) == (state != "dense")
    size = {name: math.prod(each.shape) for name, each in trace(model, x).neurons.items()}
    fired = sum(each.rate * size[each.name] for each in ours.neurons)
    assert theirs["activations"] == pytest.approx(1 - fired / sum(size.values()), rel=1e-6)


@pytest.mark.framework
@pytest.mark.parametrize("framework", list(BUILDERS))
def test_unfolded_models_are_counted_as_folded_ones(framework: str) -> None:
    """Neurobench reads the masked weights before fold, and the same ones afterwards."""
    model, x = built(framework, "unfolded"), spikes(2)
    before = neurobench(model, x)
    assert before == neurobench(spikenm_fx.fold(model), x)


@pytest.mark.framework
@pytest.mark.parametrize("framework", list(BUILDERS))
def test_analog_inputs_differ_by_their_zeros(framework: str) -> None:
    """First layer on pixels, half of them 0: theirs leaves those out, ours says how many."""
    model = built(framework, "folded")
    pixels = torch.rand(N, T, 1, 8, 8, generator=_random(3)) * spikes(4)
    theirs = neurobench(model, pixels)
    ours = spikenm_fx.report(model, [pixels], batch_dim=0)
    first = next(each for each in ours.layers if each.signal == "analog")
    assert first.input_density == pytest.approx(float((pixels != 0).float().mean()))
    assert float(theirs["Effective_MACs"]) < per_sample(ours, "macs") == first.operations.macs / N
    assert float(theirs["Effective_ACs"]) == pytest.approx(per_sample(ours, "synops"), rel=1e-7)


class Half(nn.Module):
    """Spikes of half height."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


@pytest.mark.framework
def test_scaled_spikes_are_additions_here() -> None:
    """Theirs calls {0, 0.5} analog; here the height goes into the weight, and additions remain."""
    torch.manual_seed(0)
    fire = neuron.IFNode(v_threshold=0.1)
    model = nn.Sequential(nn.Linear(16, 8), fire, Half(), nn.Linear(8, 8)).eval()
    x = torch.bernoulli(torch.full((N, 16), 0.4), generator=_random(5))
    fired = int((model[0](x) >= 0.1).sum())
    theirs = neurobench(model, x)
    fire.reset()
    last = spikenm_fx.report(model, [x]).layers[-1]
    assert float(theirs["Effective_MACs"]) * N == fired * 8 > 0
    assert (last.signal, last.operations.macs) == ("scaled", 0)
    assert last.operations.synops == fired * 8


@pytest.mark.framework
def test_counts_are_as_many_additions_here() -> None:
    """Theirs calls {0, 2} analog and counts each value once; two spikes are two additions here."""
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval()
    x = 2 * torch.bernoulli(torch.full((N, 16), 0.4), generator=_random(5))
    theirs = neurobench(model, x)
    (ours,) = spikenm_fx.report(model, [x]).layers
    assert float(theirs["Effective_MACs"]) * N == int((x != 0).sum()) * 8
    assert theirs["Effective_ACs"] == 0
    assert (ours.signal, ours.operations.synops) == ("integer", int(x.sum()) * 8)
