# SPDX-License-Identifier: Apache-2.0
"""A spike that differs is a tie only where the membrane lies on its threshold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_cases import build

from spikenm_fx.bench.zoo import Case
from spikenm_fx.pack.check.agreement import ROUNDING, TIES, agreement
from spikenm_fx.pack.check.forced import forced
from spikenm_fx.trace import find_neurons

FRAMEWORKS = [
    "snntorch/loop",
    "snntorch/conv",
    "norse/loop",
    "norse/lift",
    "spikingjelly/sew_resnet18/s",
    "spikingjelly/sew_resnet18_and/m",
]


def case_of(name: str) -> Case:
    return build(name)


def run_of(case: Case) -> Any:
    def run(module: nn.Module) -> Tensor:
        output: Any = module(*(x.clone() for x in case.inputs))
        while not isinstance(output, Tensor):
            output = output[0]
        return output

    return run


def flip_one(module: nn.Module) -> None:
    """From now on one spike of this neuron's first call is the other way round."""
    calls: list[int] = []

    def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            return out
        spikes = (out[0] if isinstance(out, tuple) else out).clone()
        spikes.view(-1)[spikes.numel() // 2] = 1 - spikes.view(-1)[spikes.numel() // 2]
        return (spikes, *out[1:]) if isinstance(out, tuple) else spikes

    module.register_forward_hook(hook)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_one_wrong_spike_is_no_tie_unless_its_membrane_is(name: str) -> None:
    """In models of every framework one spike against its membrane is an error, however many are."""
    case = case_of(name)
    seen = 0
    for neuron, spec in find_neurons(case.model).items():
        if spec.output != "spike":
            continue
        engine = copy.deepcopy(case.model)
        flip_one(engine.get_submodule(neuron))
        for module in (case.model, engine):
            case.reset(module)
        _, _, found = forced(case.model, engine, run_of(case))
        case.reset(case.model)
        (changed,) = [each for each in found if each.others]
        assert changed.name == neuron
        assert changed.others == 1
        if changed.margin is not None and changed.margin > ROUNDING:
            seen += 1
            engine = copy.deepcopy(case.model)
            flip_one(engine.get_submodule(neuron))
            wrong = agreement(case.model, engine, run_of(case), case.reset).disagreement
            assert "off the threshold" in wrong
    assert seen


def test_a_membrane_that_is_not_known_has_no_margin() -> None:
    """Time folded into the batch hides which membrane a value is of; then the share decides."""
    case = case_of("sinabs/squeeze")
    engine = copy.deepcopy(case.model)
    name = next(iter(find_neurons(case.model)))
    flip_one(engine.get_submodule(name))
    for module in (case.model, engine):
        case.reset(module)
    _, _, found = forced(case.model, engine, run_of(case))
    assert {each.name: each.margin for each in found if each.others} == {name: None}


@pytest.mark.parametrize(("shift", "wrong"), [(1e-6, False), (1e-2, True)])
def test_a_threshold_that_is_off(shift: float, wrong: bool) -> None:
    """The same single spike: a tie where the threshold moved by rounding, else an error."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    linear = nn.Linear(64, 32)
    highest = float(linear(x).detach().max())

    def network(threshold: float) -> nn.Module:
        return nn.Sequential(linear, neuron.IFNode(v_threshold=threshold), nn.Linear(32, 4))

    model = network(highest * (1 - shift / 2))
    engine = copy.deepcopy(model)
    engine[1].v_threshold = highest * (1 + shift / 2)
    found = agreement(model, engine, lambda module: module(x), functional.reset_net)
    assert found.ties == 1  # as few as the steps, where no share tells a tie from an error
    assert found.first is not None
    assert found.first.share > TIES
    assert bool(found.disagreement) == wrong
