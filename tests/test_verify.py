# SPDX-License-Identifier: Apache-2.0
"""The checker finds every planted violation and calls nothing valid that is dense."""

import inspect
import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, Case, cases, most_nonzero, network
from torch import nn

import spikenm_fx
from spikenm_fx import NM, verify
from spikenm_fx import verify as verify_function
from spikenm_fx.errors import PatternError, PlanError, VerificationError


def planted(case: Case, seed: int) -> tuple[nn.Module, int]:
    """A folded model in which one block was filled up, and how many non-zeros that block has."""
    model = spikenm_fx.fold(spikenm_fx.sparsify(case.model(), case.nm, remainder="pad"))
    weight = model[0].weight.data
    position = torch.randint(weight.numel(), (1,), generator=torch.Generator().manual_seed(seed))
    index = list(torch.unravel_index(position[0], weight.shape))
    axis = 0 if case.transposed else 1
    group, channel = divmod(int(index[axis]), case.channels if case.transposed else 10**9)
    start = channel // case.nm.of * case.nm.of
    end = min(start + case.nm.of, case.channels)
    first = group * case.channels if case.transposed else 0
    for c in range(start, end):
        index[axis] = first + c
        weight[tuple(index)] = 1.0
    return model, end - start


@given(cases(), st.integers(0, 999))
def test_finds_a_planted_violation(case, seed):
    """One block with too many non-zeros, anywhere in a layer of any kind, is found and counted."""
    model, filled = planted(case, seed)
    assume(filled > case.nm.keep)
    result = verify(model, {"0": case.nm})
    (layer,) = result.layers
    assert not result.valid
    assert layer.violations == 1
    assert layer.first[0][-1] == filled
    groups = getattr(model[0], "groups", 1)
    oracle = most_nonzero(model[0].weight, case.nm, transposed=case.transposed, groups=groups)
    assert oracle == filled
    with pytest.raises(VerificationError, match="VIOLATED in 1 of"):
        result.raise_if_invalid()
    assert json.loads(json.dumps(result.to_dict()))["valid"] is False


@given(cases())
def test_sparse_and_folded_models_and_their_checkpoints_are_valid(case):
    """What sparsify made is valid as a model, as a checkpoint and folded, in every layer kind."""
    model = spikenm_fx.sparsify(case.model(), case.nm, remainder="pad")
    for thing in (model, model.eval(), model.state_dict()):
        result = verify(thing)
        assert result.layers[0].required == case.nm
        assert not result.layers[0].violations
        assert result.valid
    result = verify(spikenm_fx.fold(model), {"0": case.nm})
    assert result.valid
    result.raise_if_invalid()


@given(cases(), st.integers(0, 999))
def test_violations_in_checkpoints_are_found(case, seed):
    """A state dict of ours whose masked weight was tampered with is not valid."""
    broken, filled = planted(case, seed)
    assume(filled > case.nm.keep)
    state = spikenm_fx.sparsify(case.model(), case.nm, remainder="pad").state_dict()
    state["0.weight"] = broken[0].weight.detach()
    assert verify(state).layers[0].violations == 1


@given(cases(dtypes=(torch.float32,)))
def test_dense_weights_are_never_valid(case):
    """A dense model or checkpoint is not valid, whatever is asked of it."""
    assume(case.nm.keep < min(case.nm.of, case.channels))
    model = case.model()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    for thing in (model, model.state_dict()):
        assert not verify(thing).valid
        with pytest.raises(VerificationError):
            verify(thing).raise_if_invalid()
    assert not verify(model, {"0": case.nm}).valid


def test_zero_initialised_layers_do_not_make_a_dense_model_valid():
    """A layer of zeros, as residual branches start, is no learnt pattern."""
    model = network()
    nn.init.zeros_(model[2].weight)
    assert verify(model).layers[1].found is None
    assert not verify(model).valid


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-45])
def test_nan_and_denormals_count_as_non_zero(value):
    """NaN, infinity and the smallest number are non-zeros."""
    weight = torch.zeros(8, 8)
    weight[:, :3] = value
    result = verify({"a.weight": weight}, {"a": "2:4"})
    assert result.layers[0].violations == 8
    assert result.layers[0].density == 3 / 8


def test_it_does_not_ask_the_masks():
    """The checker counts by itself: masks that lie are found out."""
    source = inspect.getsource(inspect.getmodule(verify_function))
    assert "spikenm_fx.masks" not in source
    assert "BlockView" not in source

    class Lying(type(spikenm_fx.masks.methods.method_named("spikenm"))):
        def final_mask(self, weight, scores, draw):
            return torch.ones_like(weight, dtype=torch.bool)

    model = spikenm_fx.sparsify(network(), method=Lying()).eval()
    assert not verify(model).valid


def test_what_is_required():
    """One pattern, a mapping, a plan: what each requires of which layer."""
    model = network()
    decided = spikenm_fx.plan(model, "2:4")
    spikenm_fx.fold(spikenm_fx.sparsify(model, "2:4"))
    for required in ("2:4", (2, 4), NM(2, 4), {"2": "2:4"}, decided):
        result = verify(model, required)
        assert result.valid
        assert [layer.required for layer in result.layers] == [None, NM(2, 4), None]
    assert [layer.found for layer in verify(model).layers] == [None, NM(2, 4), None]
    assert not verify(model, "1:4").valid
    assert not verify(model, {"0": "2:4"}).valid
    with pytest.raises(PlanError, match="'nowhere'"):
        verify(model, {"nowhere": "2:4"})
    with pytest.raises(PatternError):
        verify(model, 124)


@pytest.mark.filterwarnings("ignore:the model is evaluated at step")
def test_weights_of_a_fade_are_counted_as_they_are_used():
    """In training mode they are not N:M yet; the error names the mode in which they are."""
    model = spikenm_fx.sparsify(network(), "1:4", total_steps=20)
    with pytest.raises(VerificationError, match=r"evaluation mode \(model.eval\(\)\)"):
        verify(model).raise_if_invalid()
    assert verify(model.eval()).valid


def test_checking_changes_nothing():
    """Buffers that move with each access (spectral_norm), RNG, mode and masks stay as they are."""
    model = network().train()
    nn.utils.parametrizations.spectral_norm(model[0])
    spikenm_fx.sparsify(model)
    model(torch.randn(2, 8)).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    verify(model)
    verify(model, {"0": "2:4"})
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert model.training


def test_lazy_and_empty_layers_are_passed_over():
    """Layers without a usable weight do not stop the check."""
    model = nn.Sequential(nn.LazyLinear(4), spikenm_fx.sparsify(network()), nn.Linear(0, 4))
    assert verify(model).valid


def test_the_text_names_layers_and_counts():
    """Printed, a verification says valid or not, layer by layer."""
    model = spikenm_fx.sparsify(network(), rules=ALL_LAYERS)
    text = str(verify(model))
    assert text.startswith("valid: 3 weights")
    assert "2:4 holds in all 64 blocks" in text


def test_a_verification_is_true_where_it_is_valid():
    """`assert verify(model, '2:4')` is a check: a dense model fails it."""
    model = network()
    assert not verify(model, "2:4")
    assert not verify(model)
    spikenm_fx.fold(spikenm_fx.sparsify(model, "2:4"))
    assert verify(model, "2:4")


def test_weights_that_are_no_numbers_are_named():
    """NaN counts as non-zero, and the text says that it is there."""
    model = spikenm_fx.fold(spikenm_fx.sparsify(network(), "2:4"))
    assert "NaN" not in str(verify(model))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    result = verify(model)
    assert [layer.not_finite for layer in result.layers] == [1, 0, 0]
    assert "NaN or infinite weights in 0" in str(result)
    assert "1 weights are NaN or infinite" in str(result.layers[0])
    assert [layer.not_finite for layer in verify(model.state_dict()).layers] == [1, 0, 0]


def test_notebooks_show_the_verdict():
    """A table of all weights below the head line."""
    result = verify(spikenm_fx.sparsify(network(), rules=ALL_LAYERS))
    assert "valid: 3 weights" in result._repr_html_()
    assert result._repr_html_().count("<tr>") == 4
