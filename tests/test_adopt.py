# SPDX-License-Identifier: Apache-2.0
"""Masks from elsewhere: taken over as they are, trained on, folded and packed; or refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases
from torch import nn
from torch.nn.utils import prune

import spikenm_fx
from spikenm_fx import NM, Rule, adopt
from spikenm_fx.errors import PlanError
from spikenm_fx.export import PackedBits
from spikenm_fx.export.adopt import ASP_MASK, ASP_PRUNED


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)
    )


def sparse(nm: str = "2:4") -> nn.Module:
    """A checkpoint of anybody's: N:M by its zeros, the head dense."""
    rules = [Rule("5", action="keep_dense"), Rule("re:.*")]
    return spikenm_fx.fold(spikenm_fx.sparsify(dense(), nm, rules=rules, method="magnitude"))


def mask_of(weight: torch.Tensor) -> torch.Tensor:
    """Two of four input channels at random, whatever the weight holds."""
    order = torch.rand_like(weight.movedim(1, -1).unflatten(-1, (-1, 4))).argsort(-1).argsort(-1)
    return (order < 2).flatten(-2).movedim(-1, 1)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(torch.randn(4, 4, 4, 4)).square().mean().backward()
        optimizer.step()


def test_zeros_become_the_masks() -> None:
    """Outputs stay; zeros stay zeros while the rest learns; fold and pack as usual."""
    model = dense()
    model.load_state_dict(sparse().state_dict())
    x = torch.randn(2, 4, 4, 4)
    before, zeros = model(x).detach(), {i: model[i].weight == 0 for i in (0, 3)}
    identities = [id(p) for p in model.parameters()]
    assert adopt(model, "2:4") is model
    assert torch.equal(model.eval()(x), before)
    train(model)
    assert [i for i in identities if i in {id(p) for p in model.parameters()}] == identities
    spikenm_fx.fold(model.eval())
    assert spikenm_fx.verify(model, {"0": "2:4", "3": "2:4"})
    assert all(torch.equal(model[i].weight == 0, zeros[i]) for i in zeros)
    assert not bool((model[5].weight == 0).any())
    assert not torch.equal(model(x), before)
    engine = spikenm_fx.pack(model, x)
    assert torch.allclose(engine(x), model(x), atol=1e-5)


def test_kept_weights_that_are_zero_learn_on() -> None:
    """A mask says more than its weight's zeros: what it keeps may be zero now."""
    model = dense()
    mask = mask_of(model[3].weight)
    model[3].weight.data.zero_()
    adopt(model, "2:4", masks={"3": mask})
    train(model)
    learnt = spikenm_fx.fold(model.eval())[3].weight != 0
    assert not bool((learnt & ~mask).any())
    assert int(learnt.sum()) > int(mask.sum()) / 3  # inputs that are always 0 teach nothing


def test_a_checkpoint_of_adopted_masks_resumes() -> None:
    """Masks come back from the sparse checkpoint, not from the zeros of the moment."""
    model = dense()
    model.load_state_dict(sparse().state_dict())
    adopt(model)
    train(model)
    other = dense()
    other.load_state_dict(sparse().state_dict())
    adopt(other).load_state_dict(copy.deepcopy(model.state_dict()))
    for _ in range(2):
        torch.manual_seed(1)
        train(model, 1)
        torch.manual_seed(1)
        train(other, 1)
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(model.eval()(x), other.eval()(x))


@given(cases(dtypes=(torch.float32,)))
def test_every_kind_of_layer(case) -> None:
    """Zeros of Linear, Conv and ConvTranspose of any groups and remainders come back as masks."""
    if case.nm.keep == case.nm.of or case.channels < case.nm.of:
        return
    model = spikenm_fx.fold(
        spikenm_fx.sparsify(case.model(), case.nm, remainder="pad", method="magnitude")
    )
    weight = model[0].weight.detach().clone()
    if not bool((weight == 0).any()):
        return
    adopt(model, case.nm)
    assert spikenm_fx.verify(model.eval(), {"0": case.nm})
    assert torch.equal(spikenm_fx.fold(model)[0].weight, weight)


def test_masks_of_torch_prune() -> None:
    """Its hook and buffer go, the parameter keeps its identity, other layers their pruning."""
    model = dense()
    mask, parameter = mask_of(model[3].weight), model[3].weight
    prune.custom_from_mask(model[3], "weight", mask)
    x = torch.randn(2, 4, 4, 4)
    before = model(x).detach()
    adopt(model, "2:4")
    assert model[3]._parameters["weight"] is parameter
    assert not prune.is_pruned(model)
    assert torch.equal(model.eval()(x), before)
    assert "3.weight_mask" not in model.state_dict()


def test_buffers_of_asp() -> None:
    """Masks lie beside the weights, under its names; they hold before the weights do."""
    model = dense()
    for index in (0, 3):
        layer = model[index]
        layer.register_buffer(ASP_MASK, mask_of(layer.weight))
        layer.register_buffer(ASP_PRUNED, torch.zeros(1))
    masks = {i: model[i]._buffers[ASP_MASK].clone() for i in (0, 3)}
    adopt(model, "2:4")
    assert not [key for key in model.state_dict() if "mma" in key]
    folded = spikenm_fx.fold(model.eval())
    assert all(torch.equal(folded[i].weight != 0, masks[i]) for i in masks)


@given(st.sampled_from(["big", "little"]), st.booleans())
def test_packed_bits(first: str, turned: bool) -> None:
    """One bit a weight, in either order of bits, of weights stored either way round."""
    model = dense()
    mask = mask_of(model[3].weight)
    stored = mask.T.contiguous() if turned else mask
    bits = torch.from_numpy(np.packbits(stored.numpy().reshape(-1), bitorder=first))
    adopt(model, "2:4", masks={"3": PackedBits(bits, first)}, mask_axis=0 if turned else 1)
    assert torch.equal(spikenm_fx.fold(model.eval())[3].weight != 0, mask)


def test_what_n_means_is_said() -> None:
    """1:4 of somebody who counts zeros is our 3:4."""
    model = dense()
    model.load_state_dict(sparse("3:4").state_dict())
    with pytest.raises(PlanError, match=r"no weight of Sequential is 1:4.*n_means"):
        adopt(model, "1:4")
    adopt(model, "1:4", n_means="zeros")
    assert {str(m.view.nm) for _, _, m in spikenm_fx.masks.attach.masked_weights(model)} == {"3:4"}
    with pytest.raises(PlanError, match="say 'kept' or 'zeros'"):
        adopt(dense(), n_means="pruned")


def test_masks_may_learn_on() -> None:
    """With a method they are where learning starts."""
    model = dense()
    model.load_state_dict(sparse().state_dict())
    adopt(model, "2:4", method="spikenm", total_steps=10)
    assert spikenm_fx.progress(model).step == 0
    train(model)
    assert spikenm_fx.progress(model).step == 3
    assert spikenm_fx.verify(model.eval(), {"0": NM(2, 4), "3": NM(2, 4)})


def refused(model: nn.Module, words: str, **options: object) -> None:
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(PlanError, match=words):
        adopt(model, "2:4", **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [type(m) for m in model.modules()] == kinds


def test_what_cannot_be_adopted() -> None:
    """Dense models, masks along another axis, of another shape, of no layer: nothing changes."""
    refused(dense(), "no weight of Sequential is 2:4 by its zeros")
    rows = torch.zeros(16, 32, dtype=torch.bool)
    rows[::2] = True
    refused(dense(), "it is 2:4 along output channels", masks={"3": rows})
    refused(dense(), "say mask_axis=0", masks={"3": torch.ones(32, 16)})
    refused(dense(), r"'4'.*no Linear or Conv", masks={"4": rows})
    refused(dense(), "other values than 0 and 1", masks={"3": torch.full((16, 32), 0.5)})
    refused(dense(), "fill 64 bytes", masks={"3": PackedBits(torch.zeros(3, dtype=torch.uint8))})
    pruned = dense()
    prune.l1_unstructured(pruned[3], "weight", 0.3)
    refused(pruned, r"torch.nn.utils.prune keeps more than 2 of 4")
    broken = sparse()
    broken[3].weight.data[broken[3].weight.data > 0] = float("inf")
    refused(broken, "not finite")
    refused(spikenm_fx.sparsify(dense()), "is sparse already")
    with pytest.raises(PlanError, match="needs an nn"):
        adopt({"a.weight": torch.ones(4, 4)})
