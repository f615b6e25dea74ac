# SPDX-License-Identifier: Apache-2.0
"""Attention and all else that runs along axes of a token: products, sums, slices, enlarged images.

Each becomes loops (:mod:`spikenm_fx.program.strided`).  Axes of two operands meet as torch lets
them meet: by their place from the last one on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spikenm_fx.program.axes import Atom, Axes, Layout, size_of, unflattened
from spikenm_fx.program.calls import Call, Function
from spikenm_fx.program.draft import Ref, Value
from spikenm_fx.program.layers import see_features
from spikenm_fx.program.strided import COPY, MULTIPLY, Group, distances, laid_out, nested, strided
from spikenm_fx.program.tokens import outside

__all__ = [
    "PRODUCTS",
    "broadcast",
    "made_once",
    "matmul",
    "per_number",
    "read_features",
    "sliced",
    "summed",
    "with_constant",
]


def with_constant(call: Call, given: Any, factor: Any, shift: Any) -> Ref:
    """``factor * given + shift`` with tensors of the model, which are the same in every token.

    Args:
        call: the operation.
        given: a value of the program.
        factor: a number, or a tensor that torch would broadcast with ``given``.
        shift: alike.

    Raises:
        NotLowered: where the tensors differ between time steps or samples.
    """
    if not isinstance(given, Ref):
        raise call.refuse("it works on what is no value of the program")
    if given.value.layout.channels is None:
        raise call.refuse("it comes before any layer, so that its channels are not known")
    step = call.draft.step_of(call.where, given)
    rows = [per_number(call, given, torch.as_tensor(x)) for x in (factor, shift)]
    size = max(row.numel() for row in rows)
    if size > 1:
        whole = math.prod(given.value.layout.size)
        rows = [row.expand(size) if row.numel() == 1 else row for row in rows]
        rows = [r if r.numel() == size else r.repeat(whole // r.numel()) for r in rows]
    return Ref(call.draft.scaled(given, rows[0], rows[1]), given.axes, step)


def per_number(call: Call, ref: Ref, constant: Tensor) -> Tensor:
    """One number, one for each channel, or one for each number of a token, as these lie.

    Args:
        call: the operation.
        ref: what it works on.
        constant: of any shape that torch would broadcast with ``ref``.

    Raises:
        NotLowered: where it differs between time steps or samples.
    """
    constant = constant.detach().float()
    if constant.numel() == 1:
        return constant.reshape(1)
    layout = ref.value.layout
    if constant.dim() > len(ref.axes):
        raise call.refuse("a tensor of the model has more axes than what it works on")
    constant = constant.reshape((1,) * (len(ref.axes) - constant.dim()) + tuple(constant.shape))
    atoms = [a for g in ref.axes for a in g if a in layout.features]
    seen: set[Atom] = set()
    sizes: list[int] = []
    shared = [g for g, n in zip(ref.axes, constant.shape, strict=True) if n == 1]
    is_batch = bool(outside(call.draft, ref, *shared))  # of another axis: a state has none
    for group, size in zip(ref.axes, constant.shape, strict=True):
        inner = [a for a in group if a in layout.features]
        if size != 1 and (len(inner) != len(group) or size != size_of(group)):
            raise call.refuse(
                "a tensor of the model differs between time steps or samples",
                outside(call.draft, ref, group) if is_batch else (),
            )
        seen |= set(inner) if size != 1 else set()
        sizes += [a.size if size != 1 else 1 for a in inner]
    pixels = [a for a in (layout.height, layout.width) if a in atoms]
    moves = pixels if seen & set(pixels) else []
    order = [*moves, *(a for a in layout.channels or () if a in atoms)]
    table = constant.reshape(sizes)
    whole = [a.size if a in order else 1 for a in atoms]
    rest = [a for a in atoms if a not in order]
    places = [atoms.index(a) for a in (*order, *rest)]
    return table.expand(whole).permute(places).reshape(-1)


def matmul(call: Call) -> Ref:
    """``a @ b`` within each token; all other axes are the same in both.

    Raises:
        NotLowered: where it mixes time steps or samples.
    """
    a, b = call.ref(0), call.ref(1)
    step = call.draft.step_of(call.where, a, b)
    if len(a.axes) != len(b.axes) or len(a.axes) < 2:
        raise call.refuse("it multiplies tensors of different rank")
    rows, inner, columns = a.axes[-2], a.axes[-1], b.axes[-1]
    read_features(call, a, rows, inner)
    read_features(call, b, b.axes[-2], columns)
    lead, groups, axes = _shared(call, a, b, a.axes[:-2], b.axes[:-2])
    pixels = (a.value.layout.height, a.value.layout.width)
    taken = {atom for group in (*axes, rows) for atom in group}
    if any(atom in pixels for atom in rows) or taken & set(columns):
        own = tuple(Atom(atom.size, atom.label) for atom in columns)
    else:
        own = columns
    groups += [(rows, rows, ()), (own, (), columns), ((), inner, b.axes[-2])]
    out_axes = (*axes, rows, own)
    features = [x for group in out_axes for x in group if x not in lead]
    key = ("matmul", a.axes, b.axes)

    def make() -> tuple[Value, ...]:
        layout = laid_out(lead, features, a.value.layout, b.value.layout)
        return (strided(call.draft, call.where, MULTIPLY, layout, groups, a, b),)

    return made_once(call, key, make, out_axes, features, step, a, b)


def broadcast(call: Call, mode: int) -> Ref:
    """A sum or product of two tensors, one of which may be repeated along some axes.

    Raises:
        NotLowered: where their axes do not meet.
    """
    a, b = call.ref(0), call.ref(1)
    step = call.draft.step_of(call.where, a, b)
    rank = max(len(a.axes), len(b.axes))
    padded = [((),) * (rank - len(x.axes)) + x.axes for x in (a, b)]
    for ref in (a, b):
        if ref.value.layout.channels is None:
            raise call.refuse("it comes before any layer, so that its channels are not known")
    lead, groups, axes = _shared(call, a, b, *padded)
    features = [x for group in axes for x in group if x not in lead]
    key = ("broadcast", mode, a.axes, b.axes)

    def make() -> tuple[Value, ...]:
        layout = laid_out(lead, features, a.value.layout, b.value.layout)
        return (strided(call.draft, call.where, mode, layout, groups, a, b),)

    return made_once(call, key, make, axes, features, step, a, b)


def summed(call: Call, ref: Ref, dims: list[int], *, mean: bool, keep: bool) -> Ref:
    """The sum or mean over some axes of a token."""
    gone = [ref.axes[d] for d in dims]
    read_features(call, ref, *gone)
    step = call.draft.step_of(call.where, ref)
    lead = list(ref.value.layout.lead)
    kept = [a for i, g in enumerate(ref.axes) if i not in dims for a in g if a not in lead]
    groups: list[Group] = [((a,), (a,), ()) for a in kept]
    groups += [((), group, ()) for group in gone]
    axes = tuple(() if i in dims else g for i, g in enumerate(ref.axes) if keep or i not in dims)
    key = ("sum", ref.axes, tuple(dims), mean)

    def make() -> tuple[Value, ...]:
        layout = laid_out(lead, kept, ref.value.layout)
        made = strided(call.draft, call.where, COPY, layout, groups, ref)
        if mean:
            count = math.prod(map(size_of, gone))
            made = call.draft.scaled(Ref(made, axes), 1.0 / count, 0.0)
        return (made,)

    return made_once(call, key, make, axes, kept, step, ref)


def made_once(
    call: Call,
    key: Any,
    make: Any,
    axes: Axes,
    features: list[Atom],
    step: int | None,
    *refs: Ref,
) -> Ref:
    """What was made, in the atoms of the value that it was made as at the first step.

    Args:
        call: the operation.
        key: what tells it from others.
        make: gives its value.
        axes: of the result.
        features: those of them that are none of time or batch.
        step: of the operands.
        refs: the operands.
    """
    (value,) = call.draft.once(key, make, *refs)
    made = [a for a in value.layout.atoms if a in value.layout.features]
    same = dict(zip(features, made, strict=True)) if len(features) == len(made) else {}
    return Ref(value, tuple(tuple(same.get(a, a) for a in g) for g in axes), step)


def read_features(call: Call, ref: Ref, *groups: tuple[Atom, ...]) -> None:
    """Check that axes are axes of each token.

    Args:
        call: the operation.
        ref: whose axes they are.
        groups: the axes.

    Raises:
        NotLowered: if they are not.
    """
    layout = ref.value.layout
    if layout.channels is None:
        raise call.refuse("it comes before any layer, so that its channels are not known")
    if any(atom not in layout.features for group in groups for atom in group):
        raise call.refuse("it mixes time steps or samples", outside(call.draft, ref, *groups))


def _shared(
    call: Call, a: Ref, b: Ref, left: Axes, right: Axes
) -> tuple[list[Atom], list[Group], Axes]:
    """Axes that both have, or one of them: time and batch, loops, and the axes of the result."""
    lead = list(a.value.layout.lead)
    lead += [atom for atom in b.value.layout.lead if atom not in lead]
    if [x for x in lead if x is not call.draft.time] != [
        x for x in a.value.layout.lead if x is not call.draft.time
    ]:
        raise call.refuse("its operands differ in the axes of the batch")
    time = call.draft.time
    if time in lead:
        lead = [time, *(x for x in lead if x is not time)]
    groups: list[Group] = []
    axes: list[tuple[Atom, ...]] = []
    for mine, yours in zip(left, right, strict=True):
        ours = [[x for x in g if x not in lead] for g in (mine, yours)]
        outer = [[x for x in g if x in lead] for g in (mine, yours)]
        if outer[0] and outer[1] and outer[0] != outer[1]:
            raise call.refuse("its operands differ in the order of their axes")
        if any(outer) and any(ours):
            if not _same_places(mine, yours, lead):
                raise call.refuse("an axis joins time or batch with others")
            groups.append((tuple(ours[0]), tuple(ours[0]), tuple(ours[1])))
            axes.append(mine)
            continue
        if any(outer):
            axes.append(tuple(outer[0] or outer[1]))
            continue
        wide = ours[0] if size_of(tuple(ours[0])) > 1 or not ours[1] else ours[1]
        thin = size_of(tuple(ours[0])) != size_of(tuple(ours[1]))
        sides = tuple(() if thin and x is not wide else tuple(x) for x in ours)
        groups.append((tuple(wide), sides[0], sides[1]))
        axes.append(tuple(wide))
    return lead, groups, tuple(axes)


def _same_places(mine: tuple[Atom, ...], yours: tuple[Atom, ...], lead: list[Atom]) -> bool:
    """Whether two axes join the same samples with as many others, as (batch heads) does."""
    return len(mine) == len(yours) and all(
        a is b if a in lead or b in lead else a.size == b.size
        for a, b in zip(mine, yours, strict=True)
    )


# -- parts of axes --------------------------------------------------------------------------------


def sliced(call: Call, ref: Ref, axis: int, start: int, size: int) -> Ref:
    """One of the equal parts of an axis of a token.

    Raises:
        NotLowered: for other parts, and for axes of pixels, time or batch.
    """
    axis %= len(ref.axes)
    read_features(call, ref, ref.axes[axis])
    whole = size_of(ref.axes[axis])
    if size == whole:
        return ref
    if start % size or whole % size:
        raise call.refuse("it selects a part of an axis that is none of several equal ones")
    cut = unflattened(ref.axes, axis, (whole // size, size), call.draft.split)
    if cut is None:
        raise call.refuse("it selects a part of an axis of pixels")
    step = call.draft.step_of(call.where, ref)
    near, offset, left = distances(ref.value.layout), 0, start // size
    for atom in reversed(cut[axis]):
        offset, left = offset + left % atom.size * near[atom], left // atom.size
    axes = (*cut[:axis], *cut[axis + 1 :])
    lead = ref.value.layout.lead
    features = [a for g in axes for a in g if a not in lead]
    groups: list[Group] = [((a,), (a,), ()) for a in features]
    key = ("slice", axes, offset)

    def make() -> tuple[Value, ...]:
        layout = laid_out(lead, features, ref.value.layout)
        return (strided(call.draft, call.where, COPY, layout, groups, ref, offset=offset),)

    return made_once(call, key, make, axes, features, step, ref)


def _chunk(call: Call) -> list[Ref]:
    ref, parts, axis = call.ref(), call.get(1, "chunks"), call.get(2, "dim", 0)
    size = -(-size_of(ref.axes[axis]) // parts)
    return _parts(call, ref, axis, size)


def _split(call: Call) -> list[Ref]:
    size = call.get(1, "split_size", call.kwargs.get("split_size_or_sections"))
    if not isinstance(size, int):
        raise call.refuse("it splits an axis into parts of different size")
    return _parts(call, call.ref(), call.get(2, "dim", 0), size)


def _parts(call: Call, ref: Ref, axis: int, size: int) -> list[Ref]:
    starts = range(0, size_of(ref.axes[axis]), size)
    return [sliced(call, ref.renewed(), axis, start, size) for start in starts]


def _expand(call: Call) -> Ref:
    """The same in every step of a new axis of time; elsewhere nothing may be repeated."""
    ref, shape = call.ref(), call.shape
    assert shape is not None
    old = ((),) * (len(shape) - len(ref.axes)) + ref.axes
    axes = []
    for group, size in zip(old, shape, strict=True):
        if size_of(group) == size:
            axes.append(group)
            continue
        time = call.draft.time
        if size_of(group) != 1 or time is not None or any(time in g for g in old):
            raise call.refuse("it repeats an axis that is not a new one of time")
        call.draft.time, call.draft.constant_steps = Atom(size, "time"), size
        axes.append((call.draft.time,))
    return replace(ref, axes=tuple(axes))


def _repeat(call: Call) -> Ref:
    ref = call.ref()
    assert call.shape is not None
    old = ((),) * (len(call.shape) - len(ref.axes)) + ref.axes
    given = call.args[1:] if isinstance(call.args[1], int) else call.args[1]
    for group, size, times in zip(old, call.shape, given, strict=True):
        if (times != 1 and size_of(group) * times != size) or (times != 1 and size_of(group) != 1):
            raise call.refuse("it repeats an axis that is not a new one of time")
    return _expand(call)


# -- pools and enlarging --------------------------------------------------------------------------


def _mean_of_neighbours(call: Call) -> Ref:
    """``avg_pool1d``: over equal parts of the channels (as voting layers do), or over pixels."""
    ref = call.ref()
    kernel, stride = _one(call.get(1, "kernel_size")), call.get(2, "stride")
    stride = kernel if stride is None or stride == () else _one(stride)
    padding = _one(call.get(3, "padding", 0))
    whole = size_of(ref.axes[-1])
    if kernel != stride or padding or whole % kernel or call.get(4, "ceil_mode", False):
        raise call.refuse("its windows overlap, or do not cover the axis")
    if ref.value.layout.channels is None:
        see_features(call.draft, call.where, ref, 1)
    cut = unflattened(ref.axes, -1, (whole // kernel, kernel), call.draft.split)
    if cut is None:
        raise call.refuse("it takes the mean over a part of an axis of pixels")
    return summed(call, replace(ref.renewed(), axes=cut), [len(cut) - 1], mean=True, keep=False)


def _one(value: Any) -> int:
    return value if isinstance(value, int) else int(value[0])


def _enlarge(call: Call) -> Ref:
    """``interpolate`` to a multiple of the size, each pixel repeated."""
    ref = call.ref()
    if call.get(3, "mode", "nearest") != "nearest":
        raise call.refuse("it interpolates otherwise than by the nearest pixel")
    see_features(call.draft, call.where, ref, 2)
    assert call.shape is not None
    old = ref.value.layout
    pixels = [atom for atom in (old.height, old.width) if atom is not None]
    sizes = call.shape[-2:]
    if any(new % atom.size for new, atom in zip(sizes, pixels, strict=True)):
        raise call.refuse("it enlarges by something else than a whole factor")
    key = ("enlarge", tuple(sizes))

    def make() -> tuple[Value, ...]:
        height, width = (Atom(size, "pixels") for size in sizes)
        atoms = (*old.lead, *(old.channels or ()), height, width)
        layout = Layout(atoms, old.channels, height, width)
        return (_repeated(call, ref, layout),)

    (value,) = call.draft.once(key, make, ref)
    made = value.layout.height, value.layout.width
    axes = (*ref.axes[:-2], *((p,) for p in made if p is not None))
    return Ref(value, axes, call.draft.step_of(call.where, ref))


def _repeated(call: Call, ref: Ref, layout: Layout) -> Value:
    old, loops = ref.value.layout, []
    channels = layout.size[2]
    apart = (layout.size[1] * channels, channels)
    for before, after, near in zip(old.size[:2], layout.size[:2], apart, strict=True):
        times = after // before
        own = channels * (old.size[1] if near != channels else 1)
        loops += [(before, times * near, own), (times, near, 0)]
    return nested(call.draft, call.where, layout, [*loops, (channels, 1, 1)], ref)


PRODUCTS: dict[str, Function] = {
    **dict.fromkeys(("matmul", "bmm"), matmul),
    "chunk": _chunk,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "repeat": _repeat,
    "avg_pool1d": _mean_of_neighbours,
    **dict.fromkeys(("interpolate", "upsample", "upsample_nearest2d"), _enlarge),
}
"""What becomes of an operation, by its name."""
