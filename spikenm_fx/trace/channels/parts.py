# SPDX-License-Identifier: Apache-2.0
"""Layout rules of parts of tensors: items, slices, chunks, and writing into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from spikenm_fx.trace.channels.reader import ChannelReader, rule
from spikenm_fx.trace.channels.rules_axes import (
    elementwise,
    unite_with,
)
from spikenm_fx.trace.channels.rules_nodes import (
    NotUnderstood,
    axis_of,
    is_container,
    is_item,
    shape_of,
    starts_uniform,
)
from spikenm_fx.trace.channels.spaces import Dim, Layout, plain, size_of


@rule("getitem")
def getitem(reader: ChannelReader, node: fx.Node) -> Layout:
    """An item of a container, or an index into a tensor."""
    source, key = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    if source in reader.items and key in reader.items[source]:
        return reader.items[source][key]
    if is_container(source):
        return result(reader, source, shape_of(node))
    return indexed(reader, reader.layouts[source], key, shape_of(node), node.name)


def result(reader: ChannelReader, source: fx.Node, shape: tuple[int, ...]) -> Layout:
    """A tensor in the tuple that a neuron returned: spikes, or state of the same channels."""
    while is_item(source):
        (source, *_) = source.all_input_nodes
    layout = reader.neurons.get(source)
    if layout is None or [size_of(d) for d in layout] != list(shape):
        if layout is not None and shape:
            return state_of_one_step(reader, layout, shape, source.name)
        return plain(shape)
    return layout


def state_of_one_step(
    reader: ChannelReader, layout: Layout, shape: tuple[int, ...], where: str
) -> Layout:
    """State of a neuron that steps through time itself has no time axis, its first."""
    if [size_of(d) for d in layout[1:]] == list(shape):
        return layout[1:]
    for dim in layout:
        reader.spaces.freeze(dim, f"{where}: returns its state in another shape")
    return plain(shape)


@rule("write_view")
def write_view(reader: ChannelReader, node: fx.Node) -> Layout:
    """After an in-place change through a view: the change has united the channels already.

    Raises:
        NotUnderstood: if the change brought channels that the tensor does not have.
    """
    base, update = node.all_input_nodes[0], node.all_input_nodes[-1]
    known = {s for dim in reader.layouts[base] for s in reader.spaces.labelled(dim)}
    new = {s for dim in reader.layouts[update] for s in reader.spaces.labelled(dim)}
    if not new <= known:
        raise NotUnderstood("written into a part of another tensor")
    return reader.layouts[base]


@rule("select")
def selected(reader: ChannelReader, node: fx.Node) -> Layout:
    """One index of an axis is picked, which drops it: ``x.select(dim, i)``."""
    layout = reader.source(node)
    axis = axis_of(node, len(layout))
    reader.spaces.freeze(layout[axis], f"{node.name}: one channel is picked")
    return (*layout[:axis], *layout[axis + 1 :])


def indexed(
    reader: ChannelReader, layout: Layout, key: Any, shape: tuple[int, ...], where: str
) -> Layout:
    """The layout of ``x[key]``.

    Raises:
        NotUnderstood: for indices that are tensors.
    """
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, fx.Node | tuple | list) for k in keys):
        raise NotUnderstood("indexed by a tensor")
    if ... not in keys:
        keys = (*keys, ...)
    taken = sum(k is not None and k is not ... for k in keys)
    out: list[Dim] = []
    axis = 0
    for k in keys:
        if k is None:
            out.append(plain((1,))[0])
        elif k is ...:
            rest = len(layout) - taken
            out.extend(layout[axis : axis + rest])
            axis += rest
        elif isinstance(k, slice):
            out.append(sliced(reader, layout[axis], k, shape[len(out)], where))
            axis += 1
        else:
            reader.spaces.freeze(layout[axis], f"{where}: one channel is picked")
            axis += 1
    return tuple(out)


def sliced(reader: ChannelReader, dim: Dim, key: slice, length: int, where: str) -> Dim:
    """A slice of an axis; one of several equal parts keeps its channels' order inside."""
    size = size_of(dim)
    if length == size and key.step in (None, 1):
        return dim
    start = key.indices(size)[0] if not isinstance(key.start, fx.Node) else 1
    equal = length > 0 and size % length == 0 and start % length == 0
    if equal and key.step in (None, 1) and len(dim) == 1 and reader.spaces.labelled(dim):
        outer, inner = reader.spaces.reshape((dim,), (size // length, length), where)
        reader.spaces.freeze(outer, f"{where}: parts are told apart by their order")
        return inner
    reader.spaces.freeze(dim, f"{where}: a part of the channels is taken")
    return plain((length,))[0]


@rule("setitem")
def setitem(reader: ChannelReader, node: fx.Node) -> Layout:
    """``x[key] = value``: the channels written become those of the place.

    Raises:
        NotUnderstood: where a part of a tensor gets other channels.
    """
    target, key, value = node.args[:3]
    assert isinstance(target, fx.Node)
    layout = reader.layouts[target]
    if not isinstance(value, fx.Node):
        if isinstance(key, fx.Node):
            return elementwise(reader, node, [target, key])
        return layout
    if isinstance(key, fx.Node) and shape_of(key) == shape_of(target):
        return elementwise(reader, node, [target, key, value])
    shape = shape_of(target)
    index: Any = key
    probe = torch.empty(shape, device="meta")[index]
    part = indexed(reader, layout, key, tuple(probe.shape), node.name)
    united = unite_with(reader, part, value, node.name) if carries(reader, part) else None
    if united is not None or not carries(reader, reader.layouts[value]):
        return layout
    if not starts_uniform(target):
        raise NotUnderstood("written into a part of another tensor")
    return adopt(reader, layout, key, value, node.name)


def carries(reader: ChannelReader, layout: Layout) -> bool:
    """Whether any axis indexes channels."""
    return any(reader.spaces.labelled(dim) for dim in layout)


def adopt(reader: ChannelReader, layout: Layout, key: Any, value: fx.Node, where: str) -> Layout:
    """A buffer of zeros takes over the channels that are written into it.

    Raises:
        NotUnderstood: if only a part of an axis is written.
    """
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, slice) and k != slice(None) for k in keys) or ... in keys:
        raise NotUnderstood("written in parts")
    whole = [i for i in range(len(layout)) if i >= len(keys) or isinstance(keys[i], slice)]
    out = list(layout)
    for axis, dim in zip(whole, reader.layouts[value], strict=True):
        if size_of(dim) == size_of(out[axis]):
            out[axis] = dim
    return tuple(out)


@rule("chunk", "split", "tensor_split")
def chunk(reader: ChannelReader, node: fx.Node) -> Layout:
    """Equal parts of an axis: the parts keep their order, the channels inside go together.

    Raises:
        NotUnderstood: if the parts are of unequal length, or cut a concatenation.
    """
    layout = reader.source(node)
    items = [u for u in node.users if is_item(u)]
    sizes = {shape_of(u) for u in items}
    axis = axis_of(node, len(layout), position=2)
    if len(sizes) != 1 or len(layout[axis]) != 1:
        raise NotUnderstood("split into unequal parts")
    part = next(iter(sizes))[axis]
    count = size_of(layout[axis]) // part
    outer, inner = reader.spaces.reshape((layout[axis],), (count, part), node.name)
    reader.spaces.freeze(outer, f"{node.name}: parts are told apart by their order")
    for item in items:
        new = (*layout[:axis], inner, *layout[axis + 1 :])
        reader.items.setdefault(node, {})[item.args[1]] = new
    return plain(shape_of(node))


@rule("unbind")
def unbind(reader: ChannelReader, node: fx.Node) -> Layout:
    """A tensor taken apart along one axis."""
    layout = reader.source(node)
    axis = axis_of(node, len(layout))
    reader.spaces.freeze(layout[axis], f"{node.name}: channels are taken apart")
    for item in node.users:
        if is_item(item):
            new = (*layout[:axis], *layout[axis + 1 :])
            reader.items.setdefault(node, {})[item.args[1]] = new
    return plain(shape_of(node))
