# SPDX-License-Identifier: Apache-2.0
"""Every method, by name, keeps the invariants of the default one."""

import copy
import io

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, Case, batches, cases, most_nonzero, network
from torch import nn

import spikenm_fx
from spikenm_fx.errors import CheckpointError, PatternError
from spikenm_fx.masks.methods import METHODS, kept
from spikenm_fx.masks.methods.regrow import Regrow
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.pattern import BlockView

NEEDS_NEURONS = {"activity"}  # whose rules are known, norms and examples: tests/test_activity.py
GRADUAL = {"cyclical"}  # N comes down in a run: tests/test_cyclical_regrow.py
ALL = sorted(set(METHODS) - NEEDS_NEURONS)
SPARSE = sorted(set(ALL) - {"dense"})
FITTING = {"regrow": Regrow(patience=1)}  # to runs of a few steps


def sparse(method, **options):
    method = FITTING.get(method, method) if isinstance(method, str) else method
    return spikenm_fx.sparsify(network(), "2:4", method=method, rules=ALL_LAYERS, **options)


def train(model, optimizer, data):
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def used(model) -> int:
    """The largest count of non-zeros in a block of four."""
    return max(most_nonzero(model[i].weight, spikenm_fx.NM(2, 4)) for i in (0, 2, 4))


@pytest.mark.parametrize("method", [*sorted({*SPARSE} - {"spikenm"} - GRADUAL), SpikeNM(fade=0.0)])
def test_training_and_folding(method):
    """Trains with N:M weights throughout, folds bit-identically, and verifies."""
    model = sparse(method, total_steps=8)
    before = model[2].weight_dense.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x in batches(8):
        train(model, optimizer, [x])
        assert used(model) == 2
        assert used(model.eval()) == 2
        model.train()
    assert spikenm_fx.progress(model).step == 8
    assert not torch.equal(before, model[2].weight_dense)
    x = batches(1)[0]
    scores = model.eval()(x)
    assert spikenm_fx.verify(model).valid
    assert torch.equal(spikenm_fx.fold(model)(x), scores)
    assert spikenm_fx.verify(model, dict.fromkeys("024", "2:4")).valid
    network().load_state_dict(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("stop", [0, 3, 5])
def test_resuming_is_bit_exact(method, stop):
    """A run that was stopped and resumed from disk ends with the same bits."""
    data = batches(6)
    whole = sparse(method, total_steps=6)
    train(whole, torch.optim.Adam(whole.parameters(), lr=0.01), data)
    first = sparse(method, total_steps=6)
    optimizer = torch.optim.Adam(first.parameters(), lr=0.01)
    train(first, optimizer, data[:stop])
    buffer = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    model_state, optimizer_state = torch.load(buffer, weights_only=True)
    second = sparse(method, total_steps=6)
    optimizer = torch.optim.Adam(second.parameters(), lr=0.01)
    second.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    train(second, optimizer, data[stop:])
    expected = whole.state_dict()
    assert second.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in second.state_dict().items())


STRIDED = Case(
    *("conv1d", spikenm_fx.NM(2, 4), 4, 1, 2, 2, 1, 1, False, torch.float32),
    *("zeros", 0, 0),
)
"""Blocks of a weight of which rows do not lie in a row of memory."""


@example(STRIDED, "uticket")
@given(cases(most=8), st.sampled_from(SPARSE))
def test_every_layer_kind(case, method):
    """In every layer kind and dtype, padded or not, the weight is N:M in both modes."""
    try:
        model = spikenm_fx.sparsify(case.model(), case.nm, method=method, remainder="pad")
    except PatternError:
        assert method == "maskllm"
        return
    groups = getattr(model[0], "groups", 1)
    for mode in (True, False):
        weight = model.train(mode)[0].weight
        most = most_nonzero(weight, case.nm, transposed=case.transposed, groups=groups)
        assert most <= case.nm.keep
    clone = copy.deepcopy(model)
    assert torch.equal(clone[0].weight, model[0].weight)
    dense = copy.deepcopy(case).model()
    model.load_state_dict(dense.state_dict())
    dense.load_state_dict(spikenm_fx.dense_state_dict(model))
    assert torch.equal(dense[0].weight, model[0].weight)


@pytest.mark.parametrize("method", SPARSE)
def test_checkpoints_of_other_methods_are_refused(method):
    """Where the scores do not fit, loading is refused and the model untouched."""
    model = sparse("maskllm" if method != "maskllm" else "spikenm")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError):
        model.load_state_dict(sparse(method, seed=3).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_dense_is_dense():
    """The dense baseline changes no weight and trains like the plain model."""
    model, plain = sparse("dense"), network()
    for m in (model, plain):
        train(m, torch.optim.SGD(m.parameters(), lr=0.01), batches(3))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not spikenm_fx.verify(model).layers[0].violations


@pytest.mark.parametrize("method", ["srste", "spikenm"])
def test_decay_is_added_once_per_step(method):
    """However many backward passes accumulate, what was not kept decays once per step."""
    x = torch.randn(6, 8)

    def gradient(passes: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = spikenm_fx.sparsify(nn.Sequential(nn.Linear(8, 4)), method=method)
        for part in x.split(6 // passes):
            model(part).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()  # what it sees has the decay in it
        return model[0].weight_dense.grad

    torch.testing.assert_close(gradient(3), gradient(1))


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    channels_last=st.tuples(st.booleans(), st.booleans()),
    undrawn=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 99),
)
def test_kept_equals_where(dtype, channels_last, undrawn, seed):
    """Bit by bit and in the weight's memory format, with NaN, infinity, denormals and -0 masked."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 4, 3, 3, generator=generator).to(dtype)
    odd = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).smallest_normal / 4]
    )
    weight.view(-1)[:5] = odd.to(dtype)
    mask = torch.rand(weight.shape, generator=generator) < 0.5
    formats = [torch.channels_last if last else torch.contiguous_format for last in channels_last]
    weight, mask = (
        weight.contiguous(memory_format=formats[0]),
        mask.contiguous(memory_format=formats[1]),
    )
    found = kept(weight, mask, undrawn)
    assert found.stride() == weight.stride()
    other = weight * undrawn if undrawn else torch.zeros_like(weight)
    torch.testing.assert_close(
        found, torch.where(mask, weight, other), rtol=0, atol=0, equal_nan=True
    )


@given(cases(dtypes=(torch.float32,)))
def test_the_prior_is_the_magnitude_over_its_blocks_mean(case):
    """Each logit rises by prior * spread * |W| / mean of its block: a loop over blocks agrees.

    Read off the final mask, which keeps the N largest of what rises.
    """
    model = spikenm_fx.sparsify(
        case.model(), case.nm, method=SpikeNM(prior=2.0, std=0.5, rescale=False), remainder="pad"
    ).eval()
    layer = model[0]
    weight, pi = layer.weight_dense.detach().double(), layer.weight_logits.detach().double()
    groups, of = getattr(layer, "groups", 1), case.nm.of
    spread = float((pi - pi.mean(1, keepdim=True)).square().mean().sqrt()) if pi.numel() else 0.0
    used = layer.weight.detach() != 0
    view = BlockView(case.nm, tuple(weight.shape), case.transposed, groups)
    blocks, kept_blocks = view.to_blocks(weight.abs()), view.to_blocks(used)
    present = view.present()
    there = torch.ones_like(pi, dtype=torch.bool) if present is None else present.expand(pi.shape)
    for lead in range(pi.shape[0]):
        for inner in range(pi.shape[2]):
            real = there[lead, :, inner]
            size = blocks[lead, :, inner][real]
            mean = float(size.mean()) if len(size) else 0.0
            rise = 2.0 * spread * size / mean if mean else torch.zeros_like(size)
            raised = pi[lead, :, inner][real] + rise
            keeps = kept_blocks[lead, :, inner][real] | (size == 0)
            ranked = raised.sort(descending=True)
            count = min(case.nm.keep, len(size))
            if count < len(size) and ranked.values[count - 1] - ranked.values[count] < 1e-4:
                continue  # rounding may decide
            assert keeps[ranked.indices[:count]].all()
            assert not (keeps & (size != 0))[ranked.indices[count:]].any()
    assert pi.shape[1] == of


def final_masks(model) -> list[torch.Tensor]:
    """Those of evaluation."""
    found = [model.eval()[i].weight.detach() != 0 for i in (0, 2, 4)]
    model.train()
    return found


def grow_the_pruned(model) -> None:
    """Make the weights that the final mask prunes the largest ones of their blocks."""
    with torch.no_grad():
        for i, kept_now in zip((0, 2, 4), final_masks(model), strict=True):
            model[i].weight_dense[~kept_now] = 10.0


def test_the_prior_moves_with_the_weights_until_the_freeze():
    """Masks follow weights that grow; from the freeze on the logits hold what was chosen then."""
    model = sparse("spikenm", total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, batches(4))
    before = final_masks(model)
    grow_the_pruned(model)
    assert not any(map(torch.equal, before, final_masks(model)))
    train(model, optimizer, batches(5))
    at_freeze = [model[i].weight.detach() != 0 for i in (0, 2, 4)]
    assert all(map(torch.equal, final_masks(model), at_freeze))
    again = sparse("spikenm", total_steps=10)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    for each in (model, again):
        grow_the_pruned(each)
        assert all(map(torch.equal, final_masks(each), at_freeze))


def test_without_a_prior_only_logits_decide():
    """As in the paper: however large a weight has grown, its logit alone chooses it."""
    model = sparse(SpikeNM(prior=0.0))
    before = final_masks(model)
    grow_the_pruned(model)
    assert all(map(torch.equal, before, final_masks(model)))
