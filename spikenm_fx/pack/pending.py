# SPDX-License-Identifier: Apache-2.0
"""Outputs of layers that wait for the neuron behind them, with or without a pool in between."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from spikenm_fx.errors import PackError
from spikenm_fx.native.library import kernels
from spikenm_fx.pack.backends.cpu import LayerShape, pack_spikes
from spikenm_fx.pack.backends.integrate import Pooling, run_integrate
from spikenm_fx.pack.lazy import LazyTensor
from spikenm_fx.pack.meter import Meter, metered
from spikenm_fx.pack.neuron import NeuronCall
from spikenm_fx.pack.spikes import SpikeBits

if TYPE_CHECKING:
    from spikenm_fx.pack.layer import PackedLayer

__all__ = ["Pending", "PooledSums", "plain", "rows_layout"]

ANALOG = ("dense", "reference", "fma")  # how layers run that see an image


@dataclass(slots=True, eq=False)
class Pending:
    """A layer's output that waits: for its neuron, or for somebody who wants the values.

    Attributes:
        layer: the layer.
        x: its input; lazy spikes stay bits.
        shape: sizes of the call.
        layout: shape and strides of the output; tokens of a linear layer count as one axis.
        version: of a plain input, which must not be written to before it is used.
    """

    layer: PackedLayer
    x: Tensor
    shape: LayerShape
    exposed: Tensor | None = None
    layout: Tensor = field(init=False)
    version: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.x, LazyTensor) and isinstance(self.x.source, SpikeBits):
            self.x = self.x.snapshot()
        plain = not isinstance(self.x, LazyTensor) and not self.x.is_inference()
        self.version = self.x._version if plain else None
        shape, strides = rows_layout(self.shape, self.x.shape)
        if self.shape.geometry.kind == "linear":
            shape, strides = (self.shape.tokens, self.channels), (self.channels, 1)
        self.layout = torch.empty_strided(shape, strides, dtype=torch.float32, device="meta")

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.shape.outputs

    @property
    def meter(self) -> Meter | None:
        """Of the layer."""
        return self.layer.meter

    def dense(self) -> Tensor:
        """Run the layer alone."""
        return self._dense(self.x)

    def values(self) -> Tensor:
        """Run the layer alone, as the layer that it replaces would."""
        self._check()
        return self.layer.run(self.x).reshape(self.layout.shape)

    def _dense(self, x: Tensor) -> Tensor:
        self._check()
        layout = self.layout
        y = self.layer.run(x, rows=True)
        y = y.reshape(-1, *layout.shape[1:])
        if y.stride() == layout.stride():
            return y
        return torch.empty_strided(y.shape, layout.stride(), dtype=y.dtype, device=y.device).copy_(
            y
        )

    def max_pool(self, kernel: list[int], stride: list[int], padding: list[int]) -> PooledSums:
        """The pooled output waits as well."""
        window, step, border = ((a, b) for a, b in (kernel, stride, padding))
        return PooledSums(self, Pooling(window, step, border, self.shape.out))

    @metered
    def fused(self, steps: int, neuron: NeuronCall) -> SpikeBits:
        """Run the layer and a neuron over ``steps`` time steps, which lead the batch."""
        shape = replace(self.shape, steps=steps, images=self.shape.images // steps)
        words = -(-shape.outputs // 64)
        bits = torch.empty(shape.tokens, words, dtype=torch.int64, device="cpu")
        if self._repeats(steps) or not self._in_kernel(shape, neuron, bits):
            self.integrated(steps, neuron, bits)
        return SpikeBits(bits, self.shape.images, shape.out, self.layout, shape.outputs)

    def integrated(
        self, steps: int, neuron: NeuronCall, bits: Tensor, pooling: Pooling | None = None
    ) -> None:
        """The layer first, the neuron on its output afterwards; all steps at once if alike."""
        repeats = self._repeats(steps)
        x = self.x[: self.x.shape[0] // steps] if repeats else self.x
        y = self._dense(x)
        rows = y.as_strided((y.numel() // self.channels, self.channels), (self.channels, 1))
        rows = rows.view(1 if repeats else steps, -1, self.channels)
        run_integrate(rows, neuron, None, bits, steps=steps if repeats else None, pooling=pooling)

    def _check(self) -> None:
        if self.version is not None and self.x._version != self.version:
            raise PackError(
                f"{self.layer.name}: its input was written to in place before the layer's neuron "
                "ran, and an engine runs both together; write to a copy of the input instead"
            )

    def _repeats(self, steps: int) -> bool:
        """Whether every step has the same input: a constant image, say, repeated over time."""
        x = self.x
        if isinstance(x, LazyTensor) or steps == 1 or x.shape[0] % steps:
            return False
        if self.layer.choice not in ANALOG:
            return False
        by_step = x.unflatten(0, (steps, -1))
        return all(torch.equal(by_step[0], by_step[t]) for t in range(1, steps))

    def _in_kernel(self, shape: LayerShape, neuron: NeuronCall, bits: Tensor) -> bool:
        self._check()
        layer = self.layer
        if layer.choice in ("dense", "reference") or shape.geometry.groups > 1:
            return False
        source: SpikeBits | Tensor | None
        if layer.choice == "fma":
            source = _rows(plain(self.x), shape)
        else:
            source = layer.bits_of(self.x)
            if source is None:
                native = kernels()
                assert native is not None
                source = pack_spikes(plain(self.x), self.shape, native)
        if source is None:
            return False
        return layer.call(source, shape, out_bits=bits, neuron=neuron)


@dataclass(slots=True, eq=False)
class PooledSums:
    """A layer's output, max-pooled, that waits for its neuron.

    Attributes:
        pending: the layer's output.
        pooling: of it.
    """

    pending: Pending
    pooling: Pooling
    exposed: Tensor | None = None
    shape: LayerShape = field(init=False)

    def __post_init__(self) -> None:
        self.shape = replace(self.pending.shape, out=self.pooling.out)

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.pending.channels

    @property
    def meter(self) -> Meter | None:
        """Of the layer."""
        return self.pending.layer.meter

    @property
    def layout(self) -> Tensor:
        """Shape and strides after pooling."""
        shape = (self.shape.images, self.channels, *self.pooling.out)
        form = torch.channels_last
        return torch.empty(shape, dtype=torch.float32, device="meta", memory_format=form)

    def dense(self) -> Tensor:
        """Run the layer, and pool."""
        p, y = self.pooling, self.pending.dense()
        pooled = F.max_pool2d(y, p.kernel, p.stride, p.padding)
        strides = self.layout.stride()
        return torch.empty_strided(
            pooled.shape, strides, dtype=pooled.dtype, device=pooled.device
        ).copy_(pooled)

    def values(self) -> Tensor:
        """Run the layer, and pool, channel by channel."""
        p = self.pooling
        return F.max_pool2d(self.pending.values(), p.kernel, p.stride, p.padding)

    def max_pool(self, *_: list[int]) -> None:
        """Two pools in a row get the values."""
        return

    @metered
    def fused(self, steps: int, neuron: NeuronCall) -> SpikeBits:
        """Run the layer, pool and integrate over ``steps`` time steps, which lead the batch."""
        words = -(-self.channels // 64)
        bits = torch.empty(self.shape.tokens, words, dtype=torch.int64, device="cpu")
        self.pending.integrated(steps, neuron, bits, self.pooling)
        return SpikeBits(bits, self.shape.images, self.shape.out, self.layout, self.channels)


def rows_layout(
    shape: LayerShape, input_shape: torch.Size | tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of an output whose memory runs pixel by pixel."""
    result = shape.result(input_shape)
    if shape.geometry.kind == "linear":
        return result, tuple(torch.empty(result, device="meta").stride())
    area = shape.out[0] * shape.out[1]
    within = (1,) if len(result) == 3 else (shape.out[1], 1)
    return result, (area * shape.outputs, 1, *(w * shape.outputs for w in within))


def plain(x: Tensor) -> Tensor:
    """The values of an input, in whatever order costs least."""
    return x.in_rows() if isinstance(x, LazyTensor) else x


def _rows(x: Tensor, shape: LayerShape) -> Tensor:
    if shape.geometry.kind == "linear":
        return x.contiguous()
    return x.movedim(1, -1).contiguous()
