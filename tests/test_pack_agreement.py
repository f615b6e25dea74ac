# SPDX-License-Identifier: Apache-2.0
"""A packed engine agrees with its model but for membranes on their threshold, or it is wrong."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from few_rounds import few_rounds
from hypothesis import given
from hypothesis import strategies as st
from pack_strategies import prune
from profiles import tries
from torch import Tensor, nn
from zoo_cases import build

from spikenm_fx.bench.zoo import Case
from spikenm_fx.pack import PackedLayer, native_status, pack, pack_weight
from spikenm_fx.pack.check.agreement import OUTPUT, ROUNDING, TIES, Agreement, agreement
from spikenm_fx.pack.check.difference import NeuronDifference
from spikenm_fx.pattern import NM

pytestmark = pytest.mark.usefixtures("few_rounds")
__all__ = ["few_rounds"]

native = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")
FRAMEWORKS = [
    "snntorch/loop",
    "snntorch/conv",
    "norse/lift",
    "sinabs/squeeze",
    "spikingjelly/sew_resnet18/s",
    "spikingjelly/sew_resnet18_and/m",
]


@functools.cache
def case_of(name: str, *, whole: bool = False) -> Case:
    """At 2:4; packing and comparing leave it as it is."""
    case = build(name, whole=whole)
    for module in case.model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.weight.data = prune(module.weight.data, NM(2, 4))
    return case


def compared(case: Case, engine: nn.Module) -> Agreement:
    def run(module: nn.Module) -> Tensor:
        output: Any = module(*(x.clone() for x in case.inputs))
        while not isinstance(output, Tensor):
            output = output[0]
        return output

    return agreement(case.model, engine, run, case.reset)


def corrupt_one_weight(case: Case, engine: nn.Module, name: str) -> bool:
    """Change one packed value of a layer, if there is one that its input makes matter."""
    layer: Any = engine.get_submodule(name)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0] + 0.0))
    compared(case, engine)
    hook.remove()
    axis = 1 if layer.geometry.spatial else -1
    active = [x for x in seen if x.abs().sum() > 0]
    if not active or layer.geometry.groups > 1:
        return False
    x = active[0] if active[0].dim() < 5 else active[0].flatten(0, 1)
    channel = int(x.abs().movedim(axis, 0).flatten(1).sum(1).argmax())
    weight = layer.weight.clone()
    index = (0, channel, *[n // 2 for n in weight.shape[2:]])
    if weight[index] == 0:  # the pattern has no room for it: take what is there in its block
        block = weight[0, channel // 4 * 4 : channel // 4 * 4 + 4]
        if not block.any():
            return False
        weight[0, channel // 4 * 4 : channel // 4 * 4 + 4] = 0
    weight[index] = 3 * weight.abs().max()
    changed = pack_weight(weight, layer.nm, geometry=layer.geometry)
    layer.values = nn.Parameter(changed.values, requires_grad=False)
    layer.indices = changed.indices
    layer.choose(layer.choice)
    return True


@pytest.mark.parametrize("backend", ["dense", pytest.param("fma", marks=native)])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_engines_of_every_framework_agree(name: str, backend: str) -> None:
    """Real models, packed: nothing is wrong, and their neurons were really compared."""
    case = case_of(name)
    found = compared(case, pack(case.model, case.inputs, backend=backend))
    assert found.disagreement == ""
    assert found.neurons
    assert all(neuron.spikes and neuron.steps for neuron in found.neurons)


@pytest.mark.parametrize("backend", ["dense", pytest.param("event", marks=native)])
@pytest.mark.parametrize("name", ["snntorch/conv", "norse/lift", "spikingjelly/sew_resnet18_and/m"])
def test_one_wrong_weight_in_any_layer_is_seen(name: str, backend: str) -> None:
    """One weight of one packed layer, whichever it is, makes the engine wrong."""
    case = case_of(name, whole=True)  # narrow ones are too quiet for a single weight to matter
    engine = pack(case.model, case.inputs, backend=backend)
    layers = [n for n, module in engine.named_modules() if isinstance(module, PackedLayer)]
    tried = 0
    for name in {layers[0], layers[len(layers) // 2], layers[-1]}:
        layer: Any = engine.get_submodule(name)
        values, indices = layer.values, layer.indices
        if corrupt_one_weight(case, engine, name):
            tried += 1
            assert compared(case, engine).disagreement, name
        layer.values, layer.indices = values, indices
        layer.choose(layer.choice)
    assert tried >= 2
    assert compared(case, engine).disagreement == ""


@native
def test_a_membrane_on_its_threshold_is_no_error() -> None:
    """One spike that rounding decides moves the output far, and is told from an error."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")

    def network(threshold: float) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 32),
            nn.BatchNorm1d(32),  # folded into the weights, it rounds otherwise
            neuron.IFNode(v_threshold=threshold),
            nn.Linear(32, 8),
        )
        for layer in (model[0], model[3]):
            layer.weight.data = prune(layer.weight.data, NM(2, 4))
        model[1].running_mean.uniform_(-0.3, 0.3)
        model[1].running_var.uniform_(0.2, 0.9)
        return model.eval()

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    model = network(0.5)
    engine = pack(model, x, backend="fma")
    with torch.no_grad():
        eager, packed = model[1](model[0](x)), engine[0](x) + 0.0
    apart = eager != packed
    assert apart.any()
    found = []
    for threshold in torch.maximum(eager, packed)[apart & (eager > 0.05)][:20].tolist():
        model = network(threshold)
        case = Case(model, (x,), functional.reset_net)
        found.append(compared(case, pack(model, x, backend="fma")))
        assert found[-1].disagreement == ""
    tied = [each for each in found if each.first is not None]
    assert tied
    assert any(each.output > OUTPUT for each in tied)
    assert all(each.first.name == "2" and each.ties == 1 for each in tied)
    assert all(each.forced <= OUTPUT for each in tied)


def test_without_neurons_the_output_alone_counts() -> None:
    """A network whose neurons cannot be seen must put out the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    case = Case(model, (torch.rand(3, 8),), lambda _: None)
    engine = pack(model, case.inputs)
    found = compared(case, engine)
    assert found.neurons == ()
    assert found.first is None
    assert found.disagreement == ""
    engine[2].bias += 1.0
    assert "the output differs" in compared(case, engine).disagreement


@tries(200)
@given(
    st.integers(0, 40),
    st.integers(1, 8),
    st.sampled_from([0.0, ROUNDING / 2, ROUNDING * 2, float("inf")]),
    st.sampled_from([0.0, OUTPUT / 2, OUTPUT * 2, float("nan")]),
    st.sampled_from([0.0, OUTPUT / 2, OUTPUT * 2]),
)
def test_what_is_an_error(
    others: int, steps: int, received: float, forced: float, free: float
) -> None:
    """Other inputs, more spikes than ties, another output on the same spikes, or without cause."""
    neuron = NeuronDifference("lif", 100_000, others, steps, received)
    wrong = (
        received > ROUNDING
        or others > max(TIES * neuron.spikes, steps)
        or not forced <= OUTPUT
        or (free > OUTPUT and not others)
    )
    assert bool(Agreement(free, forced, (neuron,)).disagreement) == wrong


@pytest.mark.parametrize("which", range(8))
def test_a_wrong_recurrent_weight_is_seen(which: int) -> None:
    """A weight inside a neuron, the sign of one turned, is an error although its input agrees."""
    snntorch = pytest.importorskip("snntorch")

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward = nn.Linear(16, 32)
            self.lif = snntorch.RLeaky(beta=0.9, linear_features=32, init_hidden=False)
            self.out = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            spikes, mem = self.lif.reset_mem()
            total: Any = 0
            for step in x:
                spikes, mem = self.lif(self.inward(step), spikes, mem)
                total = total + self.out(spikes)
            return total

    torch.manual_seed(0)
    model, x = Recurrent().eval(), torch.rand(8, 4, 16) * 3
    case = Case(model, (x,), lambda _: None)
    engine = pack(model, case.inputs, backend="dense")
    right = compared(case, engine)
    assert right.disagreement == ""
    firing: list[Tensor] = []
    hook = model.lif.register_forward_hook(lambda _m, _a, out: firing.append(out[0]))
    model(x)
    hook.remove()
    active = torch.stack(firing[:-1]).sum((0, 1)).nonzero().flatten()
    weight = engine.lif.recurrent.weight.data
    weight[which, active[which % len(active)]] *= -1
    assert "inside lif" in compared(case, engine).disagreement
