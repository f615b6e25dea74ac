# SPDX-License-Identifier: Apache-2.0
"""Weight layers and the norms behind them as operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import BatchNormBase
from spikenm_fx.pack.eligible import computes_torchs, hooked, why_not_packable
from spikenm_fx.pack.engine.norms import affine_of
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight
from spikenm_fx.pack.weights.tightest import DENSE, tightest_pattern
from spikenm_fx.pattern import NM
from spikenm_fx.program.axes import Atom, Axes, Layout, size_of
from spikenm_fx.program.code import Code, Op
from spikenm_fx.program.draft import Draft, NotLowered, Ref, Value
from spikenm_fx.program.strided import COPY, strided
from spikenm_fx.program.tokens import outside, relaid

__all__ = ["Channels", "Layers", "see_features"]


@dataclass(eq=False, slots=True)
class _Layer:
    """A layer whose weight is stored when all that follows it is known."""

    op: Op
    name: str
    weight: Tensor
    bias: Tensor | None
    geometry: LayerGeometry
    flat: int


class Layers:
    """Lowers weight layers; stores their weights at the end.

    Args:
        draft: of the program.
        dtype: of the stored values, or None.
        nm: what each layer must be that is not entirely dense, or None.
    """

    def __init__(self, draft: Draft, dtype: Any, nm: NM | None) -> None:
        self.draft, self.dtype, self.nm = draft, dtype, nm
        self.packed: dict[str, PackedWeight] = {}
        self._layers: dict[int, _Layer] = {}  # by value
        self._norms: dict[tuple[str, int], Value] = {}

    def layer(self, name: str, module: Any, ref: Ref, shape: tuple[int, ...]) -> Ref:
        """A call of a Linear, Conv1d or Conv2d.

        Args:
            name: of the module.
            module: the layer.
            ref: its input.
            shape: of its output.

        Raises:
            NotLowered: for a layer that has no packed form, or on an input that it cannot read.
        """
        reason = why_not_packable(module, None)
        if reason:
            raise NotLowered(name, reason)
        if hooked(module) or not computes_torchs(module):
            raise NotLowered(name, "its own forward, or a hook, does more than torch's layer")
        geometry = LayerGeometry.of_layer(module, name=name)
        step = self.draft.step_of(name, ref)
        outputs = int(module.weight.shape[0])
        if geometry.kind == "linear":
            ref, flat = _flat(self.draft, name, ref)
            channels: tuple[Atom, ...] = (Atom(outputs, f"outputs of {name}"),)
            axes: Axes = (*ref.axes[:-1], channels)
            new = _each_pixel(ref, channels) if not flat else _one_pixel(ref, channels)
        elif _keeps_pixels(geometry, tuple(module.weight.shape[2:]), ref):
            flat, channels = 0, (Atom(outputs, f"channels of {name}"),)
            axes = (*ref.axes[:-2], channels, ref.axes[-1])
            new = _each_pixel(ref, channels)
        else:
            flat = 0
            see_features(self.draft, name, ref, geometry.spatial)
            channels = (Atom(outputs, f"channels of {name}"),)
            pixels = tuple(Atom(n, f"pixels of {name}") for n in shape[-geometry.spatial :])
            height, width = pixels if len(pixels) == 2 else (None, pixels[0])
            axes = (*ref.axes[: -1 - geometry.spatial], channels, *((p,) for p in pixels))
            new = Layout((*ref.value.layout.lead, *channels, *pixels), channels, height, width)

        def make() -> tuple[Value, ...]:
            made = self.draft.value(new)
            op = Op(Code.LAYER, (ref.value.number,), (made.number,), name=name)
            self.draft.ops.append(op)
            bias = None if module.bias is None else module.bias.detach()
            weight = module.weight.detach()
            self._layers[made.number] = _Layer(op, name, weight, bias, geometry, flat)
            return (made,)

        (value,) = self.draft.once((Code.LAYER, name), make, ref)
        return Ref(value, _as_made(axes, new, value.layout), step)

    def norm(self, name: str, module: nn.Module, ref: Ref, *, alone: bool) -> Ref:
        """A call of a batch norm.

        Args:
            name: of the module.
            module: the norm.
            ref: its input.
            alone: it is the only reader of its input.

        Raises:
            NotLowered: unless it is a batch norm along known channels.
        """
        layout = ref.value.layout
        key = (name, ref.value.number)
        if not isinstance(module, BatchNormBase) or hooked(module):
            raise NotLowered(name, f"a {type(module).__name__} has no operation; batch norms have")
        if key not in self._norms:
            layer = self._layers.get(ref.value.number)
            channels = _channels(name, ref)
            affine = affine_of(module, Channels(size_of(channels)))
            if affine is None:
                raise NotLowered(name, "it does something else than a batch norm in eval mode")
            if layer is not None and alone:
                factor, shift = affine
                view = factor.view(-1, *[1] * (layer.weight.dim() - 1))
                layer.weight = layer.weight * view
                layer.bias = shift if layer.bias is None else layer.bias * factor + shift
                self._norms[key] = ref.value
            else:
                self._norms[key] = self.draft.scaled(ref, *affine, name)
        value = self._norms[key]
        assert value.layout is layout
        return Ref(value, ref.axes, ref.step)

    def store(self) -> None:
        """Pack every weight and write the settings of its operation."""
        for layer in self._layers.values():
            pattern = tightest_pattern(layer.weight)
            if self.nm is not None and pattern != DENSE:
                pattern = self.nm
            packed = pack_weight(
                layer.weight, pattern, geometry=layer.geometry, dtype=self.dtype, name=layer.name
            )
            name, number = layer.name, 2
            while name in self.packed and self.packed[name] != packed:
                name, number = f"{layer.name}#{number}", number + 1
            self.packed[name] = packed
            parts = [f"{name}::values", f"{name}::indices"]
            scale = f"{name}::scale" if packed.scale is not None else None
            bias = None
            if layer.bias is not None:
                bias = self.draft.keep(f"{name}.bias".lstrip("."), layer.bias.float().contiguous())
            layer.op.tensors = (*parts, scale, bias)
            layer.op.settings = _settings(packed, layer.flat)


class Channels:
    """As much of a layer as :func:`affine_of` asks for."""

    def __init__(self, channels: int) -> None:
        self.weight = torch.empty(channels, 1)


def _settings(packed: PackedWeight, flat: int) -> tuple[int, ...]:
    g = packed.geometry
    linear = g.kind == "linear"

    def pair(values: tuple[int, ...], default: int) -> tuple[int, ...]:
        return (*[default] * (2 - len(values)), *values)  # a Conv1d is an image of one row

    kernel = pair(tuple(packed.shape[2:]), 1)
    return (
        packed.nm.keep,
        packed.nm.of,
        packed.out_channels,
        packed.group_channels,
        g.groups,
        *kernel,
        *pair(g.stride, 1),
        *pair(g.padding, 0),
        *pair(g.dilation, 1),
        flat if linear else 0,
    )


def _one_pixel(ref: Ref, channels: tuple[Atom, ...]) -> Layout:
    """Of one pixel, whose axes stay where they are none of those that the layer reads."""
    old = ref.value.layout
    left = {atom for group in ref.axes[:-1] for atom in group}
    height, width = (a if a in left else None for a in (old.height, old.width))
    pixels = (a for a in (height, width) if a is not None)
    return Layout((*old.lead, *channels, *pixels), channels, height, width)


def _each_pixel(ref: Ref, channels: tuple[Atom, ...]) -> Layout:
    """The same pixels with other channels."""
    old = ref.value.layout
    pixels = (a for a in (old.height, old.width) if a is not None)
    return Layout((*old.lead, *channels, *pixels), channels, old.height, old.width)


def _keeps_pixels(geometry: LayerGeometry, kernel: tuple[int, ...], ref: Ref) -> bool:
    """A Conv1d of one tap on all pixels of an image in a row."""
    layout = ref.value.layout
    return (
        len(kernel) == 1
        and len(ref.axes) > 1
        and layout.channels == ref.axes[-2]
        and ref.axes[-1] == (layout.height, layout.width)
        and (kernel, geometry.stride, geometry.padding) == ((1,), (1,), (0,))
    )


def _flat(draft: Draft, name: str, ref: Ref) -> tuple[Ref, int]:
    """How a Linear reads its input: 0 pixel by pixel, 1 as it lies, 2 as channel, height, width."""
    layout, given = ref.value.layout, ref.axes[-1]
    if layout.channels is None:
        layout.learn(given)
    seen = tuple(atom for atom in given if atom.size != 1)
    channels = tuple(a for a in layout.channels or () if a.size != 1)
    pixels = tuple(a for a in (layout.height, layout.width) if a is not None and a.size != 1)
    if seen == channels:
        return ref, 0 if pixels else 1
    if seen == (*channels, *pixels):
        return ref, 2
    if seen == (*pixels, *channels):
        return ref, 1
    if set(seen) == {*channels, *pixels}:
        new = Layout((*layout.lead, *seen), seen)
        copied = strided(draft, name, COPY, new, [((a,), (a,), ()) for a in seen], ref)
        return Ref(copied, (*ref.axes[:-1], seen), ref.step), 1
    if all(atom in layout.features for atom in seen):
        return relaid(draft, name, ref, given), 0
    raise NotLowered(
        name,
        "its input mixes channels with other axes than those of one token",
        inside=outside(draft, ref, given),
    )


def see_features(draft: Draft, name: str, ref: Ref, spatial: int) -> tuple[Atom, ...]:
    """The last axes of an input are channels and pixels: check that, or learn it.

    Args:
        draft: of the program.
        name: of the module that says so.
        ref: its input.
        spatial: axes of pixels, 1 or 2.

    Returns:
        The channels.

    Raises:
        NotLowered: if they are not.
    """
    layout = ref.value.layout
    channels, *pixels = ref.axes[-1 - spatial :]
    known = set(layout.features) - {atom for group in (channels, *pixels) for atom in group}
    if layout.channels is None and all(len(p) == 1 for p in pixels) and not known:
        layout.channels = channels
        layout.height = pixels[0][0] if spatial == 2 else None
        layout.width = pixels[-1][0]
    wanted = (layout.height, layout.width)[2 - spatial :]
    axes = [() if atom is None else (atom,) for atom in wanted]
    fits = all(p == k or size_of(p) == size_of(k) == 1 for p, k in zip(pixels, axes, strict=True))
    other = layout.height if spatial == 1 else None
    if layout.channels != channels or not fits or (other is not None and other.size != 1):
        raise NotLowered(
            name,
            "its input's last axes are not the channels and pixels of an image",
            inside=outside(draft, ref, channels, *pixels),
        )
    return channels


def _channels(name: str, ref: Ref) -> tuple[Atom, ...]:
    layout = ref.value.layout
    if layout.channels is None:
        raise NotLowered(name, "it comes before any layer, so that its channels are not known")
    if layout.channels not in ref.axes:
        raise NotLowered(name, "its channels are flattened with the pixels of an image")
    return layout.channels


def _as_made(axes: Axes, new: Layout, made: Layout) -> Axes:
    """``axes`` in the atoms of the value that was made at the first step."""
    left, same = list(made.atoms), {}
    for atom in new.atoms:
        parts = [left.pop(0)]
        while size_of(tuple(parts)) < atom.size:  # it was split since
            parts.append(left.pop(0))
        same[atom] = tuple(parts)
    return tuple(tuple(p for atom in g for p in same.get(atom, (atom,))) for g in axes)
