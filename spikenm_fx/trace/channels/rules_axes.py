# SPDX-License-Identifier: Apache-2.0
"""Layout rules of operations on whole tensors: element-wise, reshapes, reductions, joins."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from spikenm_fx.trace.analysis.ops import ELEMENTWISE
from spikenm_fx.trace.channels.reader import ChannelReader, rule, rule_where
from spikenm_fx.trace.channels.rules_nodes import (
    NotUnderstood,
    axis_of,
    is_uniform,
    order_of,
    parts_of,
    shape_of,
)
from spikenm_fx.trace.channels.spaces import Layout, plain, size_of


def elementwise(reader: ChannelReader, node: fx.Node, operands: list[fx.Node]) -> Layout:
    """Operands of equal or broadcast shape: their channels become the same."""
    shape = shape_of(node)
    result: Layout = plain(shape)
    known = False
    for operand in sorted(operands, key=lambda n: not is_labelled(reader, n)):
        if not known:
            result, known = broadcast(reader, operand, len(shape)), True
        else:
            result = unite_with(reader, result, operand, node.name)
    return tuple(
        dim if size_of(dim) == size else plain((size,))[0]
        for dim, size in zip(result, shape, strict=True)
    )


@rule("softmax", "log_softmax")
def normalised(reader: ChannelReader, node: fx.Node) -> Layout:
    """One axis is normalised over; which one is not asked."""
    for dim in reader.source(node):
        reader.spaces.mix(dim, f"{node.name}: normalises over one of these axes")
    return elementwise(reader, node, node.all_input_nodes)


@rule_where(lambda name: name in ELEMENTWISE or name == "surrogate")
def elementwise_all(reader: ChannelReader, node: fx.Node) -> Layout:
    """Whatever treats all channels alike, with all its inputs."""
    return elementwise(reader, node, node.all_input_nodes)


def is_labelled(reader: ChannelReader, node: fx.Node) -> bool:
    """Whether any axis of ``node`` indexes channels."""
    return any(reader.spaces.labelled(dim) for dim in reader.layouts[node])


def broadcast(reader: ChannelReader, node: fx.Node, rank: int) -> Layout:
    """The operand with as many axes as the result; its axes of length 1 stay so for now."""
    layout = reader.layouts[node]
    return (*plain((1,) * (rank - len(layout))), *layout)


def unite_with(reader: ChannelReader, layout: Layout, other: fx.Node, where: str) -> Layout:
    """``layout`` after an element-wise operation with ``other``."""
    theirs, shift = reader.layouts[other], len(layout) - len(reader.layouts[other])
    out = list(layout)
    for i, dim in enumerate(theirs):
        place = i + shift
        if size_of(dim) == 1 and size_of(out[place]) != 1:
            continue
        if size_of(out[place]) == 1:
            out[place] = dim
        elif reader.spaces.labelled(dim) or reader.spaces.labelled(out[place]):
            if not reader.spaces.labelled(dim) and harmless(reader, other, i):
                continue
            out[place] = reader.spaces.unite(out[place], dim, where)
    return tuple(out)


def harmless(reader: ChannelReader, node: fx.Node, axis: int) -> bool:
    """Whether an operand is the same for all channels."""
    tensor = node.meta.get("tensor")
    if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
        return bool((tensor == tensor.select(axis, 0).unsqueeze(axis)).all())
    return node.op == "call_function" and is_uniform(node)


def fitted(reader: ChannelReader, layout: Layout, shape: tuple[int, ...], where: str) -> Layout:
    """The layout where axes of another length than ``shape`` lose (and freeze) their channels.

    Raises:
        NotUnderstood: if the number of axes differs.
    """
    if len(layout) != len(shape):
        raise NotUnderstood("a neuron that changes the number of axes")
    for dim, size in zip(layout, shape, strict=True):
        if size_of(dim) != size:
            reader.spaces.freeze(dim, f"{where}: changes the number of channels")
    return tuple(
        d if size_of(d) == s else plain((s,))[0] for d, s in zip(layout, shape, strict=True)
    )


@rule("slice", "narrow", "pad", "constant_pad_nd")
@rule_where(lambda name: "pool" in name or name == "interpolate" or "upsample" in name)
def resized(reader: ChannelReader, node: fx.Node) -> Layout:
    """Pooling and the like: axes of unchanged length keep their channels.

    Raises:
        NotUnderstood: if the number of axes changes.
    """
    layout, shape = reader.source(node), shape_of(node)
    if len(layout) != len(shape):
        raise NotUnderstood("changes the number of axes")
    return fitted(reader, layout, shape, node.name)


@rule("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as")
def reshaped(reader: ChannelReader, node: fx.Node) -> Layout:
    """Views, flattenings and squeezes."""
    return reader.spaces.reshape(reader.source(node), shape_of(node), node.name)


@rule("permute", "transpose", "t", "T", "mT", "movedim", "moveaxis")
def permuted(reader: ChannelReader, node: fx.Node) -> Layout:
    """Axes in another order."""
    layout = reader.source(node)
    return tuple(layout[i] for i in order_of(node, len(layout)))


@rule("sum", "mean", "var", "std", "amax", "amin")
def reduced(reader: ChannelReader, node: fx.Node) -> Layout:
    """Sums and means do not care in which order they run over an axis."""
    layout, shape = reader.source(node), shape_of(node)
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if dims is None or not shape:
        for dim in layout:
            reader.spaces.mix(dim, f"{node.name}: reduces over these channels")
        return plain(shape)
    gone = {int(d) % len(layout) for d in (dims if isinstance(dims, tuple) else (dims,))}
    for axis in gone:
        reader.spaces.mix(layout[axis], f"{node.name}: reduces over these channels")
    if len(shape) == len(layout):
        return tuple(plain((1,))[0] if i in gone else d for i, d in enumerate(layout))
    return tuple(d for i, d in enumerate(layout) if i not in gone)


@rule("stack")
def stack(reader: ChannelReader, node: fx.Node) -> Layout:
    """A new axis; the parts' channels become the same."""
    parts = parts_of(node)
    axis = axis_of(node, len(shape_of(node)))
    layout = reader.layouts[parts[0]]
    for part in parts[1:]:
        layout = unite_with(reader, layout, part, node.name)
    return (*layout[:axis], plain((len(parts),))[0], *layout[axis:])


@rule("cat")
def cat(reader: ChannelReader, node: fx.Node) -> Layout:
    """Parts behind each other along one axis; along the others their channels become the same."""
    parts = parts_of(node)
    axis = axis_of(node, len(shape_of(node)))
    layouts = [reader.layouts[part] for part in parts]
    out = list(layouts[0])
    for layout in layouts[1:]:
        for i, dim in enumerate(layout):
            if i == axis:
                out[i] = (*out[i], *dim)
            else:
                out[i] = reader.spaces.unite(out[i], dim, node.name)
    return tuple(out)


@rule("expand", "repeat", "expand_as", "broadcast_to")
def expanded(reader: ChannelReader, node: fx.Node) -> Layout:
    """Axes of length 1 repeated; repeated channels are frozen."""
    layout, shape = reader.source(node), shape_of(node)
    full = (*plain(shape[: len(shape) - len(layout)]), *layout)
    for dim, size in zip(full, shape, strict=True):
        if size_of(dim) not in (1, size):
            reader.spaces.freeze(dim, f"{node.name}: channels are repeated")
    return tuple(
        d if size_of(d) == s else reader.input((s,), f"{node.name}: repeats")[0]
        for d, s in zip(full, shape, strict=True)
    )


@rule("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones")
def made_like(reader: ChannelReader, node: fx.Node) -> Layout:
    """``zeros_like(x)``: the same for all channels, whatever x is."""
    return plain(shape_of(node))
