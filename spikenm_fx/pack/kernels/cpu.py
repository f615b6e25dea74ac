# SPDX-License-Identifier: Apache-2.0
"""Run execution layouts with the native kernels: tensors in, tensors out."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from spikenm_fx.errors import PackError
from spikenm_fx.native.library import Call, Geometry, Kernels, Neuron, kernels
from spikenm_fx.native.threads import kernel_threads
from spikenm_fx.pack.kernels.layouts import Layout
from spikenm_fx.pack.weights.format import LayerGeometry

__all__ = [
    "LayerShape",
    "is_channels_last",
    "pack_spikes",
    "run_layer",
    "run_spikes",
]


class NeuronCall(Protocol):
    """A neuron that can be fused: gives its C structure, which points into tensors it keeps."""

    def structure(self) -> Neuron:
        """What the kernel is given of the neuron."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """All sizes of one layer call.

    Attributes:
        steps: time steps that are kept together (1 unless a neuron is fused).
        images: images, or tokens of a linear layer, per step.
        size: input height and width.
        out: output height and width.
        kernel: height and width.
        geometry: of the layer.
        channels: all input channels.
        outputs: all output channels.
        batch_major: steps of an image lie side by side in the batch, not images of a step.
    """

    steps: int
    images: int
    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    geometry: LayerGeometry
    channels: int
    outputs: int
    batch_major: bool = False

    @classmethod
    def of_call(
        cls, shape: torch.Size | tuple[int, ...], weight: tuple[int, ...], geometry: LayerGeometry
    ) -> LayerShape:
        """Sizes for an input of ``shape`` and a dense weight of shape ``weight``.

        Raises:
            PackError: if they do not fit each other.
        """
        if all(type(n) is int for n in shape):  # symbolic sizes of a compiler have no hash
            return _shape_of_call(tuple(shape), weight, geometry)
        return cls._of_call(tuple(shape), weight, geometry)

    @classmethod
    def _of_call(
        cls, shape: tuple[int, ...], weight: tuple[int, ...], geometry: LayerGeometry
    ) -> LayerShape:
        channels = weight[1] * geometry.groups
        if geometry.kind == "linear":
            if not shape or shape[-1] != channels:
                raise PackError(f"input {tuple(shape)}; a linear layer of {channels} features runs")
            images = math.prod(shape[:-1])
            return cls(1, images, (1, 1), (1, 1), (1, 1), geometry, channels, weight[0])
        if len(shape) != geometry.spatial + 2 or shape[1] != channels:
            raise PackError(
                f"input {tuple(shape)}; a {geometry.kind} of {channels} channels takes "
                f"(batch, {channels}, {', '.join('size' for _ in range(geometry.spatial))})"
            )
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                shape[2:],
                weight[2:],
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                strict=True,
            )
        )
        if min(out) < 1:
            raise PackError(f"input {tuple(shape)} is smaller than the kernel {weight[2:]}")
        size, kernel = _two(shape[2:]), _two(weight[2:])
        return cls(1, shape[0], size, _two(out), kernel, geometry, channels, weight[0])

    def result(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output for an input of ``shape``."""
        if self.geometry.kind == "linear":
            return (*shape[:-1], self.outputs)
        return (shape[0], self.outputs, *self.out[2 - self.geometry.spatial :])

    @property
    def rows(self) -> int:
        """Input rows (pixels or tokens) of all steps."""
        return self.steps * self.images * self.size[0] * self.size[1]

    @property
    def tokens(self) -> int:
        """Output pixels or tokens of all steps."""
        return self.steps * self.images * self.out[0] * self.out[1]

    @property
    def row_words(self) -> int:
        """64-bit words of one row of spikes."""
        groups = self.geometry.groups
        return groups * -(-self.channels // groups // 64)

    def structure(self) -> Geometry:
        """The C structure; kernels only read it, so calls of one shape share it."""
        return _structure(self)

    def _new_structure(self) -> Geometry:
        g = self.geometry
        one, none = (1,) * g.spatial, (0,) * g.spatial
        stride, dilation = g.stride or one, g.dilation or one
        return Geometry(
            self.steps,
            self.images,
            *self.size,
            *self.out,
            *self.kernel,
            *_two(stride),
            *_two(g.padding or none, fill=0),
            *_two(dilation),
            g.groups,
            self.channels // g.groups,
            self.outputs // g.groups,
            *((1, self.steps) if self.batch_major else (self.images, 1)),
        )


@lru_cache(maxsize=1024)
def _shape_of_call(
    shape: tuple[int, ...], weight: tuple[int, ...], geometry: LayerGeometry
) -> LayerShape:
    return LayerShape._of_call(shape, weight, geometry)


@lru_cache(maxsize=1024)
def _structure(shape: LayerShape) -> Geometry:
    return shape._new_structure()


def _two(values: tuple[int, ...] | torch.Size, fill: int = 1) -> tuple[int, int]:
    """Height and width; one spatial dimension lies along the width."""
    padded = (fill,) * (2 - len(values)) + tuple(values)
    return padded[0], padded[1]


def is_channels_last(x: Tensor) -> bool:
    """Whether an image batch lies pixel by pixel in memory (and not also channel by channel).

    Args:
        x: of any shape; only ``(N, C, H, W)`` can.
    """
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not (x.is_contiguous())
    )


def pack_spikes(x: Tensor, shape: LayerShape, native: Kernels) -> Tensor | None:
    """fp32 spikes as bits, int64 ``(rows, row_words)``; None unless all are exactly 0 or 1."""
    bits = torch.empty(shape.rows, shape.row_words, dtype=torch.int64, device="cpu")
    if not bits.numel():
        return bits
    groups, threads = shape.geometry.groups, kernel_threads()
    group_channels = shape.channels // groups
    pixels = shape.size[0] * shape.size[1]
    if shape.geometry.kind == "linear" or pixels == 1 or is_channels_last(x):
        x = x if is_channels_last(x) else x.contiguous()
        ok = native.pack_rows(
            x.data_ptr(), shape.rows, groups, group_channels, bits.data_ptr(), threads
        )
    else:
        x = x.contiguous()
        images = shape.steps * shape.images
        ok = native.pack_planes(
            x.data_ptr(), images, groups, group_channels, pixels, bits.data_ptr(), threads
        )
    return bits if ok else None


def run_layer(
    x: Tensor,
    layout: Layout,
    weight_shape: tuple[int, ...],
    geometry: LayerGeometry,
    bias: Tensor | None = None,
    *,
    level: str | None = None,
) -> Tensor | None:
    """Run a layer on fp32 ``x``; None where this kernel cannot (non-binary input, no kernels).

    The output has the memory format of the input.

    Args:
        x: ``(*, C)`` of a linear layer, ``(N, C, *spatial)`` of a convolution.
        layout: of the kernel that is to run.
        weight_shape: of the dense weight.
        geometry: of the layer.
        bias: fp32 ``(O,)`` or None.
        level: ISA level of the kernels; None for the best that this machine has.

    Raises:
        PackError: for a shape that the layer does not take.
    """
    native = kernels(level)
    if native is None:
        return None
    shape = LayerShape.of_call(x.shape, weight_shape, geometry)
    last = is_channels_last(x)
    out = torch.empty(
        shape.result(x.shape),
        dtype=torch.float32,
        device="cpu",
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    if not out.numel():
        return out
    if layout.kernel == "fma":
        source: Tensor | None = _rows_of(x, geometry)
    else:
        source = pack_spikes(x, shape, native)
    if source is None:
        return None
    first = geometry.kind != "linear" and not last and math.prod(shape.out) > 1
    if run_spikes(source, layout, shape, native, bias=bias, out=out, channels_first=first):
        return out
    return None


def _rows_of(x: Tensor, geometry: LayerGeometry) -> Tensor:
    """The input with all channels of a pixel side by side."""
    if geometry.kind == "linear":
        return x.contiguous()
    if geometry.kind == "conv1d":
        return x.transpose(1, 2).contiguous()
    return x.permute(0, 2, 3, 1).contiguous()


def run_spikes(
    source: Tensor,
    layout: Layout,
    shape: LayerShape,
    native: Kernels,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    channels_first: bool = False,
    out_bits: Tensor | None = None,
    neuron: NeuronCall | None = None,
) -> bool:
    """Call a kernel; False where it cannot serve.

    Args:
        source: bits, int64 ``(rows, row_words)``; for FMA fp32 ``(rows, channels)``.
        layout: of the kernel that is to run.
        shape: sizes of the call.
        native: the kernels.
        bias: fp32 ``(O,)`` or None.
        out: filled with the layer's output, fp32 ``(images, O, *spatial)`` or ``(tokens, O)``.
        channels_first: ``out`` lies channel by channel, not pixel by pixel.
        out_bits: filled with the neuron's spikes, int64 ``(tokens, words)``.
        neuron: integrates the output over the time steps.
    """
    geometry = shape.structure()
    neuron_structure = neuron.structure() if neuron else None
    call = Call(
        ctypes.pointer(geometry),
        source.data_ptr(),
        layout.weights.data_ptr(),
        layout.codes.data_ptr(),
        layout.blocks.data_ptr(),
        layout.blocks.shape[0],
        layout.kind,
        None if bias is None else bias.data_ptr(),
        None if layout.scale is None else layout.scale.data_ptr(),
        None if out is None else out.data_ptr(),
        int(channels_first),
        None if out_bits is None else out_bits.data_ptr(),
        ctypes.pointer(neuron_structure) if neuron_structure else None,
        kernel_threads(),
    )
    return bool(getattr(native, layout.kernel)(ctypes.byref(call)) == 0)
