# SPDX-License-Identifier: Apache-2.0
"""Operations without weights: reshapes move names of axes, the rest becomes operations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spikenm_fx.program.attention import attention_by, einsum
from spikenm_fx.program.axes import Atom, Axes, Layout, flattened, regrouped, size_of, unflattened
from spikenm_fx.program.calls import Call, Function, Lowered
from spikenm_fx.program.code import POINTWISE, Code
from spikenm_fx.program.draft import NotLowered, Partial, Ref, Rest, State, Value
from spikenm_fx.program.neurons import Returned
from spikenm_fx.program.norms import NORMS
from spikenm_fx.program.pools import POOLS, pooled
from spikenm_fx.program.products import (
    PRODUCTS,
    broadcast,
    per_number,
    sliced,
    summed,
    with_constant,
)
from spikenm_fx.program.strided import distances
from spikenm_fx.program.tokens import outside, relaid

__all__ = ["FUNCTIONS"]


def _same(call: Call) -> Lowered:
    return call.args[0]


def _typed(call: Call) -> Lowered:
    """``to``, ``float``: nothing, unless another dtype comes of it."""
    info = call.node.meta.get("value")
    if info is not None and info.dtype not in (None, torch.float32):
        raise call.refuse(f"it makes {info.dtype} of its input; programs compute in float32")
    return call.args[0]


# -- reshapes -------------------------------------------------------------------------------------


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


# -- time -----------------------------------------------------------------------------------------


def _getitem(call: Call) -> Lowered:
    given, index = call.args[0], call.args[1]
    if isinstance(given, Returned):
        return given.spikes if index == 0 else given.state
    if isinstance(given, State):
        return given
    if isinstance(given, tuple | list):
        return given[index]
    ref = call.ref()
    places = index if isinstance(index, tuple) else (index,)
    if Ellipsis in places:
        raise call.refuse("it selects with an ellipsis; write x[t] or x[:, t]")
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


def _reduced(call: Call, ref: Ref, mode: int, *, keep: bool = False, axis: int = 0) -> Ref:
    """Sum, mean or last step over time."""
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
    return _reduced(call, ref, 1 if mean else 0, keep=keep, axis=dims[0])


def _over_both(call: Call, ref: Ref, dims: list[int], *, mean: bool, keep: bool) -> Ref:
    """Over time, and over other axes before."""
    at = next(d for d in dims if ref.axes[d] == (call.draft.time,))
    inner = Call(call.draft, call.node, call.where, (ref,), {}, None)
    inner.kwargs = {"dim": [d for d in dims if d != at], "keepdim": True}
    found = _reduced(call, _over(inner, mean=mean), 1 if mean else 0, keep=True, axis=at)
    axes = (group for axis, group in enumerate(found.axes) if keep or axis not in dims)
    return replace(found, axes=tuple(axes))


def _global_mean(call: Call, ref: Ref, dims: list[int], *, keep: bool) -> Ref:
    value, step = pooled(call, ref, 3, (1, 1)), call.draft.step_of(call.where, ref)
    kept = [(() if i in dims else g) for i, g in enumerate(ref.axes) if keep or i not in dims]
    return Ref(value, tuple(kept), step)


# -- sums and other joins -------------------------------------------------------------------------


def _add(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if call.kwargs.get("alpha", 1) != 1:
        raise call.refuse("it adds a multiple (alpha=)")
    if isinstance(a, int | float):
        a, b = b, a
    if isinstance(b, int | float):
        return a if b == 0 else _scaled(call, a, 1.0, float(b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        own, ref = (a, b) if isinstance(a, Tensor) else (b, a)
        return with_constant(call, ref, 1.0, own)
    added = _accumulated(call, a, b)
    return added if added is not None else _joined(call, 0)


def _accumulated(call: Call, a: Any, b: Any) -> Lowered | None:
    """A loop adds up the steps of one value; None where this is another sum."""
    if not isinstance(b, Ref) or b.step is None:
        return None
    count = None
    if isinstance(a, Partial) and a.value is b.value and a.count == b.step:
        count = a.count + 1
    elif isinstance(a, Ref) and a.value is b.value and (a.step, b.step) == (0, 1):
        count = 2
    if count is None:
        return None
    if call.draft.time is not None and count == call.draft.time.size:
        return _reduced(call, replace(b, step=None), 0)
    return Partial(b.value, b.axes, count)


def _sub(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if call.kwargs.get("alpha", 1) != 1:
        raise call.refuse("it subtracts a multiple (alpha=)")
    if isinstance(b, Tensor):
        return with_constant(call, a, 1.0, -b)
    if isinstance(a, Tensor):
        return with_constant(call, b, -1.0, a)
    if isinstance(a, Ref) and a == b:
        return 0.0  # as soft - soft.detach(), which hands a gradient on
    if isinstance(b, int | float):
        return _scaled(call, a, 1.0, -float(b))
    if isinstance(a, int | float):
        return _scaled(call, b, -1.0, float(a))
    return _joined(call, 1)


def _rsub(call: Call) -> Lowered:
    return _scaled(call, call.args[0], -1.0, float(call.args[1]))


def _mul(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if isinstance(a, int | float):
        a, b = b, a
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        own, ref = (a, b) if isinstance(a, Tensor) else (b, a)
        return with_constant(call, ref, own, 0.0)
    return _scaled(call, a, float(b), 0.0) if isinstance(b, int | float) else _joined(call, 2)


def _div(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if isinstance(b, Tensor) and bool((b != 0).all()) and not call.kwargs.get("rounding_mode"):
        return with_constant(call, a, 1.0 / b, 0.0)
    if not isinstance(b, int | float) or not b or call.kwargs.get("rounding_mode"):
        raise call.refuse("it divides by something else than a number")
    if isinstance(a, Ref) and call.draft.time is not None and b == call.draft.time.size:
        mean = call.draft.mean_of(a)
        if mean is not None:
            return mean
    return _scaled(call, a, 1.0 / b, 0.0)


def _scaled(call: Call, given: Any, factor: Any, shift: Any) -> Ref:
    if not isinstance(given, Ref):
        raise call.refuse("it works on what is no value of the program")
    step = call.draft.step_of(call.where, given)
    return Ref(call.draft.scaled(given, factor, shift), given.axes, step)


def _of_one_batch(call: Call, a: Ref, b: Ref) -> tuple[Ref, Ref]:
    """Two operands, of which axes of time and batch at the same place are the same."""
    rank = min(len(a.axes), len(b.axes))
    pairs = [
        (x[0], y[0])
        for x, y in zip(a.axes[-rank:], b.axes[-rank:], strict=True)
        if len(x) == len(y) == 1 and x[0] is not y[0]
        if x[0] in a.value.layout.lead and y[0] in b.value.layout.lead
    ]
    if pairs and rank:
        call.draft.same(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))
    return a.renewed(), b.renewed()


def _joined(call: Call, mode: int) -> Ref:
    a, b = _of_one_batch(call, call.ref(0), call.ref(1))
    call.args = (a, b, *call.args[2:])
    step = call.draft.step_of(call.where, a, b)
    if not _alike(a, b):
        return broadcast(call, mode)
    wide = a if len(a.value.layout.atoms) >= len(b.value.layout.atoms) else b
    made = call.draft.apply(Code.JOIN, wide.value.layout, a, b, settings=(mode,))
    return Ref(made, wide.axes, step)


def _alike(a: Ref, b: Ref) -> bool:
    """Whether two tensors have the same axes, each of its own layer."""
    left, right = a.value.layout, b.value.layout
    if left is right:
        return a.axes == b.axes
    if left.channels is None or right.channels is None or left.size != right.size:
        return False
    names = dict(zip(left.channels, right.channels, strict=False))
    if len(left.channels) != len(right.channels):
        return False
    for mine, yours in ((left.height, right.height), (left.width, right.width)):
        if mine is not None and yours is not None:
            names[mine] = yours
    return tuple(tuple(names.get(x, x) for x in g) for g in a.axes) == b.axes


def _cat(call: Call) -> Ref:
    members, axis = call.args[0], call.get(1, "dim", 0)
    if len(members) < 2 or not all(isinstance(m, Ref) for m in members):
        why = "it joins what are no values of the program"
        raise NotLowered(call.where, why, carries=any(isinstance(m, Rest) for m in members))
    joined: Ref = members[0]
    for other in members[1:]:
        joined = _cat_two(call, joined, other, axis % len(joined.axes))
    return joined


def _cat_two(call: Call, a: Ref, b: Ref, axis: int) -> Ref:
    a, b = _of_one_batch(call, a, b)
    step = call.draft.step_of(call.where, a, b)
    if a.value.layout.channels is None or b.value.layout.channels is None:
        raise call.refuse("it concatenates what no layer read, so that its channels are not known")
    inside = outside(call.draft, a, a.axes[axis]) + outside(call.draft, b, b.axes[axis])
    if inside or not (a.axes[axis] and b.axes[axis]):
        raise call.refuse("it concatenates along another axis than channels", inside)
    a, b = (relaid(call.draft, call.where, x, x.axes[axis]) for x in (a, b))
    left, right = a.value.layout, b.value.layout
    if left.size[:2] != right.size[:2] or left.lead != right.lead:
        raise call.refuse("it concatenates values of different shape")
    channels = (Atom(left.size[2] + right.size[2], "channels"),)
    key = (Code.CONCAT, a.value.number, b.value.number)

    def make() -> tuple[Value, ...]:
        layout = Layout((*left.lead, *channels, *left.features[len(left.channels or ()) :]))
        layout.channels, layout.height, layout.width = channels, left.height, left.width
        bits = a.value.bits and b.value.bits
        return (call.draft.apply(Code.CONCAT, layout, a, b, bits=bits),)

    (value,) = call.draft.once(key, make, a, b)
    made = value.layout.channels
    assert made is not None
    return Ref(value, (*a.axes[:axis], made, *a.axes[axis + 1 :]), step)


def _relu(call: Call) -> Ref:
    ref = call.ref()
    if ref.value.bits:
        return ref
    made = call.draft.apply(Code.RELU, ref.value.layout, ref)
    return replace(ref, value=made, step=call.draft.step_of(call.where, ref))


def _pointwise(name: str) -> Function:
    """An operation on each number by itself, in floats."""

    def lowered(call: Call) -> Ref:
        ref = call.ref()
        which = f"gelu_{call.kwargs['approximate']}" if call.kwargs.get("approximate") else name
        which = which.replace("gelu_none", "gelu")
        if which not in POINTWISE or ref.value.layout.channels is None:
            raise call.refuse("it comes before any layer, or is a form of it that has no operation")
        settings = (POINTWISE.index(which),)
        made = call.draft.apply(Code.POINTWISE, ref.value.layout, ref, settings=settings)
        return replace(ref, value=made, step=call.draft.step_of(call.where, ref))

    return lowered


def _softmax(mode: int) -> Function:
    """Softmax, or its logarithm, along one axis of a token."""

    def lowered(call: Call) -> Ref:
        ref, at = call.ref(), call.get(1, "dim")
        if at is None:
            raise call.refuse("it does not say along which axis; give dim=")
        layout, group = ref.value.layout, ref.axes[at % len(ref.axes)]
        if layout.channels is None or any(atom not in layout.features for atom in group):
            inside = () if layout.channels is None else outside(call.draft, ref, group)
            raise call.refuse("it runs along time or batch, or before any layer", inside)
        near, apart, size = distances(layout), 0, 1
        for atom in reversed([atom for atom in group if atom.size > 1]):
            apart = apart or near[atom]
            if near[atom] != apart * size:
                raise call.refuse("it runs along several axes, which lie apart in memory")
            size *= atom.size
        settings = (mode, size, apart or 1)
        made = call.draft.apply(Code.SOFTMAX, layout, ref, settings=settings)
        return replace(ref, value=made, step=call.draft.step_of(call.where, ref))

    return lowered


COMPARED = {"gt": 0, "ge": 1, "lt": 2, "le": 3}
TURNED = {0: 2, 1: 3, 2: 0, 3: 1}  # the same with operands the other way round


def _compare(name: str) -> Function:
    """Spikes where one passes the other."""

    def lowered(call: Call) -> Ref:
        a, b, mode = call.args[0], call.args[1], COMPARED[name]
        if not isinstance(a, Ref):
            a, b, mode = b, a, TURNED[mode]
        if isinstance(b, Ref):
            call.args = (a, b)
            return _above(call, _joined(call, 1), mode, torch.zeros(1))
        return _above(call, a, mode, torch.as_tensor(b))

    return lowered


def _above(call: Call, given: Any, mode: int, threshold: Tensor) -> Ref:
    if not isinstance(given, Ref) or given.value.layout.channels is None:
        raise call.refuse("it comes before any layer, so that its channels are not known")
    row = per_number(call, given, threshold)
    if row.numel() > 1:
        whole = math.prod(given.value.layout.size)
        row = row.repeat(whole // row.numel())
    stored = call.draft.keep("threshold", row.reshape(1, -1).contiguous())
    source, layout = call.draft.floats(given), given.value.layout
    made = call.draft.apply(
        Code.COMPARE, layout, source, settings=(mode,), tensors=(stored,), bits=True
    )
    return replace(given, value=made, step=call.draft.step_of(call.where, given))


def _surrogate(call: Call) -> Ref:
    """A step function of the user's own: which one, a few numbers tell."""
    probe = torch.tensor([-1.0, -1e-6, 0.0, 1e-6, 1.0])
    rest = call.args[1:]
    if not callable(call.node.target) or any(isinstance(leaf, Ref) for leaf in rest):
        raise call.refuse("its step function takes a threshold that is computed")
    with torch.no_grad():
        try:
            found = call.node.target(probe, *rest, **call.kwargs)
        except Exception as error:
            raise call.refuse(f"its step function does not run on five numbers: {error}") from None
    for mode, spikes in ((0, probe > 0), (1, probe >= 0)):
        if isinstance(found, Tensor) and torch.equal(found.float(), spikes.float()):
            return _above(call, call.args[0], mode, torch.zeros(1))
    raise call.refuse("its step function is none that fires from 0 on")


def _where(call: Call) -> Lowered:
    """One number or the other, as spikes say."""
    spikes, a, b = call.args[:3]
    if not isinstance(spikes, Ref) or not spikes.value.bits:
        raise call.refuse("it chooses by something else than spikes")
    parts = []
    for given, mode in ((a, 2), (b, 3)):
        if isinstance(given, Ref):
            call.args = (spikes, given)
            parts.append(_joined(call, mode))
        elif isinstance(given, int | float):
            factor, shift = (given, 0.0) if mode == 2 else (-given, given)
            parts.append(_scaled(call, spikes, float(factor), float(shift)))
        else:
            raise call.refuse("it chooses between tensors of the model")
    call.args = tuple(parts)
    return _joined(call, 0)


FUNCTIONS: dict[str, Function] = {
    **dict.fromkeys(("detach", "clone", "contiguous", "identity", "dropout", "alias"), _same),
    **dict.fromkeys(("requires_grad", "lift_fresh", "dropout1d", "dropout2d"), _same),
    **dict.fromkeys(("to", "float", "type", "type_as", "double", "half", "bool"), _typed),
    "flatten": _flatten,
    "unflatten": _unflatten,
    **dict.fromkeys(("view", "reshape", "view_as", "reshape_as"), _view),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    "getitem": _getitem,
    **PRODUCTS,
    "select": _take,
    "unbind": _unbind,
    "stack": _stack,
    "mean": _mean,
    "sum": _sum,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "cat": _cat,
    "relu": _relu,
    **{name: _pointwise(name) for name in POINTWISE},
    **{name: _compare(name) for name in COMPARED},
    "surrogate": _surrogate,
    "where": _where,
    "neg": lambda call: _scaled(call, call.args[0], -1.0, 0.0),
    "softmax": _softmax(0),
    "einsum": einsum,
    "scaled_dot_product_attention": attention_by(_softmax(0)),
    "log_softmax": _softmax(1),
    **NORMS,
    **POOLS,
}
"""What becomes of an operation, by its name as :func:`spikenm_fx.trace.analysis.ops.op_name`."""
