# SPDX-License-Identifier: Apache-2.0
"""permute(): more is kept, and the model computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from profiles import tries
from snn_strategies import random_nets
from torch import Tensor, nn
from zoo_cases import build

import spikenm_fx
from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.bench.permutation import in_double, outputs_of, staying
from spikenm_fx.bench.zoo import Case
from spikenm_fx.channels import (
    Permutation,
    apply_permutation,
    permute,
    plan_permutation,
)
from spikenm_fx.errors import PlanError, SpikeNMError, TraceError
from spikenm_fx.masks.credits import learnt_credits
from spikenm_fx.pattern import NM, BlockView
from spikenm_fx.trace import find_neurons
from spikenm_fx.trace.channels.groups import permute_members

MODELS = [
    *(f"spikingjelly/{n}/m" for n in ("spiking_resnet18", "sew_resnet18", "spiking_vgg11_bn")),
    *(f"spikingjelly/{n}/m" for n in ("spikformer", "sdt", "ms_resnet18", "qkformer")),
    *("snntorch/conv", "snntorch/rleaky", "norse/loop"),
    *("sinabs/from_model", "sinabs/recurrent", "hand/module", "hand/stateful", "hand/raw"),
]


@contextmanager
def counted_spikes(model: nn.Module) -> Iterator[list[float]]:
    """What each call of a neuron emits in sum, which no order of channels changes."""
    sums: list[float] = []

    def count(_: nn.Module, __: object, output: object) -> None:
        spikes = output[0] if isinstance(output, tuple) else output
        sums.append(float(spikes.detach().double().sum()))

    handles = [
        model.get_submodule(name).register_forward_hook(count) for name in find_neurons(model)
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def run(case: Case) -> tuple[list[Tensor], list[float]]:
    with counted_spikes(case.model) as sums:
        outputs = outputs_of(case)
    return outputs, list(sums)


def magnitude_kept(model: nn.Module, plan: spikenm_fx.Plan) -> float:
    """Of all weights that become N:M, the magnitude of those that stay."""
    kept = 0.0
    for layer in plan.sparse:
        weight = layer.find(model)
        assert weight is not None
        assert layer.nm is not None
        blocks = BlockView(layer.nm, layer.shape, layer.axis == 0, layer.groups).to_blocks(
            weight.detach().abs().double()
        )
        kept += float(blocks.topk(layer.nm.keep, dim=1).values.sum())
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_model_computes_the_same_and_keeps_more(name: str) -> None:
    """Float64 outputs to 1e-8, spikes exactly; producers alone change them."""
    torch.manual_seed(1)
    case = build(name)
    everything = [spikenm_fx.Rule("re:.*", nm=NM(2, 4), remainder="pad")]
    plan = spikenm_fx.plan(case.model, example_inputs=case.inputs, rules=everything)
    found = plan_permutation(case.model, case.inputs, plan)
    assert found.moved
    with in_double(case) as (exactly, precise):
        before, spikes = run(exactly)
        stays = staying(exactly, precise)
        kept = magnitude_kept(exactly.model, plan)
        assert apply_permutation(exactly.model, found) is exactly.model
        after, spikes_after = run(exactly)
        assert stays()
        assert spikes_after == spikes
        more = magnitude_kept(exactly.model, plan) - kept
        assert more > 0
        if precise:  # else the weights were rounded to a grid
            gained = sum(e.kept_after - e.kept_before for e in found.groups)
            assert more == pytest.approx(gained, rel=1e-3)
            differences = [(x - y).abs().max() for x, y in zip(before, after, strict=True)]
            assert max(differences) < 1e-8
        for entry in found.moved:
            assert entry.order is not None
            permute_members(exactly.model, entry.group, entry.group.producers, entry.order)
        assert not stays()


@tries(10)
@given(net=random_nets())
def test_random_networks_compute_the_same(net: tuple[nn.Module, Tensor]) -> None:
    """Joins, heads, groups, gates, concatenations and per-channel thresholds."""
    model, x = net
    plan = spikenm_fx.plan(model, "1:2", example_inputs=x, remainder="pad")
    reference, before = model(x), magnitude_kept(model, plan)
    permute(model, x, plan, seconds=1.0)
    torch.testing.assert_close(model(x), reference, atol=1e-8, rtol=0)
    assert magnitude_kept(model, plan) >= before - 1e-6


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 16), SequenceLIF(), nn.Linear(16, 16), SequenceLIF()),
        *(nn.Linear(16, 16), SequenceLIF(), nn.Linear(16, 4)),
    ).eval()


X = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0)) * 4


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_planning_changes_nothing_and_reads_as_a_table() -> None:
    """The plan names each group, what is kept before and after, and why the others stay."""
    model = small()
    before = state_of(model)
    found = plan_permutation(model, X)
    assert unchanged(model, before)
    text = str(found)
    assert "2 of 4 groups of channels move" in text
    assert "output of the model" in text
    assert found.gain > 0
    as_dict = found.to_dict()
    assert len(as_dict["groups"]) == len(found.groups)
    assert sorted(as_dict["groups"][0]["order"] or range(16)) == list(range(16))


def test_a_plan_decides_which_layers_count() -> None:
    """Each layer by its own pattern; groups that no N:M layer reads stay."""
    model = small()
    rules = [spikenm_fx.Rule("2", nm="1:4"), spikenm_fx.Rule("4", action="keep_dense")]
    found = plan_permutation(model, X, spikenm_fx.plan(model, rules=rules, example_inputs=X))
    (moved,) = found.moved
    assert moved.layers == ("2",)
    share = moved.kept_before / moved.total
    assert 0.25 < share < 0.5 < 0.75 < share * 4  # of a quarter of the weights
    assert any("no N:M weight reads" in entry.reason for entry in found.groups)


def test_the_score_decides_what_is_kept() -> None:
    """Rates weigh the channels; given scores replace the magnitudes."""
    model = small()
    orders = {}
    given = {"2": model[2].weight.detach().square(), "4": torch.ones(16, 16)}
    for name, score in (("magnitude", "magnitude"), ("rate", "rate"), ("given", given)):
        found = plan_permutation(model, X, score=score)  # type: ignore[arg-type]
        orders[name] = {e.layers: e for e in found.groups}
    squared = orders["given"][("2",)]
    assert squared.total == pytest.approx(float(given["2"].sum()), rel=1e-5)
    assert orders["given"][("4",)].order is None  # all alike: no order is better
    spikes = SequenceLIF()(model[0](X)).flatten(0, 1)
    rate = spikes.square().mean(0)
    weighed = (model[2].weight.abs() * rate.sqrt()).sum().detach()
    assert orders["rate"][("2",)].total == pytest.approx(float(weighed), rel=1e-4)


@pytest.mark.parametrize(
    ("score", "says"),
    [
        ("size", "is not known"),
        ({"nowhere": torch.ones(1)}, "does not become N:M here"),
        ({"2": torch.ones(3)}, r"shape \(3,\) for a weight of shape \(16, 16\)"),
        ({"2": -torch.ones(16, 16)}, "not negative"),
        ({"2": torch.full((16, 16), float("nan"))}, "finite"),
    ],
)
def test_scores_that_fit_nothing_are_refused(score: object, says: str) -> None:
    """With what was seen and what is needed; the model stays as it was."""
    model = small()
    before = state_of(model)
    with pytest.raises(PlanError, match=says):
        permute(model, X, score=score)  # type: ignore[arg-type]
    assert unchanged(model, before)


def test_weights_that_are_not_finite_are_refused() -> None:
    """By name and shape."""
    model = small()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match=r"2 \(16, 16\) holds NaN"):
        permute(model, X)


def test_learnt_credits_come_from_a_trained_sparse_model() -> None:
    """They fit the dense model that was sparsified; without training there are none."""
    dense = small().train()
    sparse = spikenm_fx.sparsify(copy.deepcopy(dense), example_inputs=X)
    with pytest.raises(PlanError, match="no learnt credits"):
        learnt_credits(sparse)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sparse(X).square().mean().backward()
        optimizer.step()
    credits = learnt_credits(sparse)
    assert set(credits) <= {"2", "4"}
    found = plan_permutation(dense, X, score=credits)
    assert {layer for entry in found.moved for layer in entry.layers} & set(credits)


def test_grouped_convolutions_are_weighed_by_their_own_inputs() -> None:
    """The rate of a grouped convolution's input belongs to the group that reads it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.lif = nn.Conv2d(2, 16, 1), SequenceLIF()
            self.b, self.c = nn.Conv2d(16, 8, 1, groups=2), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            t = x.shape[0]
            spikes = self.lif(self.a(x.flatten(0, 1)).unflatten(0, (t, -1)))
            return self.c(self.b(spikes.flatten(0, 1)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.rand(3, 2, 2, 4, 4) * 3
    found = plan_permutation(model, x, score="rate")
    (entry,) = [e for e in found.groups if e.layers == ("b",)]
    spikes = model.lif(model.a(x.flatten(0, 1)).unflatten(0, (3, -1))).flatten(0, 1)
    rate = spikes.square().mean((0, 2, 3)).sqrt()
    halves = [
        model.b.weight[4 * g : 4 * g + 4, :, 0, 0].abs() @ rate[8 * g : 8 * g + 8] for g in range(2)
    ]
    assert entry.total == pytest.approx(float(torch.cat(halves).sum()), rel=1e-4)


# -- what must be left alone -----------------------------------------------------------------------


def test_masked_models_and_models_in_training_are_refused() -> None:
    """Their masks and momenta belong to the channels as they lie."""
    model = spikenm_fx.sparsify(small())
    before = state_of(model)
    with pytest.raises(PlanError, match=r"still masked.*fold"):
        permute(model, X)
    assert unchanged(model, before)
    model = small()
    model(X).sum().backward()
    with pytest.raises(PlanError, match=r"holds a gradient.*zero_grad"):
        permute(model, X)


@pytest.mark.parametrize("given", [None, "model", nn.Linear])
def test_what_is_no_model_is_refused(given: object) -> None:
    """With a word on what is needed."""
    with pytest.raises(PlanError, match=r"needs an nn\.Module"):
        permute(given, X)  # type: ignore[type-var]


def test_inputs_and_patterns_that_do_not_fit_are_refused() -> None:
    """By the errors of trace and pattern; nothing has changed then."""
    model = small()
    before = state_of(model)
    with pytest.raises(TraceError, match="forward raised"):
        permute(model, torch.rand(3, 2, 5))
    with pytest.raises(SpikeNMError, match="pattern"):
        permute(model, X, "4:2")
    with pytest.raises(PlanError, match="positive time"):
        permute(model, X, seconds=0)
    assert unchanged(model, before)


def test_tensors_that_share_memory_stay_with_a_reason() -> None:
    """A weight that is a view of another, and one whose rows are the same memory."""
    model = small()
    model[4].weight = nn.Parameter(model[2].weight.data)
    found = plan_permutation(model, X)
    assert not found.moved
    assert any("shares its memory with" in entry.reason for entry in found.groups)
    model = small()
    model[4].bias = nn.Parameter(torch.zeros(1).expand(16))
    reasons = [e.reason for e in plan_permutation(model, X).groups]
    assert any("is expanded" in reason for reason in reasons)


def test_tied_modules_stay_with_a_reason() -> None:
    """One parameter of two layers would have to fit both."""
    model = small()
    model[4].weight = model[2].weight
    found = plan_permutation(model, X)
    assert not found.moved
    assert any("share" in entry.reason for entry in found.groups)


def test_weights_in_any_memory_order_are_permuted() -> None:
    """Transposed storage, channels-last: values move, memory order and identity stay."""
    model, plain = small(), small()
    for layer in (0, 2, 4):
        model[layer].weight = nn.Parameter(model[layer].weight.data.T.contiguous().T)
    parameter, strides = model[2].weight, model[2].weight.stride()
    reference = plain(X)
    permute(model, X)
    assert model[2].weight is parameter
    assert parameter.stride() == strides
    assert not torch.equal(parameter, plain[2].weight)
    torch.testing.assert_close(model(X), reference)


def test_opaque_operations_freeze_their_channels_only() -> None:
    """An operation that depends on the order of its channels keeps them where they are."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.d, self.lif = nn.Linear(16, 2), SequenceLIF()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cumsum(self.lif(self.a(x)), dim=-1)
            return self.d(self.lif(self.c(self.lif(self.b(x)))))

    torch.manual_seed(0)
    model = Net().eval()
    reference = model(X)
    found = plan_permutation(model, X)
    assert [entry.layers for entry in found.moved] == [("c",)]
    assert any("no rule for cumsum" in entry.reason for entry in found.groups)
    torch.testing.assert_close(apply_permutation(model, found)(X), reference)


def test_a_failure_half_way_leaves_the_model_as_it_was() -> None:
    """A neuron that cannot be reset, at the very end: all groups are taken back."""

    class Stubborn(SequenceLIF):
        def reset(self) -> None:
            raise RuntimeError("no reset today")

    model = small()
    before = state_of(model)
    found = plan_permutation(model, X)
    model[5] = Stubborn()
    with pytest.raises(RuntimeError, match="no reset today"):
        apply_permutation(model, found)
    assert unchanged(model, before)


def test_orders_that_are_none_are_refused() -> None:
    """A permutation edited by hand, before anything has moved."""
    model = small()
    before = state_of(model)
    found = plan_permutation(model, X)
    first, second = found.moved
    broken = replace(second, order=torch.tensor([3] * 16))
    with pytest.raises(PlanError, match="not an order of its 16 channels"):
        apply_permutation(model, Permutation(found.model, (first, broken)))
    assert unchanged(model, before)


def test_a_permutation_of_another_model_is_refused() -> None:
    """Names or sizes that do not fit are found before anything moves."""
    found = plan_permutation(small(), X)
    other = nn.Sequential(nn.Linear(6, 8), SequenceLIF(), nn.Linear(8, 4))
    before = state_of(other)
    with pytest.raises(PlanError, match="planned for another model"):
        apply_permutation(other, found)
    assert unchanged(other, before)


def test_the_callback_may_stop_it_and_nothing_has_moved() -> None:
    """Progress rises to its end; an exception from it comes out before any change."""
    model = small()
    before = state_of(model)
    shares: list[float] = []
    plan_permutation(model, X, progress=shares.append)
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute(model, X, progress=stop)
    assert unchanged(model, before)


def test_sparsify_permutes_first_if_asked() -> None:
    """The mask by magnitude then keeps what the permutation found; without examples it cannot."""
    plain = spikenm_fx.sparsify(small(), method="magnitude", example_inputs=X)
    model = spikenm_fx.sparsify(small(), method="magnitude", example_inputs=X, permute=True)
    spikenm_fx.fold(plain)
    spikenm_fx.fold(model)
    kept, kept_plain = (
        sum(float(m[i].weight.detach().abs().sum()) for i in (2, 4)) for m in (model, plain)
    )
    assert kept > kept_plain
    before = state_of(fresh := small())
    with pytest.raises(PlanError, match="needs example_inputs"):
        spikenm_fx.sparsify(fresh, method="magnitude", permute=True)
    assert unchanged(fresh, before)
