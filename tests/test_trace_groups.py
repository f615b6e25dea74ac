# SPDX-License-Identifier: Apache-2.0
"""Coupled groups: permuting one changes nothing, permuting a part of one does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from zoo_cases import build

from spikenm_fx.bench.nets.handwritten import SequenceLIF, StatefulLIF
from spikenm_fx.bench.permutation import other_order
from spikenm_fx.bench.zoo import ZOO, Case
from spikenm_fx.errors import TraceError
from spikenm_fx.trace import CoupledGroup, coupled_groups, permute_channels, trace
from spikenm_fx.trace.channels.groups import permute_members

DOUBLE = [
    *(f"spikingjelly/{n}/m" for n in ("spiking_resnet18", "sew_resnet18", "ms_resnet18")),
    *(f"spikingjelly/{n}/m" for n in ("spikformer", "sdt", "qkformer", "maxformer")),
    *("spikingjelly/sew_resnet18_iand/m", "spikingjelly/cifar10dvs/m"),
    *("norse/loop", "hand/module", "hand/stateful", "hand/functional", "hand/raw"),
]
EXPECTED = {"spikingjelly/spiking_resnet18/m": 12, "spikingjelly/sew_resnet18/m": 12}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def outputs(case: Case) -> list[Tensor]:
    case.reset(case.model)
    with torch.no_grad():
        out = case.model(*case.inputs)
    case.reset(case.model)
    return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", DOUBLE)
def test_groups_permute_exactly(name: str) -> None:
    """Unfrozen groups leave float64 outputs equal to 1e-8; their producers alone do not."""
    torch.manual_seed(1)
    case = build(name)
    case.model.double()
    groups = coupled_groups(trace(case.model, case.inputs))
    before = outputs(case)
    noticed = free = 0
    for group in groups:
        if group.frozen:
            continue
        free += 1
        order = other_order(group.size)
        permute_channels(case.model, group, order)
        assert difference(before, outputs(case)) <= 1e-8
        permute_channels(case.model, group, torch.argsort(order))
        permute_members(case.model, group, group.producers, order)
        noticed += difference(before, outputs(case)) > 1e-8
        permute_members(case.model, group, group.producers, torch.argsort(order))
    assert free >= EXPECTED.get(name, 1)
    assert noticed == free
    assert difference(before, outputs(case)) == 0


@pytest.mark.parametrize("name", ["snntorch/rleaky", "sinabs/recurrent"])
def test_recurrent_layers_inside_neurons_go_along(name: str) -> None:
    """A neuron's own recurrent matrix is permuted along both axes, and must be."""
    if not ZOO[name].available:
        pytest.skip("framework not installed")
    torch.set_default_dtype(torch.float32)  # these frameworks make float32 tensors of their own
    case = ZOO[name].build()
    (group,) = [g for g in coupled_groups(trace(case.model, case.inputs)) if not g.frozen]
    square = [m for m in group.members if "rec" in m.tensor and "weight" in m.tensor]
    assert {m.axis for m in square} == {0, 1}
    before = outputs(case)
    order = torch.randperm(group.size, generator=torch.Generator().manual_seed(1)).roll(1)
    permute_channels(case.model, group, order)
    torch.testing.assert_close(outputs(case), before, atol=1e-4, rtol=1e-4)
    permute_members(case.model, group, tuple(square), torch.argsort(order))
    assert difference(outputs(case), before) > 1e-3


def test_states_that_leave_the_model_freeze_their_channels() -> None:
    """A membrane among the outputs would come out permuted."""

    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.lif, self.b = nn.Linear(4, 6), StatefulLIF(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            return self.b(self.lif(self.a(x))), self.lif.mem

    groups = coupled_groups(trace(Shows(), torch.rand(3, 4)))
    shown = next(g for g in groups if g.size == 6)
    assert any("state is an output" in reason for reason in shown.frozen)


def free(model: nn.Module, x: Tensor) -> list[CoupledGroup]:
    return [g for g in coupled_groups(trace(model, x)) if not g.frozen]


def test_heads_split_into_two_groups() -> None:
    """Attention heads can be reordered, and channels inside all heads alike."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 12) for _ in range(3))
            self.proj, self.lif = nn.Linear(12, 6), SequenceLIF()

        def forward(self, x: Tensor) -> Tensor:
            t, n, s, _ = x.shape
            q, k, v = (
                self.lif(layer(x)).reshape(t, n, s, 3, 4).transpose(2, 3)
                for layer in (self.q, self.k, self.v)
            )
            mixed = (q @ k.transpose(-2, -1)) @ v
            return self.proj(mixed.transpose(2, 3).reshape(t, n, s, 12))

    groups = free(Attention(), torch.rand(2, 1, 5, 6) * 3)
    assert sorted(g.size for g in groups) == [3, 4, 4]
    heads = next(g for g in groups if g.size == 3)
    assert {m.tensor for m in heads.members if m.role != "attached"} == {
        *("q.weight", "k.weight", "v.weight", "proj.weight")
    }
    assert all(m.inner == 4 for m in heads.members)
    inside = [g for g in groups if g.size == 4]
    assert {frozenset(m.tensor for m in g.producers) for g in inside} == {
        frozenset({"q.weight", "k.weight"}),
        frozenset({"v.weight"}),
    }


def test_flatten_and_concatenation_have_positions() -> None:
    """A flattened map repeats each channel; a concatenation puts the second part behind."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 5, 1)
            self.fc = nn.Linear(8 * 4, 2)
            self.after = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.cat([self.a(x), self.b(x)], dim=1)
            return self.after(both), self.a(x).flatten(1) @ torch.ones(12, 1)

    groups = free(Net(), torch.rand(2, 1, 2, 2))
    second = next(g for g in groups if g.size == 5)
    (consumer,) = second.consumers
    assert (consumer.tensor, consumer.offset, consumer.inner) == ("after.weight", 3, 1)


def test_grouped_convolutions() -> None:
    """Groups move as a whole; channels inside a group only alike in all groups."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 9, 1, groups=3)
            self.c = nn.Conv2d(9, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    assert sorted(g.size for g in free(Net(), torch.rand(1, 1, 2, 2))) == [2, 3, 3]


def test_what_is_frozen_says_why() -> None:
    """The output, shared weights and unknown operations freeze with a reason."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cumsum(self.b(self.a(x)), dim=-1))

    groups = coupled_groups(trace(Net(), torch.rand(3, 4)))
    reasons = " ".join(reason for g in groups for reason in g.frozen)
    assert all(g.frozen for g in groups)
    assert "output of the model" in reasons
    assert "no rule for cumsum" in reasons
    assert "share this tensor" in reasons


def test_misuse_is_refused() -> None:
    """Frozen groups and wrong permutations are errors; so are groups without a forward."""
    model = nn.Sequential(nn.Linear(4, 6), SequenceLIF(), nn.Linear(6, 2))
    groups = coupled_groups(trace(model, torch.rand(2, 1, 4)))
    frozen = next(g for g in groups if g.frozen)
    with pytest.raises(TraceError, match="frozen: output"):
        permute_channels(model, frozen, torch.arange(2))
    other = next(g for g in groups if not g.frozen)
    with pytest.raises(TraceError, match="permutation"):
        permute_channels(model, other, torch.zeros(6, dtype=torch.long))
    with pytest.raises(TraceError, match="example_inputs"):
        coupled_groups(trace(model))


def test_agrees_with_torch_pruning() -> None:
    """Where torch-pruning's dependency graph is right, it couples the same layers."""
    pruning = pytest.importorskip("torch_pruning")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
            self.head = nn.Linear(8 * 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn(self.stem(x)))
            x = x + self.b(torch.relu(self.a(x)))
            return self.head(x.flatten(1))

    torch.set_default_dtype(torch.float32)
    model, x = Net().eval(), torch.rand(1, 2, 4, 4)
    names = {module: name for name, module in model.named_modules()}
    ours = {frozenset(m.tensor.rpartition(".")[0] for m in g.members) for g in free(model, x)}
    dependencies = pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    theirs = set()
    for layer in (model.stem, model.a, model.b):
        group = dependencies.get_pruning_group(layer, pruning.prune_conv_out_channels, [0])
        touched = {names[d.dep.target.module] for d in group if d.dep.target.module in names}
        theirs.add(frozenset(touched - {""}))
    assert ours == theirs


def test_groups_of_a_wrapped_model_carry_its_prefix() -> None:
    """What was traced through a wrapper can be permuted through it."""
    torch.manual_seed(0)
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 6), SequenceLIF(), nn.Linear(6, 2)))
    x = torch.rand(3, 2, 4) * 6 - 3
    graph = trace(model, x)
    (group,) = (group for group in coupled_groups(graph) if not group.frozen)
    assert {member.tensor for member in group.members} <= dict(model.named_parameters()).keys()
    with torch.no_grad():
        before = model(x)
        permute_channels(model, group, torch.arange(5, -1, -1))
        assert before.std() > 0
        torch.testing.assert_close(model(x), before)
        permute_members(model, group, group.producers, torch.tensor([1, 2, 3, 4, 5, 0]))
        assert not torch.allclose(model(x), before)
