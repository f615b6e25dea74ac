# SPDX-License-Identifier: Apache-2.0
"""Run neurons natively on sums that something else has computed, max-pooled on the way."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

from spikenm_fx.native.library import Call, kernels
from spikenm_fx.native.threads import kernel_threads
from spikenm_fx.pack.kernels.cpu import LayerShape, NeuronCall
from spikenm_fx.pack.weights.format import LayerGeometry

__all__ = ["Pooling", "run_integrate"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """A max-pooling of images: window, stride and padding, and the images before and after it."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    size: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        """Height and width after it."""
        sizes = zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        return height, width


def run_integrate(
    x: Tensor,
    neuron: NeuronCall,
    out: Tensor | None,
    out_bits: Tensor | None = None,
    *,
    steps: int | None = None,
    pooling: Pooling | None = None,
) -> bool:
    """Run a neuron over all steps; False where there are no kernels.

    Args:
        x: inputs, ``[steps][pixels][channels]`` in memory; its shape is (steps, pixels, channels).
        neuron: the rule, with the state that is updated in place.
        out: fp32 spikes, ``[steps][pixels after pooling][channels]``, or None.
        out_bits: int64 ``(steps * pixels after pooling, words)``, or None.
        steps: of the neuron, where ``x`` is one step that is the input of all; else None.
        pooling: pool the inputs first; ``pixels`` are those of whole images then.
    """
    native = kernels()
    if native is None:
        return False
    given, pixels, channels = x.shape
    if not x.numel():
        return True
    shape = _shape(given if steps is None else steps, pixels, channels, pooling)
    geometry, structure = shape.structure(), neuron.structure()
    call = Call(
        geometry=ctypes.pointer(geometry),
        input=x.data_ptr(),
        kind=int(steps is not None),
        out=None if out is None else out.data_ptr(),
        out_bits=None if out_bits is None else out_bits.data_ptr(),
        neuron=ctypes.pointer(structure),
        threads=kernel_threads(),
    )
    return bool(native.integrate(ctypes.byref(call)) == 0)


def _shape(steps: int, pixels: int, channels: int, pooling: Pooling | None) -> LayerShape:
    if pooling is None:
        one = (1, 1)
        return LayerShape(steps, pixels, one, one, one, LayerGeometry(), channels, channels)
    geometry = LayerGeometry.conv(2, stride=pooling.stride, padding=pooling.padding)
    images = pixels // (pooling.size[0] * pooling.size[1])
    return LayerShape(
        steps, images, pooling.size, pooling.out, pooling.kernel, geometry, channels, channels
    )
