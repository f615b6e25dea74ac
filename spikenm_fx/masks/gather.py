# SPDX-License-Identifier: Apache-2.0
"""Sharded weights: what FSDP2 gathers of them, and what a layer uses while they are gathered.

FSDP2 asks the tensor in which a rank keeps its part of a parameter what to gather
(``fsdp_pre_all_gather``).  Ours hands out the part under its mask, so that what FSDP gathers,
reshards and gathers again is the masked weight: no rank ever has all masks, logits or dense weights
of a layer, and masks cost no communication.  The gradient that FSDP reduces back is that of the
masked weight, of which the optimizer's hooks make all that scores and weights learn from.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spikenm_fx._torch import (
    in_backward,
    is_fsdp_managed,
    local_part,
    no_torch_function,
)
from spikenm_fx.errors import PlanError
from spikenm_fx.masks.keys import LOGITS
from spikenm_fx.masks.methods import kept
from spikenm_fx.masks.shard import blocked, is_sharded, part_of, shard_of, whole_of
from spikenm_fx.state.parameters import is_reading

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from spikenm_fx.masks.layer import MaskedWeight

__all__ = [
    "MaskedPart",
    "adopt",
    "gathered_inside",
    "handed_out",
    "hook",
    "masked_part",
    "mode_of",
    "release",
    "scores_here",
]


class MaskedPart(Tensor):
    """This rank's part of a dense weight, of which FSDP2 gathers what the mask keeps."""

    __torch_function__ = no_torch_function  # operations give plain tensors
    owner: weakref.ref[MaskedWeight]

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """The masked part, in the precision of the forward pass, padded as FSDP pads it.

        Args:
            mesh: over which the parameter is sharded.
            outer_size: of what is gathered.
            outer_stride: of it.
            module: the layer.
            mp_policy: of precision.
        """
        owner = self.owner()
        assert owner is not None
        part = owner.part_to_gather(module.training)
        if mp_policy is not None and mp_policy.param_dtype is not None:
            part = part.to(mp_policy.param_dtype)
        part = part.to(self.device)  # with CPU offload this is a copy on the device
        assert owner.shard is not None
        axis = owner.shard.axis
        size = list(outer_size)
        size[axis] = -(-size[axis] // mesh.size())
        if list(part.shape) != size:
            padded = part.new_zeros(size)
            padded.narrow(axis, 0, part.shape[axis]).copy_(part)
            part = padded
        return (part.contiguous(),), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: Any, *, out: Any = None
    ) -> Any:
        """What was gathered is the parameter already, in the memory where it is.

        Args:
            outputs: one tensor, of all ranks' parts, of the shape that they have together.
            metadata: None.
            param_dtype: of the forward pass.
            out: the parameter, once it exists.
        """
        return None if out is not None else (outputs[0], ())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)


def _carrying(name: str) -> Any:
    method = getattr(Tensor, name)

    def carried(self: MaskedPart, *args: Any, **kwargs: Any) -> Any:
        found = method(self, *args, **kwargs)
        return found if found is self else _as_part(found, self.owner)

    return carried


for _name in ("to", "cpu", "pin_memory", "new_zeros", "narrow"):  # by which FSDP moves and pads
    setattr(MaskedPart, _name, _carrying(_name))


def _as_part(tensor: Tensor, owner: weakref.ref[MaskedWeight]) -> Tensor:
    tensor.__class__ = MaskedPart
    cast("MaskedPart", tensor).owner = owner
    return tensor


@torch.no_grad()
def adopt(weight: MaskedWeight, sharded: DTensor) -> None:
    """The weight's parameter is a DTensor now: cut what belongs to its mask as it is cut.

    Args:
        weight: whose scores, masks and credits are whole, or cut in another way.
        sharded: its parameter, of the same values.

    Raises:
        PlanError: if blocks would lie on two ranks, or its method needs whole weights.
    """
    old, shard = weight.shard, shard_of(weight, sharded)
    device = local_part(sharded).device

    def cut(tensor: Tensor | None, *, scores: bool) -> Tensor | None:
        if tensor is None:
            return None
        if old is not None and scores:
            tensor = blocked(weight.whole, whole_of(old.like_scores(tensor)))
        elif old is not None:
            tensor = whole_of(old.like_weight(tensor))
        part = shard.part_of_scores if scores else shard.part
        return part(tensor).to(device)

    scores = cut(weight.scores, scores=True)
    learnable = weight.scores is not None and weight.scores.requires_grad
    mask = cut(weight.mask, scores=False)
    momentum = cut(weight.momentum, scores=True)
    average = None if weight.guide is None else cut(weight.guide.average, scores=False)
    weight.shard, weight.view = shard, shard.view
    if scores is not None:
        parameter = nn.Parameter(shard.like_scores(scores), requires_grad=learnable)
        for module, key in weight.holders:
            module._parameters[key + LOGITS] = parameter
    prior = weight.prior
    if prior is not None:
        prior.data = prior.data.to(device)
    assert mask is not None
    weight.mask, weight.momentum = mask, momentum
    weight.faded, weight.spread = weight.faded.to(device), weight.spread.to(device)
    if weight.guide is not None:
        weight.guide.average = average
    weight.asked = None
    weight.forget_handed()
    weight.forget_final()


def scores_here(weight: MaskedWeight, stored: Tensor) -> Tensor:
    """This rank's scores ``(lead, K, inner)``, a leaf in the memory of the DTensor ``stored``."""
    part = local_part(stored)
    known = weight.part_of_scores
    if known is None or known[0] is not part:
        leaf = nn.Parameter(blocked(weight.view, part.detach()), requires_grad=stored.requires_grad)
        known = weight.part_of_scores = (part, leaf)
    return known[1]


def hook(weight: MaskedWeight, sharded: Tensor) -> None:
    """Let FSDP ask us what to gather of ``sharded``, a DTensor of the weight's shape."""
    part = local_part(sharded)
    if type(part) is not MaskedPart and is_fsdp_managed(weight.layer):
        _as_part(part, weakref.ref(weight))


def release(weight: MaskedWeight) -> None:
    """Let FSDP gather the parameter itself again."""
    part = local_part(weight.dense)
    if type(part) is MaskedPart:
        part.__class__ = Tensor  # type: ignore[assignment]


def handed_out(weight: MaskedWeight, gathered: Tensor, training: bool) -> Tensor:
    """The weight that the layer uses while FSDP has it gathered: masked already.

    Args:
        weight: whose parameter is gathered.
        gathered: in its place, of the whole shape (a DTensor where it is parallel in tensors, too).
        training: whether the layer trains; FSDP may have gathered it for the other mode.

    Raises:
        PlanError: if FSDP has gathered the dense weight, as it knew nothing of masks.
    """
    if weight.gathered_for is None:
        raise PlanError(
            f"{weight.name} {weight.whole.shape} was gathered before its masks were there: call "
            "spikenm_fx.sparsify before the first forward of a model under fully_shard"
        )
    if weight.gathered_for != training and not is_reading():  # a trace looks in either mode
        _gather_again(weight, gathered, training)
    if is_sharded(gathered) and weight.guide is not None:
        weight.guide.observed = None  # layers parallel in tensors are measured by no hook
    if gathered.requires_grad and torch.is_grad_enabled() and weight.noted is not gathered:
        weight.noted = gathered
        gathered.register_hook(partial(_note, weakref.ref(weight)))
    return gathered


@torch.no_grad()
def _gather_again(weight: MaskedWeight, gathered: Tensor, training: bool) -> None:
    """Evaluation and training use other masks, but FSDP may keep what it has gathered."""
    assert weight.shard is not None
    part = weight.part_to_gather(training)
    whole = whole_of(weight.shard.like_weight(part))
    if is_sharded(gathered):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(
            *(whole, gathered.device_mesh, gathered.placements),  # type: ignore[attr-defined]
            src_data_rank=None,
        )
    part_of(gathered).copy_(part_of(whole))


def _note(noted: weakref.ref[MaskedWeight], grad: Tensor) -> None:
    owner = noted()
    if owner is not None:
        owner.note_backward(lent=False)


@contextlib.contextmanager
def gathered_inside(module: nn.Module) -> Iterator[None]:
    """Gather what FSDP shards inside of ``module``, whose own forward has begun, for a trace of it.

    A trace runs none of the hooks that gather parameters one after the other.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # else nothing of it can be there
    modules = nn.Module.modules(module) if fsdp is not None else iter(())
    inside = [m for m in modules if m is not module and isinstance(m, fsdp.FSDPModule)]
    for each in inside:
        each.unshard()
    try:
        yield
    finally:
        for each in inside:
            each.reshard()


def masked_part(weight: MaskedWeight, training: bool) -> Tensor:
    """This rank's part of the weight under its mask of training, or the final one."""
    if training:
        return kept(weight.values, weight.mask, weight.undrawn)
    weight.warn_of_fade("evaluated")
    return kept(weight.values, weight.final_here())


def mode_of(weight: MaskedWeight, training: bool) -> bool:
    """Backward passes use what the forward did, whatever the mode is by then."""
    return weight.gathered_for if in_backward() and weight.gathered_for is not None else training
