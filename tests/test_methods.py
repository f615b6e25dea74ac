# SPDX-License-Identifier: Apache-2.0
"""Every method, by name, keeps the invariants of the default one."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, batches, cases, most_nonzero, network
from torch import nn

import spikenm_fx
from spikenm_fx.errors import CheckpointError, PatternError
from spikenm_fx.masks.methods import METHODS, kept
from spikenm_fx.masks.methods.spikenm import SpikeNM

SPARSE = sorted(set(METHODS) - {"dense"})


def sparse(method, **options):
    return spikenm_fx.sparsify(network(), "2:4", method=method, rules=ALL_LAYERS, **options)


def train(model, optimizer, data):
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def used(model) -> int:
    """The largest count of non-zeros in a block of four."""
    return max(most_nonzero(model[i].weight, spikenm_fx.NM(2, 4)) for i in (0, 2, 4))


@pytest.mark.parametrize("method", [*sorted({*SPARSE} - {"spikenm"}), SpikeNM(fade=0.0)])
def test_training_and_folding(method):
    """Trains with N:M weights throughout, folds bit-identically, and verifies."""
    model = sparse(method, total_steps=6)
    before = model[2].weight_dense.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x in batches(8):
        train(model, optimizer, [x])
        assert used(model) == 2
        assert used(model.eval()) == 2
        model.train()
    assert int(model[2].weight_nm[4]) == 8
    assert not torch.equal(before, model[2].weight_dense)
    x = batches(1)[0]
    scores = model.eval()(x)
    assert spikenm_fx.verify(model).valid
    assert torch.equal(spikenm_fx.fold(model)(x), scores)
    assert spikenm_fx.verify(model, dict.fromkeys("024", "2:4")).valid
    network().load_state_dict(model.state_dict())


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("stop", [0, 3, 5])
def test_resuming_is_bit_exact(method, stop):
    """A run that was stopped and resumed from disk ends with the same bits."""
    data = batches(6)
    whole = sparse(method, total_steps=5)
    train(whole, torch.optim.Adam(whole.parameters(), lr=0.01), data)
    first = sparse(method, total_steps=5)
    optimizer = torch.optim.Adam(first.parameters(), lr=0.01)
    train(first, optimizer, data[:stop])
    buffer = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    model_state, optimizer_state = torch.load(buffer, weights_only=True)
    second = sparse(method, total_steps=5)
    optimizer = torch.optim.Adam(second.parameters(), lr=0.01)
    second.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    train(second, optimizer, data[stop:])
    expected = whole.state_dict()
    assert second.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in second.state_dict().items())


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


@given(cases())
def test_the_prior_is_the_magnitude_over_its_blocks_mean(case):
    """Each logit rises by prior * spread * |W| / mean of its block: a loop over blocks agrees."""
    model = spikenm_fx.sparsify(
        case.model(), case.nm, method=SpikeNM(prior=2.0, std=0.5), remainder="pad"
    )
    mask = model[0]._nm_mask
    draw = mask.draw(None)
    pi = mask.scores.detach().double()
    weight = mask.view.to_blocks(mask.dense.detach()).double().abs()
    spread = (pi - pi.mean(1, keepdim=True)).square().mean().sqrt() if pi.numel() else 0.0
    there = torch.ones_like(pi, dtype=torch.bool) if draw.present is None else draw.present
    there = there.expand(pi.shape)
    found = mask.logits(draw).detach().double()
    for lead in range(pi.shape[0]):
        for inner in range(pi.shape[2]):
            real = there[lead, :, inner]
            size = weight[lead, :, inner][real]
            mean = float(size.mean()) if len(size) else 0.0
            rise = 2.0 * spread * size / mean if mean else torch.zeros_like(size)
            expected = pi[lead, :, inner][real] + rise
            torch.testing.assert_close(found[lead, :, inner][real], expected, rtol=1e-3, atol=1e-3)


def grow_the_pruned(model) -> None:
    """Make the weights that the final mask prunes the largest ones of their blocks."""
    with torch.no_grad():
        for i in (0, 2, 4):
            pruned = ~model[i]._nm_mask.mask()
            model[i].weight_dense[pruned] = 10.0


def test_the_prior_moves_with_the_weights_until_the_freeze():
    """Masks follow weights that grow; from the freeze on the logits hold what was chosen then."""
    model = sparse("spikenm", total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, batches(4))
    before = [model[i]._nm_mask.mask() for i in (0, 2, 4)]
    grow_the_pruned(model)
    moved = [model[i]._nm_mask.mask() for i in (0, 2, 4)]
    assert not any(map(torch.equal, before, moved))
    train(model, optimizer, batches(5))
    at_freeze = [model[i].weight.detach() != 0 for i in (0, 2, 4)]
    model.eval()
    assert all(map(torch.equal, [model[i].weight != 0 for i in (0, 2, 4)], at_freeze))
    again = sparse("spikenm", total_steps=10).eval()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    for each in (model, again):
        grow_the_pruned(each)
        frozen = [each[i].weight != 0 for i in (0, 2, 4)]
        assert all(map(torch.equal, frozen, at_freeze))


def test_without_a_prior_only_logits_decide():
    """As in the paper: however large a weight has grown, its logit alone chooses it."""
    model = sparse(SpikeNM(prior=0.0)).eval()
    before = [model[i]._nm_mask.mask() for i in (0, 2, 4)]
    grow_the_pruned(model)
    assert all(map(torch.equal, before, [model[i]._nm_mask.mask() for i in (0, 2, 4)]))
