# SPDX-License-Identifier: Apache-2.0
"""The kernels as ``torch.library`` operators, so that compile and export see through them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from spikenm_fx.errors import PackError
from spikenm_fx.native.library import KERNELS, available_kernels
from spikenm_fx.pack.engine.neuron import NeuronCall
from spikenm_fx.pack.kernels.cpu import LayerShape, is_channels_last, run_layer
from spikenm_fx.pack.kernels.integrate import run_integrate
from spikenm_fx.pack.kernels.layouts import Layout, layout_for, supports
from spikenm_fx.pack.kernels.reference import dense_layer, packed_layer
from spikenm_fx.pack.weights.format import (
    LayerGeometry,
    LayerKind,
    PackedWeight,
    unpack_weight,
)
from spikenm_fx.pattern import NM

__all__ = ["SMALL", "geometry_list", "integrate", "sparse_layer", "sparse_layer_as_stored"]

KINDS: tuple[LayerKind, ...] = ("linear", "conv1d", "conv2d")

_library = Library("spikenm_fx", "DEF")  # custom_op costs three times as much a call
_library.define(
    "sparse_layer(Tensor x, Tensor weights, Tensor codes, Tensor blocks, Tensor? row_scale, "
    "Tensor values, Tensor indices, Tensor? scale, Tensor? bias, int[] weight_shape, "
    "int[] geometry, int[] pattern, int kernel, int kind) -> Tensor"
)
_library.define(
    "sparse_layer_as_stored(Tensor x, Tensor values, Tensor indices, Tensor? scale, Tensor? bias, "
    "int[] weight_shape, int[] geometry, int[] pattern, str kernel) -> Tensor"
)
_library.define("integrate(Tensor x, Tensor v, Tensor parameters, int[] modes) -> (Tensor, Tensor)")


def geometry_list(geometry: LayerGeometry) -> list[int]:
    """A geometry as the operator takes it: kind, groups, stride, padding, dilation."""
    numbers = (*geometry.stride, *geometry.padding, *geometry.dilation)
    return [KINDS.index(geometry.kind), geometry.groups, *numbers]


def _geometry(numbers: list[int]) -> LayerGeometry:
    kind, groups, *rest = numbers
    n = len(rest) // 3
    stride, padding, dilation = (tuple(rest[i * n : (i + 1) * n]) for i in range(3))
    return LayerGeometry(KINDS[kind], stride, padding, dilation, groups)


def _sparse_layer(
    x: Tensor,
    weights: Tensor,
    codes: Tensor,
    blocks: Tensor,
    row_scale: Tensor | None,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight_shape: list[int],
    geometry: list[int],
    pattern: list[int],
    kernel: int,
    kind: int,
) -> Tensor:
    if x.dtype != torch.float32:
        raise PackError(f"the input is {x.dtype}; packed layers run in float32")
    layout = Layout(KERNELS[kernel], weights, codes, blocks, kind, row_scale)
    about = _geometry(geometry)
    result = run_layer(x, layout, tuple(weight_shape), about, bias)
    if result is None:  # analog input for a spike kernel, or no compiled kernels here
        packed = PackedWeight(NM(*pattern), tuple(weight_shape), about, values, indices, scale)
        result = packed_layer(x, packed, bias)
        form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        result = result.contiguous(memory_format=form)
    return result


def _sparse_layer_as_stored(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    weight_shape: list[int],
    geometry: list[int],
    pattern: list[int],
    kernel: str,
) -> Tensor:
    about = _geometry(geometry)
    packed = PackedWeight(NM(*pattern), tuple(weight_shape), about, values, indices, scale)
    layout = _derived(packed, kernel)
    if isinstance(layout, Tensor):
        y = dense_layer(x, layout, bias, about)
        return y if is_channels_last(x) else y.contiguous()
    parts = layout.weights, layout.codes, layout.blocks, layout.scale
    kind, number = layout.kind, KERNELS.index(layout.kernel)
    return _sparse_layer(
        x, *parts, values, indices, scale, bias, weight_shape, geometry, pattern, number, kind
    )


SMALL = "small"
"""The kernel ``fma`` on the stored values themselves, as ``pack(memory="small")`` has it."""

_made: weakref.WeakKeyDictionary[Any, dict[tuple[int, int, str], Layout | Tensor]] = (
    weakref.WeakKeyDictionary()
)
"""What was derived of packed values, by their memory: for as long as that is there."""


def _derived(packed: PackedWeight, kernel: str) -> Layout | Tensor:
    """The layout of a kernel, or the dense weight where it cannot run here."""
    made = _made.setdefault(packed.values.untyped_storage(), {})
    version = 0 if packed.values.is_inference() else packed.values._version
    key = int(packed.values.storage_offset()), version, kernel
    if key not in made:
        for old in [k for k in made if k[0] == key[0] and k[1] != key[1]]:
            del made[old]  # other values lay there
        small = kernel == SMALL
        name = "fma" if small else kernel
        native = next((k for k in KERNELS if k == name and k in available_kernels()), None)
        if native is not None and supports(native, packed):
            made[key] = layout_for(native, packed, small=small)
        else:
            made[key] = unpack_weight(packed).float()
    return made[key]


def _sparse_layer_shape(x: Tensor, *, weight_shape: list[int], geometry: list[int]) -> Tensor:
    shape = LayerShape.of_call(x.shape, tuple(weight_shape), _geometry(geometry))
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(
        shape.result(x.shape), dtype=torch.float32, device=x.device, memory_format=form
    )


def _integrate(x: Tensor, v: Tensor, parameters: Tensor, modes: list[int]) -> tuple[Tensor, Tensor]:
    after = v.clone(memory_format=torch.contiguous_format)
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not run_integrate(x.contiguous(), NeuronCall(parameters, modes, after), spikes):
        raise PackError("the native kernels are not available; see native_status()")
    return spikes, after


_library.impl("sparse_layer", _sparse_layer, "CPU")
_library.impl("sparse_layer_as_stored", _sparse_layer_as_stored, "CPU")
_library.impl("integrate", _integrate, "CPU")


@register_fake("spikenm_fx::sparse_layer", lib=_library)
def _(x, weights, codes, blocks, row_scale, values, indices, scale, bias, *rest):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
    return _sparse_layer_shape(x, weight_shape=rest[0], geometry=rest[1])


@register_fake("spikenm_fx::sparse_layer_as_stored", lib=_library)
def _(x, values, indices, scale, bias, *rest):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN202
    return _sparse_layer_shape(x, weight_shape=rest[0], geometry=rest[1])


@register_fake("spikenm_fx::integrate", lib=_library)
def _(x, v, parameters, modes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return x.new_empty(x.shape), v.new_empty(v.shape)


sparse_layer = torch.ops.spikenm_fx.sparse_layer
"""Run a packed layer on fp32 ``x``; non-binary input reaches the exact reference instead."""

sparse_layer_as_stored = torch.ops.spikenm_fx.sparse_layer_as_stored
"""The same from packed values alone; what kernels read is derived when it first runs."""

integrate = torch.ops.spikenm_fx.integrate
"""``(T, rows, channels)`` inputs and ``(rows, channels)`` membranes -> spikes and new membranes."""
