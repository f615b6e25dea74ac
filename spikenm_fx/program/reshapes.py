# SPDX-License-Identifier: Apache-2.0
"""Reshapes: they move names of axes, and are no operations."""

from __future__ import annotations

from dataclasses import replace

import torch

from spikenm_fx.program.axes import Axes, flattened, regrouped, unflattened
from spikenm_fx.program.calls import Call, Function
from spikenm_fx.program.draft import Ref

__all__ = ["RESHAPES"]


def _flatten(call: Call) -> Ref:
    ref = call.ref()
    start, end = call.get(1, "start_dim", 0), call.get(2, "end_dim", -1)
    return replace(ref, axes=flattened(ref.axes, start, end))


def _unflatten(call: Call) -> Ref:
    ref, at = call.ref(), call.get(1, "dim")
    assert call.shape is not None
    count = len(call.shape) - len(ref.axes) + 1
    sizes = call.shape[at % len(ref.axes) : at % len(ref.axes) + count]
    return _with(call, ref, unflattened(ref.axes, at, sizes, call.draft.split))


def _view(call: Call) -> Ref:
    ref = call.ref()
    assert call.shape is not None
    lead = ref.value.layout.lead
    return _with(call, ref, regrouped(ref.axes, call.shape, call.draft.split, lead))


def _with(call: Call, ref: Ref, axes: Axes | None) -> Ref:
    if axes is None:
        raise call.refuse("it takes axes apart that are one in the network, such as channels")
    return replace(ref, axes=axes)


def _squeeze(call: Call) -> Ref:
    ref, at = call.ref(), call.get(1, "dim")
    rank = len(ref.axes)
    which = (
        range(rank) if at is None else [a % rank for a in (at if isinstance(at, tuple) else (at,))]
    )
    drop = {i for i in which if all(atom.size == 1 for atom in ref.axes[i])}
    gone = [atom for i in drop for atom in ref.axes[i]]
    if any(atom in ref.value.layout.lead for atom in gone):
        raise call.refuse("it drops an axis of time or batch, which may have another size")
    return replace(ref, axes=tuple(a for i, a in enumerate(ref.axes) if i not in drop))


def _unsqueeze(call: Call) -> Ref:
    ref, at = call.ref(), call.get(1, "dim")
    at %= len(ref.axes) + 1
    return replace(ref, axes=(*ref.axes[:at], (), *ref.axes[at:]))


def _permute(call: Call) -> Ref:
    ref = call.ref()
    order = call.args[1:] if isinstance(call.get(1, "dims"), int) else call.get(1, "dims")
    return replace(ref, axes=tuple(ref.axes[i] for i in order))


def _transpose(call: Call) -> Ref:
    ref, axes = call.ref(), list(call.ref().axes)
    a, b = call.get(1, "dim0"), call.get(2, "dim1")
    axes[a], axes[b] = axes[b], axes[a]
    return replace(ref, axes=tuple(axes))


def _movedim(call: Call) -> Ref:
    ref = call.ref()
    moved = torch.empty(tuple(range(2, 2 + len(ref.axes))), device="meta")
    moved = moved.movedim(call.get(1, "source"), call.get(2, "destination"))
    return replace(ref, axes=tuple(ref.axes[size - 2] for size in moved.shape))


RESHAPES: dict[str, Function] = {
    "flatten": _flatten,
    "unflatten": _unflatten,
    **dict.fromkeys(("view", "reshape", "view_as", "reshape_as"), _view),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
}
"""What becomes of a reshape, by its name."""
