# SPDX-License-Identifier: Apache-2.0
"""Invariant 2: folding changes no output in evaluation mode and leaves no trace of us."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import ALL_LAYERS, Case, batches, cases, most_nonzero, network
from torch import nn

import spikenm_fx
from spikenm_fx.errors import PlanError


def traces(model: nn.Module) -> list[str]:
    """Everything of ours that is still attached to a model: attributes, classes, hooks."""
    found = []
    for name, module in model.named_modules():
        if type(module).__module__.startswith("spikenm_fx"):
            found.append(f"{name}: class {type(module)}")
        for attribute, value in vars(module).items():
            inner = list(value.values()) if isinstance(value, dict) else [value]
            for thing in inner:
                thing = getattr(thing, "hook", thing)
                origin = getattr(thing, "__module__", None) or type(thing).__module__
                if str(origin).startswith("spikenm_fx") and not isinstance(thing, nn.Module):
                    found.append(f"{name}.{attribute}: {thing}")
            if attribute.startswith("_nm") or (isinstance(value, dict) and "_nm_mask" in value):
                found.append(f"{name}.{attribute}")
    found += [key for key in model.state_dict() if "logits" in key or "_nm" in key]
    return found


def train(model: nn.Module, case: Case, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(case.inputs()).square().sum().backward()
        optimizer.step()


@given(cases(), st.integers(0, 2))
def test_outputs_stay_bit_identical(case, steps):
    """After some training, the evaluated outputs before and after folding are the same bits."""
    model = spikenm_fx.sparsify(case.model(), case.nm, remainder="pad")
    try:
        train(model, case, steps)
        before = model.eval()(case.inputs())
    except (RuntimeError, NotImplementedError):
        assume(False)
    used = model[0].weight.detach().clone()
    assert spikenm_fx.fold(model) is model
    after = model(case.inputs())
    assert before.equal(after) or (before.isnan() == after.isnan()).all()
    assert torch.equal(model[0].weight, used)
    groups = getattr(model[0], "groups", 1)
    most = most_nonzero(model[0].weight, case.nm, transposed=case.transposed, groups=groups)
    assert most <= case.nm.keep


@given(cases())
def test_nothing_of_us_is_left(case):
    """Classes, keys, parameters, hooks and attributes are those of the model before sparsify."""
    model = case.model()
    before = {
        "keys": list(model.state_dict()),
        "classes": [type(m) for m in model.modules()],
        "vars": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._load_state_dict_pre_hooks) for m in model.modules()],
        "parameters": [id(p) for p in model.parameters()],
    }
    spikenm_fx.sparsify(model, case.nm, remainder="pad")
    assert traces(model)
    spikenm_fx.fold(model)
    assert before == {
        "keys": list(model.state_dict()),
        "classes": [type(m) for m in model.modules()],
        "vars": [sorted(vars(m)) for m in model.modules()],
        "hooks": [len(m._load_state_dict_pre_hooks) for m in model.modules()],
        "parameters": [id(p) for p in model.parameters()],
    }
    assert not traces(model)
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_fold_as_cleanly(how):
    """The hook of a copied model is found and removed as well."""
    import pickle

    model = spikenm_fx.sparsify(network())
    model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert not traces(spikenm_fx.fold(model))


def test_channels_last_stays_bit_identical():
    """Folding keeps the memory format, so that the same convolution kernel runs."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1))
    model = spikenm_fx.sparsify(model).to(memory_format=torch.channels_last).eval()
    x = torch.rand(2, 3, 12, 12).to(memory_format=torch.channels_last)
    before = model(x)
    assert torch.equal(before, spikenm_fx.fold(model)(x))
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_folded_models_are_ordinary():
    """A folded model trains, copies, loads strictly and can be made sparse again."""
    model = spikenm_fx.fold(spikenm_fx.sparsify(network()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(batches(1)[0]).sum().backward()
    optimizer.step()
    network().load_state_dict(model.state_dict())
    spikenm_fx.sparsify(model, "1:4", rules=ALL_LAYERS)
    spikenm_fx.fold(model)
    assert spikenm_fx.verify(model, {"0": "1:4", "2": "1:4", "4": "1:4"}).valid


def test_the_optimizer_keeps_working_on_the_same_parameters():
    """Parameters keep their identity, so optimizer state built before folding still fits."""
    model = spikenm_fx.sparsify(network())
    optimizer = torch.optim.Adam(model.parameters())
    model(batches(1)[0]).square().sum().backward()
    optimizer.step()
    dense = model[2].weight_dense
    spikenm_fx.fold(model)
    assert model[2].weight is dense
    assert dense in optimizer.state


def test_folding_a_dense_model_is_an_error():
    """Fold of a model without masks, or folding twice, says what to do and changes nothing."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(PlanError, match=r"nothing to fold.*sparsify"):
            spikenm_fx.fold(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    spikenm_fx.fold(spikenm_fx.sparsify(model))
    with pytest.raises(PlanError, match="folded before"):
        spikenm_fx.fold(model)


def test_no_cache_keeps_a_model_alive():
    """Sparse and folded models are freed when the last reference goes."""
    model = spikenm_fx.sparsify(network())
    out = model(batches(1)[0])
    model.eval()(batches(1)[0])
    alive = weakref.ref(model[2])
    del model
    gc.collect()
    assert alive() is None, "an output keeps the graph, not the layers"
    del out


def test_shared_subclass_layers_get_their_own_class_back():
    """Layers of a user's subclass come back as that subclass, with their attributes."""

    class Mine(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.note = "kept"

    model = nn.Sequential(nn.Linear(8, 8), Mine(), nn.Linear(8, 2))
    spikenm_fx.fold(spikenm_fx.sparsify(model))
    assert type(model[1]) is Mine
    assert model[1].note == "kept"
