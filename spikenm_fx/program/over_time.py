# SPDX-License-Identifier: Apache-2.0
"""Time steps taken out, stacked and reduced; parts and means of other axes as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from spikenm_fx.program.axes import Atom, Layout, size_of, spelled_out
from spikenm_fx.program.calls import Call, Function, Lowered
from spikenm_fx.program.code import Code
from spikenm_fx.program.draft import Ref, State
from spikenm_fx.program.neurons import Returned
from spikenm_fx.program.pools import pooled
from spikenm_fx.program.products import sliced, summed
from spikenm_fx.program.tokens import outside

__all__ = ["OVER_TIME", "reduced"]


def _getitem(call: Call) -> Lowered:
    given, index = call.args[0], call.args[1]
    if isinstance(given, Returned):
        return given.spikes if index == 0 else given.state
    if isinstance(given, State):
        return given
    if isinstance(given, tuple | list):
        return given[index]
    ref = call.ref()
    places = spelled_out(index, len(ref.axes))
    result, taken = ref, [place for place in places if place is not None]
    for axis, place in reversed(list(enumerate(taken))):
        result = _one_place(call, result, axis, place)
    kept = [place for place in places if not isinstance(place, int)]
    for axis, place in enumerate(kept):
        if place is None:
            result = replace(result, axes=(*result.axes[:axis], (), *result.axes[axis:]))
    return result


def _one_place(call: Call, ref: Ref, axis: int, place: Any) -> Ref:
    group = ref.axes[axis]
    of_token = bool(group) and all(atom in ref.value.layout.features for atom in group)
    if isinstance(place, int) and of_token:
        part = sliced(call, ref, axis, place % size_of(group), 1).renewed()
        return replace(part, axes=(*part.axes[:axis], *part.axes[axis + 1 :]))
    if isinstance(place, int):
        return _select(call, ref, axis, place)
    if place == slice(None):
        return ref
    if isinstance(place, slice) and of_token:
        start, stop, by = place.indices(size_of(group))
        if by == 1:
            return sliced(call, ref, axis, start, stop - start).renewed()
    raise call.refuse(
        "it selects a part of an axis; time steps and equal parts of channels work",
        outside(call.draft, ref, group),
    )


def _select(call: Call, ref: Ref, axis: int, index: int) -> Ref:
    axis %= len(ref.axes)
    group = ref.axes[axis]
    if len(group) != 1 or group[0] in ref.value.layout.features or ref.step is not None:
        inside = outside(call.draft, ref, group)
        raise call.refuse("it selects along an axis that is not time alone", inside)
    call.draft.set_time(group[0], call.where)
    rest = (*ref.axes[:axis], *ref.axes[axis + 1 :])
    return Ref(ref.value, rest, index % group[0].size)


def _unbind(call: Call) -> list[Ref]:
    ref, axis = call.ref(), call.get(1, "dim", 0)
    group = ref.axes[axis]
    size = group[0].size if group else 1
    return [_select(call, ref, axis, step) for step in range(size)]


def _take(call: Call) -> Ref:
    ref = call.ref()
    return _one_place(call, ref, call.get(1, "dim") % len(ref.axes), call.get(2, "index"))


def _stack(call: Call) -> Ref:
    members, axis = call.args[0], call.get(1, "dim", 0)
    time = call.draft.time
    if not members or not all(isinstance(m, Ref) for m in members):
        raise call.refuse("it stacks what are no time steps")
    first: Ref = members[0]
    if all(m == first for m in members) and first.step is None and time is None:
        time = call.draft.time = Atom(len(members), "time")
        call.draft.constant_steps = len(members)
    elif time is None or not _all_steps(members, time):
        raise call.refuse("it stacks something else than all time steps of one value, in order")
    axis %= len(first.axes) + 1
    return Ref(first.value, (*first.axes[:axis], (time,), *first.axes[axis:]))


def _all_steps(members: list[Ref], time: Atom) -> bool:
    first = members[0]
    same = all(m.value is first.value and m.axes == first.axes for m in members)
    return same and [m.step for m in members] == list(range(time.size))


def reduced(call: Call, ref: Ref, mode: int, *, keep: bool = False, axis: int = 0) -> Ref:
    """Sum, mean or last step over time.

    Args:
        call: the operation.
        ref: a value over time.
        mode: as :class:`~spikenm_fx.program.code.Code` numbers them.
        keep: leave an axis of size 1.
        axis: where that is.

    Raises:
        NotLowered: for an input that no layer reads before.
    """
    layout, time = ref.value.layout, call.draft.time
    if layout.channels is None:
        raise call.refuse("it reduces the input before any layer")
    atoms = tuple(atom for atom in layout.atoms if atom is not time)
    new = Layout(atoms, layout.channels, layout.height, layout.width)
    made = call.draft.apply(Code.REDUCE, new, ref, settings=(mode,))
    axes = tuple(g for g in ref.axes if g != (time,))
    return Ref(made, (*axes[:axis], (), *axes[axis:]) if keep else axes)


def _mean(call: Call) -> Ref:
    return _over(call, mean=True)


def _sum(call: Call) -> Ref:
    return _over(call, mean=False)


def _over(call: Call, *, mean: bool) -> Ref:
    ref, dims = call.ref(), call.get(1, "dim")
    keep = bool(call.kwargs.get("keepdim", call.get(2, "keepdim", False)))
    if dims is None:
        raise call.refuse("it reduces all axes to one number")
    dims = [d % len(ref.axes) for d in (dims if isinstance(dims, tuple | list) else (dims,))]
    pixels = {a for a in (ref.value.layout.height, ref.value.layout.width) if a is not None}
    time = call.draft.time
    if len(dims) > 1 and any(ref.axes[d] == (time,) for d in dims):
        return _over_both(call, ref, dims, mean=mean, keep=keep)
    gone = {atom for d in dims for atom in ref.axes[d]}
    if mean and pixels and gone == pixels:
        return _global_mean(call, ref, dims, keep=keep)
    if ref.value.layout.channels is not None and gone <= set(ref.value.layout.features):
        return summed(call, ref, dims, mean=mean, keep=keep)
    group = ref.axes[dims[0]]
    if len(dims) > 1 or len(group) != 1 or group[0] not in ref.value.layout.lead:
        inside = outside(call.draft, ref, *(ref.axes[d] for d in dims))
        raise call.refuse("it reduces other axes than time, or those of a token", inside)
    if group[0] is not call.draft.time:
        call.draft.set_time(group[0], call.where)
    return reduced(call, ref, 1 if mean else 0, keep=keep, axis=dims[0])


def _over_both(call: Call, ref: Ref, dims: list[int], *, mean: bool, keep: bool) -> Ref:
    """Over time, and over other axes before."""
    at = next(d for d in dims if ref.axes[d] == (call.draft.time,))
    inner = Call(call.draft, call.node, call.where, (ref,), {}, None)
    inner.kwargs = {"dim": [d for d in dims if d != at], "keepdim": True}
    found = reduced(call, _over(inner, mean=mean), 1 if mean else 0, keep=True, axis=at)
    axes = (group for axis, group in enumerate(found.axes) if keep or axis not in dims)
    return replace(found, axes=tuple(axes))


def _global_mean(call: Call, ref: Ref, dims: list[int], *, keep: bool) -> Ref:
    value, step = pooled(call, ref, 3, (1, 1)), call.draft.step_of(call.where, ref)
    kept = [(() if i in dims else g) for i, g in enumerate(ref.axes) if keep or i not in dims]
    return Ref(value, tuple(kept), step)


OVER_TIME: dict[str, Function] = {
    "getitem": _getitem,
    "select": _take,
    "unbind": _unbind,
    "stack": _stack,
    "mean": _mean,
    "sum": _sum,
}
"""What becomes of such an operation, by its name."""
