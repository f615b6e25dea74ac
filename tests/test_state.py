# SPDX-License-Identifier: Apache-2.0
"""Invariant 3: checkpoints go strictly in and out, and a resumed run continues bit by bit."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from strategies import ALL_LAYERS, batches, cases, most_nonzero, network
from torch import nn

import spikenm_fx
from spikenm_fx.errors import CheckpointError, SpikeNMError


def through_disk(state):
    """A state dict as it comes back from a file, loaded with weights_only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def sparse(nm="2:4", **options) -> nn.Module:
    return spikenm_fx.sparsify(network(), nm, rules=ALL_LAYERS, **options)


def train(model, optimizer, data):
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@given(cases())
def test_dense_checkpoints_load_strictly(case):
    """A dense model's checkpoint fits the sparse model strictly, as if loaded before sparsify."""
    dense = case.model().state_dict()
    model = spikenm_fx.sparsify(copy.deepcopy(case).model(), case.nm, remainder="pad")
    given_state = copy.deepcopy(dense)
    result = model.load_state_dict(given_state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert equal(given_state, dense), "the caller's dictionary is left alone"
    other = spikenm_fx.sparsify(case.model(), case.nm, remainder="pad")
    assert torch.equal(model[0].weight_dense, other[0].weight_dense)


@given(cases(), st.integers(0, 2))
def test_sparse_checkpoints_load_strictly(case, seed):
    """A sparse checkpoint fits strictly, through weights_only, and restores everything."""
    source = spikenm_fx.sparsify(case.model(), case.nm, remainder="pad", seed=seed)
    state = source.state_dict()
    state["0.weight_nm"][4] = 17  # as a checkpoint of that step
    source.load_state_dict(state)
    assert spikenm_fx.progress(source).step == 17
    target = spikenm_fx.sparsify(case.model(), case.nm, remainder="pad", seed=5)
    with torch.no_grad():
        target[0].weight_dense.fill_(1)
        target[0].weight_logits.fill_(0)
    target.load_state_dict(through_disk(source.state_dict()), strict=True)
    assert equal(source.state_dict(), target.state_dict())
    for mode in (True, False):
        assert torch.equal(source.train(mode)[0].weight, target.train(mode)[0].weight)


@given(cases())
def test_dense_state_dict_fits_a_plain_model(case):
    """dense_state_dict has the dense keys and gives a plain model the sparse model's outputs."""
    model = spikenm_fx.sparsify(case.model(), case.nm, remainder="pad").eval()
    before = copy.deepcopy(model.state_dict())
    state = spikenm_fx.dense_state_dict(model)
    plain = case.model().eval()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(through_disk(state), strict=True)
    assert torch.equal(plain[0].weight, model[0].weight)
    assert equal(before, model.state_dict())


def test_our_checkpoint_in_a_plain_model_is_masked():
    """strict=False in a plain model gives masked weights, never the dense ones by accident."""
    model, plain = sparse(), network(seed=9)
    result = plain.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    assert {key.rpartition(".")[2] for key in result.unexpected_keys} == {
        "weight_dense",
        "weight_eid",
        "weight_logits",
        "weight_momentum",
        "weight_nm",
        "weight_prior",
    }
    for index in (0, 2, 4):
        assert most_nonzero(plain[index].weight, spikenm_fx.NM(2, 4)) <= 2
        assert torch.equal(plain[index].weight, model.eval()[index].weight)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.filterwarnings("ignore:training goes on past total_steps")
@tries(12)
@given(
    st.integers(0, 9),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([None, 6, 10]),
    st.booleans(),
)
def test_resuming_is_bit_exact(stop, name, total_steps, zeros):
    """Stopped after any step and resumed from disk, a run ends with exactly the same bits.

    With and without a schedule, within its frozen part too, and whatever zero_grad leaves behind.
    """
    data = batches(10)

    def new():
        model = sparse(total_steps=total_steps)
        optimizer = OPTIMIZERS[name](model.parameters())
        if zeros:
            clear = optimizer.zero_grad
            optimizer.zero_grad = lambda: clear(set_to_none=False)
        return model, optimizer

    whole, optimizer = new()
    losses = train(whole, optimizer, data)
    first, optimizer = new()
    head = train(first, optimizer, data[:stop])
    saved = through_disk({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second, optimizer = new()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert head + train(second, optimizer, data[stop:]) == losses
    assert equal(whole.state_dict(), second.state_dict())


@pytest.mark.filterwarnings("ignore:training goes on past total_steps")
def test_saving_does_not_disturb_training():
    """Taking state dicts between all calls of a step changes nothing of the run."""
    runs = []
    for noisy in (False, True):
        model = sparse(total_steps=6)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        for x in batches(8):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if noisy:
                model.state_dict()
            loss.backward()
            if noisy:
                model.state_dict()
                spikenm_fx.dense_state_dict(model)
                copy.deepcopy(model)
            optimizer.step()
            if noisy:
                model.state_dict()
                model.eval()(x)
                model.train()
        runs.append(model.state_dict())
    assert equal(*runs)


@pytest.mark.parametrize("other", ["1:4", "2:8", "4:8", "3:4"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("where", ["root", "layer"])
def test_foreign_patterns_are_refused(other, strict, where):
    """A checkpoint of another pattern is refused with both patterns named, nothing touched."""
    model, state = sparse("2:4"), sparse(other, seed=1).state_dict()
    model(batches(1)[0])
    before = copy.deepcopy(model.state_dict())
    target = model
    if where == "layer":
        target = model[2]
        state = {key[2:]: value for key, value in state.items() if key.startswith("2.")}
    with pytest.raises(CheckpointError, match=f"checkpoint {other}, model 2:4") as caught:
        target.load_state_dict(state, strict=strict)
    assert "2 (16, 16)" in str(caught.value)
    assert equal(before, model.state_dict())


def test_foreign_patterns_are_refused_in_larger_models():
    """Also where the sparse model is a part of a larger one, with the qualified name."""
    model = nn.ModuleDict({"backbone": sparse("2:4")})
    state = {f"backbone.{key}": value for key, value in sparse("1:4").state_dict().items()}
    with pytest.raises(CheckpointError, match=r"backbone\.0 \(16, 8\)"):
        model.load_state_dict(state)


def of_the_previous_release(state):
    """A state dict as the release before wrote it: no prior, no momentum, no length of the run."""
    older = {}
    for key, value in state.items():
        if key.endswith("_nm"):
            value = torch.cat((torch.ones(1, dtype=torch.int64), value[1:7]))
        if not key.endswith(("_prior", "_momentum")):
            older[key] = value
    return older


@pytest.mark.parametrize("total_steps", [None, 10])
@pytest.mark.parametrize("steps", [0, 3, 9])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.filterwarnings("ignore:training goes on past total_steps")
def test_checkpoints_of_the_previous_release_load(total_steps, steps, assign):
    """Strictly, with weights, logits, seed and step; a frozen mask stays, and training goes on."""
    model, source = (sparse(seed=s, total_steps=total_steps) for s in (0, 1))
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), batches(1))  # momentum of its own
    train(source, torch.optim.Adam(source.parameters(), lr=0.01), batches(steps))
    older = of_the_previous_release(source.state_dict())
    keys = set(older)
    model.load_state_dict(through_disk(older), assign=assign)
    assert set(older) == keys
    assert spikenm_fx.progress(model).step == steps
    state = model.state_dict()
    for key, value in older.items():
        if key.endswith(("_dense", "_logits")):
            assert torch.equal(state[key], value), key
        elif key.endswith("_momentum"):
            assert not value.any()
    if spikenm_fx.progress(source).phase == "frozen":
        assert spikenm_fx.progress(model).phase == "frozen"
        assert all(torch.equal(state[k], older[k]) for k in older if k.endswith(".weight"))
    train(model.train(), torch.optim.Adam(model.parameters(), lr=0.01), batches(2))
    assert spikenm_fx.progress(model).step == steps + 2
    spikenm_fx.verify(model).raise_if_invalid()


@pytest.mark.parametrize("key", ["weight_dense", "weight_logits", "weight_nm"])
def test_truncated_checkpoints_are_refused(key):
    """A checkpoint that lost one part of a mask is refused, and nothing of it is loaded."""
    model, state = sparse(), sparse(seed=1).state_dict()
    del state[f"4.{key}"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=rf"4 \(4, 16\): {key} missing.*truncated"):
        model.load_state_dict(state)
    assert equal(before, model.state_dict())


@pytest.mark.parametrize(
    "meta",
    [[], [1], [1, 2, 4], [1, 2, 4, 0, 0], [99, 2, 4, 0, 0, 1, 1], [[1, 2], [4, 0]], "2:4", None],
    ids=str,
)
def test_malformed_pattern_entries_are_refused(meta):
    """Whatever stands where the pattern should: an error of ours, and an untouched model."""
    model, state = sparse(), sparse(seed=1).state_dict()
    state["2.weight_nm"] = torch.tensor(meta) if isinstance(meta, list) else meta
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpikeNMError):
        model.load_state_dict(state)
    assert equal(before, model.state_dict())


def test_nan_in_a_checkpoint_keeps_the_pattern():
    """A diverged run's checkpoint loads for inspection; NaN logits still keep at most N of M."""
    model, state = sparse(), sparse(seed=1).state_dict()
    for key in ("2.weight_dense", "2.weight", "2.weight_logits"):
        state[key] = torch.full_like(state[key], float("nan"))
    model.load_state_dict(state)
    for mode in (True, False):
        assert most_nonzero(model.train(mode)[2].weight, spikenm_fx.NM(2, 4)) == 2
    assert model[2].weight.isnan().any()


@pytest.mark.parametrize("method", ["spikenm", "maskllm", "magnitude"])
def test_dense_checkpoints_restart_fresh_logits_only(method):
    """Before the first step a dense checkpoint's magnitudes become the prior; later logits stay."""
    pretrained = network(seed=5).state_dict()
    model = sparse(method=method)
    fresh = model.eval()[2].weight != 0
    model.load_state_dict(pretrained)
    restarted = model[2].weight_logits.detach().clone()
    assert not torch.equal(model[2].weight != 0, fresh)
    reference = network(seed=5)
    spikenm_fx.sparsify(reference, "2:4", rules=ALL_LAYERS, method=method)
    assert torch.equal(restarted, reference[2].weight_logits)
    assert torch.equal(model[2].weight, reference.eval()[2].weight)
    model.train()
    train(model, torch.optim.Adam(model.parameters(), lr=0.01), batches(2))
    learnt = model[2].weight_logits.detach().clone()
    model.load_state_dict(pretrained)
    assert torch.equal(model[2].weight_logits, learnt)
    assert spikenm_fx.progress(model).step == 2


def test_assign_loads_too():
    """load_state_dict(assign=True) replaces the tensors and keeps masks and values."""
    model, state = sparse(), through_disk(sparse(seed=1).state_dict())
    model.load_state_dict(state, assign=True)
    assert equal(model.state_dict(), state)
    assert most_nonzero(model[2].weight, spikenm_fx.NM(2, 4)) <= 2


@pytest.mark.filterwarnings("ignore:training goes on past total_steps")
def test_assign_loads_frozen_masks_too():
    """Held logits of before are not written over those of a finished run, nor into the caller's."""
    model, other = sparse(total_steps=4), sparse(seed=1, total_steps=4)
    train(other, torch.optim.Adam(other.parameters(), 0.01), batches(5))
    state = through_disk(other.state_dict())
    model.load_state_dict(copy.deepcopy(state), assign=True)
    assert equal(model.state_dict(), state)


def test_the_state_of_a_loop_over_devices_is_plain():
    """The checkpoint holds nothing but tensors under string keys."""
    for key, value in sparse().state_dict().items():
        assert isinstance(key, str)
        assert type(value) is torch.Tensor
