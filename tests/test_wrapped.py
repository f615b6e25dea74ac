# SPDX-License-Identifier: Apache-2.0
"""Models as people hold them: wrapped, normalised, watched, reset by themselves, half in numpy."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from profiles import tries
from snn_strategies import random_nets
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import PlanError
from spikenm_fx.pack import native_status, pack, packing
from spikenm_fx.program import Engine


class Fire(nn.Module):
    """Spikes with a surrogate, without state."""

    def forward(self, x: Tensor) -> Tensor:
        soft = torch.sigmoid(4 * x)
        return (x > 0).float() + soft - soft.detach()


class Held(nn.Module):
    """A model under the name ``model``, as trainers keep it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), Fire(), nn.Linear(32, 32), Fire(), nn.Linear(32, 8)]
    return nn.Sequential(*layers)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    """A part of a model that was compiled, below one that was not."""
    return Held(compiled(model))


WRAPPERS = {
    "module.": nn.DataParallel,
    "_orig_mod.": compiled,
    "model.": Held,
    "model._orig_mod.": compiled_inside,
}


def x() -> Tensor:
    return 2 * torch.rand(4, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prefix", list(WRAPPERS))
def test_a_wrapped_model_goes_the_whole_way(prefix: str) -> None:
    """Names carry the wrapper's prefix everywhere, and what is computed is the bare model's."""
    bare = plain().eval()
    model = WRAPPERS[prefix](bare)
    plan = spikenm_fx.plan(model, "2:4", example_inputs=x())
    assert [entry.name for entry in plan.sparse] == [f"{prefix}2"]
    spikenm_fx.sparsify(model, plan)
    model(x()).square().mean().backward()
    expected = model.eval()(x())
    spikenm_fx.fold(model)
    assert torch.equal(bare(x()), expected)
    spikenm_fx.verify(model, plan).raise_if_invalid()
    report = spikenm_fx.report(model, [x()])
    assert {each.name: each.pattern for each in report.layers}[f"{prefix}2"] == "2:4"
    engine = spikenm_fx.pack(model, x())
    assert set(packing(engine).choices) == {f"{prefix}{i}" for i in (0, 2, 4)}
    torch.testing.assert_close(engine(x()), expected)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compile_part", [compiled, in_place])
def test_a_compiled_part_is_traced_and_runs_as_a_program(compile_part: Any) -> None:
    """What was compiled is read as what it was compiled of, neurons with state included."""
    if not native_status().available:
        pytest.skip("no compiled kernels")
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    torch.manual_seed(0)
    body = (nn.Linear(16, 32), neuron.LIFNode(step_mode="m"), nn.Linear(32, 8))
    model = Held(compile_part(nn.Sequential(*body))).eval()
    frames = 4 * torch.rand(3, 2, 16)
    graph = spikenm_fx.trace(model, frames)
    prefix = "model._orig_mod" if compile_part is compiled else "model"
    assert list(graph.neurons) == [f"{prefix}.1"]
    engine = spikenm_fx.pack(model, frames, program=True)
    assert isinstance(engine, Engine)
    with torch.no_grad():
        functional.reset_net(model)
        torch.testing.assert_close(engine(frames), model(frames))


@pytest.mark.parametrize("prefix", list(WRAPPERS))
def test_a_wrapped_models_plan_on_the_bare_one_says_what_to_do(prefix: str) -> None:
    """A plan under other names is refused with the names that are there."""
    model = WRAPPERS[prefix](plain())
    plan = spikenm_fx.plan(model, "2:4", example_inputs=x())
    with pytest.raises(PlanError, match=f"{prefix}2"):
        spikenm_fx.sparsify(plain(), plan)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("raw", [False, True])
def test_weight_norm_in_a_forward_is_masked_through(raw: bool) -> None:
    """G * v / |v| keeps the zeros of v: planned, folded, verified and counted as multiplied."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.g = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.ones(32, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.g * self.v / self.v.norm(dim=1, keepdim=True)).T

    torch.manual_seed(0)
    inner = Normed() if raw else nn.utils.weight_norm(nn.Linear(32, 32))
    model = nn.Sequential(nn.Linear(16, 32), Fire(), inner, Fire(), nn.Linear(32, 8))
    plan = spikenm_fx.plan(model, "2:4", example_inputs=x())
    planned = {entry.name: str(entry.nm or entry.reason) for entry in plan.layers}
    if not raw:  # torch computes that weight in a hook: the plan names the way out
        assert "remove_weight_norm" in planned["2"]
        nn.utils.remove_weight_norm(inner)
        plan = spikenm_fx.plan(model, "2:4", example_inputs=x())
    name = "2.v" if raw else "2"
    assert [entry.name for entry in plan.sparse] == [name]
    spikenm_fx.sparsify(model, plan)
    model(x()).square().mean().backward()
    expected = model.eval()(x())
    spikenm_fx.fold(model)
    assert torch.equal(model(x()), expected)
    spikenm_fx.verify(model, plan).raise_if_invalid()
    (row,) = [each for each in spikenm_fx.report(model, [x()]).layers if each.name == name]
    assert (row.pattern, row.density) == ("2:4", 0.5)


@pytest.mark.parametrize("of_data", [False, True])
def test_numpy_in_a_forward(of_data: bool) -> None:
    """Layers, neurons and decisions are found; where data goes through it, a note says so."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            current = self.a(x)
            gain = np.linspace(0.5, 1, 32, dtype="float32")
            if of_data:
                gain = gain * np.ceil(np.abs(current.detach().numpy()))
            spikes = (self.b((current * torch.from_numpy(gain) > 0.1).float()) > 0).float()
            return self.c(spikes * torch.as_tensor(np.ones(32, dtype="float32")))

    model = Net().eval()
    graph = spikenm_fx.trace(model, x())
    assert any("numpy" in n.text and "gain" in n.text for n in graph.notes) == of_data
    assert graph.route == ("execution" if of_data else "fx")
    plan = spikenm_fx.plan(model, "2:4", graph=graph)
    assert [entry.name for entry in plan.sparse] == ["b"]
    assert len(graph.neurons) == 2
    for _ in range(20):  # memory of one tensor becomes another's: neither is taken for the other
        assert set(spikenm_fx.trace(model, x()).neurons) == set(graph.neurons)
    spikenm_fx.fold(spikenm_fx.sparsify(model, plan))
    torch.testing.assert_close(spikenm_fx.pack(model, x())(x()), model(x()))


def test_monitors_record_what_they_would_have() -> None:
    """Hooks that keep what they see hold nothing of trace, plan, sparsify, report or pack."""
    model, seen = plain().eval(), []
    for fire in (model[1], model[3]):
        fire.register_forward_hook(lambda _module, _args, out: seen.append(out))
    spikenm_fx.trace(model, x())
    spikenm_fx.sparsify(model, "2:4", example_inputs=x())
    spikenm_fx.fold(model)
    spikenm_fx.report(model, [x()])
    engine = spikenm_fx.pack(model, x())
    assert seen == []
    engine(x())
    assert len(seen) == 2
    assert {type(each) for each in seen} == {Tensor}


@pytest.mark.framework
def test_a_forward_that_resets_by_itself() -> None:
    """SnnTorch's ``utils.reset`` at the start of a forward disturbs neither trace nor engine."""
    snntorch = pytest.importorskip("snntorch")
    from snntorch import utils

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            lif = {"beta": 0.8, "threshold": 0.3, "init_hidden": True}
            self.net = nn.Sequential(
                *(nn.Linear(16, 32), snntorch.Leaky(**lif), nn.Linear(32, 32)),
                *(snntorch.Leaky(**lif), nn.Linear(32, 8)),
            )

        def forward(self, x: Tensor) -> Tensor:
            utils.reset(self.net)
            return sum(self.net(x) for _ in range(5))

    torch.manual_seed(0)
    model = Net().eval()
    plan = spikenm_fx.plan(model, "2:4", example_inputs=x())
    assert [(e.name, e.reason) for e in plan.sparse] == [
        ("net.2", "spike from net.1, drives net.3")
    ]
    spikenm_fx.sparsify(model, plan)
    expected = model(x())
    spikenm_fx.fold(model)
    assert torch.equal(model(x()), expected)
    engine = spikenm_fx.pack(model, x())
    for _ in range(2):
        torch.testing.assert_close(engine(x()), expected)
    assert torch.equal(model(x()), expected)


@tries(8)
@given(random_nets())
def test_examples_never_make_less_sparse(case: tuple[nn.Module, Tensor]) -> None:
    """What becomes N:M without example inputs becomes so with them."""
    model, inputs = case
    model = copy.deepcopy(model)

    def sparse(**options: Any) -> set[str]:
        try:
            return {entry.name for entry in spikenm_fx.plan(model, "1:2", **options).sparse}
        except PlanError:
            return set()

    without, given_examples = sparse(), sparse(example_inputs=inputs)
    assert len(given_examples) >= len(without)


def test_other_models_of_the_process_keep_their_state() -> None:
    """A forward with snnTorch's ``utils.reset`` reaches every neuron there is; a trace does not."""
    snn = pytest.importorskip("snntorch")
    from snntorch import utils

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(8, 8), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(8, 8)
            )

        def forward(self, x: Tensor) -> Tensor:
            utils.reset(self.net)
            return torch.stack([self.net(step) for step in x])

    other, net, x = Net(), Net(), torch.rand(4, 2, 8)
    other(x)
    before = other.net[1].mem
    kept = before.clone()
    graph = spikenm_fx.trace(net, x)
    assert graph.route == "fx"
    assert other.net[1].mem is before
    assert type(other.net[1].mem) is Tensor
    assert torch.equal(before, kept)
    spikenm_fx.sparsify(net, "2:4", example_inputs=x, method="magnitude")
    engine = spikenm_fx.pack(spikenm_fx.fold(net), x)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(engine(x), net(x), rtol=1e-4, atol=1e-5)


class Unsqueezes(nn.Module):
    """Makes time of its input in place, as temporal efficient training's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, 4]``."""
        x.unsqueeze_(1)
        x = x.repeat(1, 2, 1, 1, 1)
        return self.head(torch.relu(self.conv(x.flatten(0, 1))).mean((-2, -1)))


@pytest.mark.parametrize("program", [False, True])
def test_a_forward_that_reshapes_its_input_in_place(program: bool) -> None:
    """Each forward gets the examples as they were given, and so they stay."""
    model, x = Unsqueezes().eval(), torch.rand(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = pack(model, x, program=program)
    assert x.shape == (2, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(engine(x.clone()), model(x.clone()))
