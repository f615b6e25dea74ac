# SPDX-License-Identifier: Apache-2.0
"""Masks from elsewhere: a model that is sparse already goes on as one of ours.

What others call ``2:4``, and along which axis their blocks lie, is not always what it is here:
*keep at most n of m* consecutive input channels, at one output channel and one kernel position.
Both are converted by what the caller says, counted, and refused where they do not hold.

| where the mask comes from | how it is found |
|---|---|
| zeros of the weights | of every weight that is N:M by count |
| `torch.nn.utils.prune` | `weight_mask` beside `weight_orig`; removed, the parameter stays |
| ASP | buffers `__weight_mma_mask` (and `..._pruned_p`); removed |
| MaskLLM's packed bits | `masks={name: PackedBits(bits)}`, as `numpy.packbits` makes them |
| other masks | `masks={name: tensor}`, True or 1 where a weight is kept |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from spikenm_fx.errors import PlanError, did_you_mean, no_module, some_of
from spikenm_fx.masks.attach import masked_weights, refuse_unmaskable
from spikenm_fx.masks.methods import Draw, Method
from spikenm_fx.masks.methods.fixed import FixedRule
from spikenm_fx.masks.sparsify import refuse_if_sparse, sparsify
from spikenm_fx.masks.start import start
from spikenm_fx.pattern import NM, BlockView, PatternLike, is_weight_layer, torch_class
from spikenm_fx.plan import LayerPlan, Plan
from spikenm_fx.state import advice_if_sharded

__all__ = ["Adopted", "PackedBits", "adopt"]

ModelT = TypeVar("ModelT", bound=nn.Module)

ASP_MASK, ASP_PRUNED = "__weight_mma_mask", "__weight_mma_pruned_p"


@dataclass(frozen=True, slots=True, eq=False)
class PackedBits:
    """A mask of one bit a weight, in the weight's order.

    Attributes:
        bits: uint8, eight weights each.
        first: which bit of a byte is the first weight: ``"big"``, the highest
            (``numpy.packbits``), or ``"little"``.
    """

    bits: Tensor
    first: Literal["big", "little"] = "big"

    def unpacked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The mask as bool.

        Args:
            name: of the layer, for the message.
            shape: of its weight.

        Raises:
            PlanError: if there are too few or too many bits.
        """
        count = int(np.prod(shape))
        if self.bits.dtype != torch.uint8 or self.bits.numel() != -(-count // 8):
            raise PlanError(
                f"{name} {shape} has {count} weights, whose bits fill {-(-count // 8)} bytes; "
                f"{self.bits.numel()} values of {self.bits.dtype} were given"
            )
        order = self.first
        flat = np.unpackbits(self.bits.cpu().numpy().reshape(-1), count=count, bitorder=order)
        return torch.from_numpy(flat.astype(bool)).reshape(shape)


@dataclass(frozen=True, slots=True)
class Adopted(FixedRule):
    """The masks that a model came with; they stay, and kept weights learn on."""

    name: ClassVar[str] = "adopted"

    def init_scores(self, weight: Tensor, draw: Draw) -> Tensor | None:
        """One for each non-zero of blocks ``(lead, M, inner)``."""
        return (weight != 0).float()

    def final_mask(self, weight: Tensor, logits: Tensor | None, draw: Draw) -> Tensor:
        """Where the scores ``(lead, M, inner)`` are one."""
        assert logits is not None
        return logits > 0.5


@dataclass(slots=True, eq=False)
class _Found:
    """One weight with its mask, as it was found."""

    name: str
    layer: nn.Module
    view: BlockView
    mask: Tensor
    source: str


def adopt(
    model: ModelT,
    nm: PatternLike = "2:4",
    *,
    masks: Mapping[str, Tensor | PackedBits] | None = None,
    n_means: Literal["kept", "zeros"] = "kept",
    mask_axis: Literal[0, 1] = 1,
    method: str | Method | None = None,
    total_steps: int | None = None,
    seed: int = 0,
) -> ModelT:
    """Take over the masks of a model that is sparse already, in place.

    It is then as after :func:`spikenm_fx.sparsify`: train it on, ``fold`` it, ``pack`` it.  Weights
    outside of the masks become exact zeros; no other weight changes.  Weights that are dense, or
    whose zeros are not N:M, stay as they are, unless somebody gave a mask for them.

    Args:
        model: with its weights loaded; masks of ``torch.nn.utils.prune`` and of ASP may be on it.
        nm: the pattern, as its source writes it.
        masks: for layers by qualified name: bool or 0/1 of the weight's shape, or bits.
        n_means: what its source means by n: how many of m are ``"kept"``, or how many are
            ``"zeros"`` (then ``"1:4"`` is our ``3:4``).
        mask_axis: axis of the given masks that runs over input channels; 0 for masks of weights
            stored as ``(in, out)``, which are turned.
        method: None keeps these masks for good; a method's name learns on from them, e.g.
            ``"spikenm"``, and may choose others.
        total_steps: as for ``sparsify``.
        seed: as for ``sparsify``.

    Returns:
        ``model`` itself.

    Raises:
        PatternError: for a malformed pattern.
        PlanError: if a given mask is not N:M along the input channels, does not fit or names no
            layer; if no weight is N:M; if the model carries masks of ours, or is sharded over
            ranks.  The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(no_module("adopt", model))
    refuse_if_sparse(model)
    if advice_if_sharded(model):
        raise PlanError(
            f"adopt counts the zeros of whole weights of {type(model).__name__}:"
            + advice_if_sharded(model)
        )
    pattern = _ours(NM.parse(nm), n_means)
    found = _find(model, pattern, dict(masks or {}), mask_axis)
    chosen = [entry for entry in found if _fits(entry, pattern)]
    if not chosen:
        raise PlanError(
            f"no weight of {type(model).__name__} is {pattern} by its zeros "
            f"({some_of(f'{e.name}: {_density(e.mask):.0%} not zero' for e in found)}); load the "
            "sparse weights first, give masks, or say by n_means what their source means by n"
        )
    for entry in chosen:
        _refuse_unusable(entry)
    decided = Plan(type(model).__name__, tuple(_planned(entry, pattern) for entry in chosen))
    for entry in chosen:  # nothing that can fail comes after this line
        _bake(entry)
    fixed = method is None
    sparsify(
        *(model, decided),
        method=Adopted() if method is None else method,
        total_steps=total_steps,
        seed=seed,
    )
    if fixed:
        _keep(model, {entry.name: entry for entry in chosen})
    return model


def _ours(nm: NM, n_means: str) -> NM:
    if n_means == "kept":
        return nm
    if n_means != "zeros":
        raise PlanError(f"n_means={n_means!r}: say 'kept' or 'zeros'")
    if nm.keep == nm.of:
        raise PlanError(f"{nm} with n_means='zeros' keeps nothing")
    return NM(nm.of - nm.keep, nm.of)


def _find(
    model: nn.Module, nm: NM, masks: dict[str, Tensor | PackedBits], mask_axis: int
) -> list[_Found]:
    found = []
    names = [n for n, m in nn.Module.named_modules(model) if is_weight_layer(m)]
    unknown = [name for name in masks if name not in names]
    if unknown:
        near = did_you_mean(unknown[0], names)
        raise PlanError(f"masks names {unknown[0]!r}, which is no Linear or Conv layer{near}")
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.weight
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        view = BlockView.of_layer(layer, nm, name=name)
        mask, source = _mask_of(name, layer, weight.detach(), masks, mask_axis)
        found.append(_Found(name, layer, view, mask, source))
    return found


def _mask_of(
    name: str,
    layer: nn.Module,
    weight: Tensor,
    masks: dict[str, Tensor | PackedBits],
    mask_axis: int,
) -> tuple[Tensor, str]:
    shape = tuple(weight.shape)
    if name in masks:
        return _given(name, masks[name], shape, mask_axis).to(weight.device), "the given mask"
    for key, source in (("weight_mask", "torch.nn.utils.prune"), (ASP_MASK, "ASP")):
        held = layer._buffers.get(key)
        if held is not None:
            if tuple(held.shape) != shape:
                raise PlanError(
                    f"{name} {shape}: its mask of {source} is of shape {tuple(held.shape)}"
                )
            return _as_bool(name, held), source
    return weight != 0, ""


def _given(name: str, mask: Tensor | PackedBits, shape: tuple[int, ...], mask_axis: int) -> Tensor:
    turned = (shape[1], shape[0], *shape[2:]) if mask_axis == 0 else shape
    if isinstance(mask, PackedBits):
        mask = mask.unpacked(name, turned)
    if tuple(mask.shape) != turned:
        hint = ""
        if tuple(mask.shape) == (shape[1], shape[0], *shape[2:]):
            hint = "; if it is of a weight stored as (in, out), say mask_axis=0"
        raise PlanError(f"{name} {shape}: the mask is of shape {tuple(mask.shape)}{hint}")
    return _as_bool(name, mask.transpose(0, 1) if mask_axis == 0 else mask)


def _as_bool(name: str, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise PlanError(f"{name}: its mask holds other values than 0 and 1; give True where kept")
    return mask.bool()


def _fits(entry: _Found, nm: NM) -> bool:
    """Whether a mask is N:M; one that somebody gave must be."""
    if not bool((~entry.mask).any()) and not entry.source:
        return False
    counts = entry.view.to_blocks(entry.mask).sum(1)
    over = int((counts > nm.keep).sum())
    if not over:
        return entry.view.channels >= nm.of or bool(entry.source)
    if not entry.source:
        return False
    raise PlanError(
        f"{entry.name} {entry.view.shape}: {entry.source} keeps more than {nm.keep} of {nm.of} "
        f"input channels in {over} of {counts.numel()} blocks{_elsewhere(entry, nm)}"
    )


def _elsewhere(entry: _Found, nm: NM) -> str:
    """Where its blocks may lie instead."""
    for axis, what in ((0, "output channels"), (-1, "the last axis of the kernel")):
        moved = entry.mask.movedim(axis, -1)
        if moved.shape[-1] % nm.of == 0:
            counts = moved.unflatten(-1, (-1, nm.of)).sum(-1)
            if int(counts.max()) <= nm.keep and not (axis == -1 and moved.dim() == 2):
                return (
                    f"; it is {nm} along {what}, which no kernel for N:M weights reads: prune "
                    "along the input channels"
                )
    density = _density(entry.mask)
    return f"; {density:.0%} of it is kept: is {nm} what its source means (n_means)?"


def _density(mask: Tensor) -> float:
    return float(mask.float().mean())


def _refuse_unusable(entry: _Found) -> None:
    weight = entry.layer.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise PlanError(
            f"{entry.name} {entry.view.shape} is {weight.dtype} or not finite; load finite "
            "floating-point weights first"
        )
    if "weight" not in entry.layer._parameters and "weight_orig" not in entry.layer._parameters:
        raise PlanError(
            f"{entry.name} {entry.view.shape}: its weight is computed, not a parameter; remove "
            "the parametrization first"
        )
    refuse_unmaskable(entry.name, entry.layer)


def _planned(entry: _Found, nm: NM) -> LayerPlan:
    view = entry.view
    return LayerPlan(
        name=entry.name,
        kind=torch_class(entry.layer).__name__,
        shape=view.shape,
        action="sparsify",
        nm=nm,
        padded=bool(view.remainder),
        reason=f"mask of {entry.source}" if entry.source else "its zeros",
        axis=0 if view.transposed else 1,
        groups=view.groups,
    )


def _bake(entry: _Found) -> None:
    """Exact zeros outside the mask, in the parameter itself; the other tool's buffers go."""
    layer = entry.layer
    if "weight_orig" in layer._parameters:
        prune.remove(layer, "weight")
    for key in (ASP_MASK, ASP_PRUNED):
        layer._buffers.pop(key, None)
    with torch.no_grad():
        weight = layer._parameters["weight"]
        assert weight is not None
        weight.masked_fill_(~entry.mask, 0.0)


def _keep(model: nn.Module, entries: Mapping[str, _Found]) -> None:
    """Masks keep weights that happen to be zero, too: they learn on."""
    for name, _, mask in masked_weights(model):
        if mask.scores is not None:
            blocks = mask.view.to_blocks(entries[name].mask.float())
            mask.scores.data.copy_(blocks)
            start(mask)
