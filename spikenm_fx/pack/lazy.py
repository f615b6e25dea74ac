# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not there yet: spikes kept as bits, and layers that wait for their neuron.

A packed layer returns a :class:`LazyTensor` where a neuron is expected to follow.  A fused neuron
recognises it and runs layer and neuron in one kernel; its spikes leave as another lazy tensor that
holds bits, which the next packed layer reads.  Any other operation simply gets the values: laziness
never changes a result, only what is computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from spikenm_fx.native.library import kernels

__all__ = ["LazyTensor", "Source", "SpikeBits"]

aten = torch.ops.aten

VIEWS = frozenset(
    (
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
    )
)


class Source(Protocol):
    """What a lazy tensor stands for.

    Attributes:
        exposed: the values, once somebody may write to their memory; they alone count then.
    """

    exposed: Tensor | None

    @property
    def layout(self) -> Tensor:
        """A meta tensor with the shape and strides that :meth:`dense` will have."""

    def dense(self) -> Tensor:
        """The values, fp32."""


@dataclass(slots=True, eq=False)
class SpikeBits:
    """Spikes of a batch as bits.

    Attributes:
        bits: int64 ``(images * height * width, words)``, one row per pixel, bit 0 first.
        images: of all time steps.
        size: height and width; (1, 1) for tokens of a linear layer.
        layout: the fp32 tensor that these spikes are, on the meta device.
        channels: of a row.
    """

    bits: Tensor
    images: int
    size: tuple[int, int]
    layout: Tensor
    channels: int
    exposed: Tensor | None = field(default=None, repr=False)
    _dense: Tensor | None = field(default=None, repr=False)

    def dense(self) -> Tensor:
        """fp32 zeros and ones, pixel by pixel in memory."""
        if self._dense is None:
            native = kernels()
            assert native is not None  # bits come from the kernels
            out = torch.empty_strided(self.layout.shape, self.layout.stride())
            native.unpack_rows(
                self.bits.data_ptr(),
                self.bits.shape[0],
                1,
                self.channels,
                out.data_ptr(),
                torch.get_num_threads(),
            )
            self._dense = out
        return self._dense

    def max_pool(self, kernel: list[int], stride: list[int], padding: list[int]) -> SpikeBits:
        """Max-pooling of spikes: the OR of the rows in a window."""
        h, w = self.size
        words = self.bits.shape[1]
        grid = self.bits.view(self.images, h, w, words)
        if any(padding):
            grid = torch.nn.functional.pad(
                grid, [0, 0, padding[1], padding[1], padding[0], padding[0]]
            )
        out_h = (h + 2 * padding[0] - kernel[0]) // stride[0] + 1
        out_w = (w + 2 * padding[1] - kernel[1]) // stride[1] + 1
        pooled: Tensor | None = None
        for dy in range(kernel[0]):
            for dx in range(kernel[1]):
                part = grid[
                    :,
                    dy : dy + (out_h - 1) * stride[0] + 1 : stride[0],
                    dx : dx + (out_w - 1) * stride[1] + 1 : stride[1],
                ]
                pooled = part.clone() if pooled is None else pooled.bitwise_or_(part)
        assert pooled is not None
        shape = (self.images, self.channels, out_h, out_w)
        layout = torch.empty(shape, device="meta", memory_format=torch.channels_last)
        bits = pooled.reshape(self.images * out_h * out_w, words)
        return SpikeBits(bits, self.images, (out_h, out_w), layout, self.channels)


class LazyTensor(torch.Tensor):
    """A tensor whose values are computed when an operation first needs them.

    Attributes:
        source: what it stands for.
        meta_tensor: its own shape and strides.
        views: view operations between the source and this tensor.
    """

    source: Source
    meta_tensor: Tensor
    views: tuple[Callable[[Tensor], Tensor], ...]

    @staticmethod
    def __new__(
        cls: type[LazyTensor],
        source: Source,
        meta_tensor: Tensor | None = None,
        views: tuple[Callable[[Tensor], Tensor], ...] = (),
    ) -> LazyTensor:
        """A lazy tensor for ``source``, seen through ``views``."""
        meta = source.layout if meta_tensor is None else meta_tensor
        self: Any = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=torch.float32, device=torch.device("cpu")
        )
        self.source, self.meta_tensor, self.views = source, meta, views
        lazy: LazyTensor = self
        return lazy

    def materialize(self) -> Tensor:
        """The values."""
        value = self.source.dense() if self.source.exposed is None else self.source.exposed
        for view in self.views:
            value = view(value)
        return value

    def expose(self) -> None:
        """Give the values a memory of their own, which an in-place operation or a view may hold.

        All lazy tensors of this source see what is written there, and none of them uses the bits
        or the waiting layer any more.
        """
        if self.source.exposed is None:
            self.source.exposed = self.source.dense()

    @property
    def fusable(self) -> bool:
        """Whether the source itself, rather than its values, may still be used."""
        return self.source.exposed is None

    @property
    def only_leading(self) -> bool:
        """Whether the views merely split or merged leading (time, batch) axes of the source."""
        base, now = self.source.layout, self.meta_tensor
        tail = base.dim() - 1
        if now.dim() < tail or now.shape[now.dim() - tail :] != base.shape[1:]:
            return False
        if now.stride()[now.dim() - tail :] != base.stride()[1:]:
            return False
        step = base.stride(0)
        for length, stride in zip(
            reversed(now.shape[: now.dim() - tail]),
            reversed(now.stride()[: now.dim() - tail]),
            strict=True,
        ):
            if length != 1 and stride != step:
                return False
            step *= length
        return True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {type(self.source).__name__})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Views stay lazy, max-pooling of bits stays bits, everything else gets the values."""
        kwargs = kwargs or {}
        if func in VIEWS and isinstance(args[0], LazyTensor):
            return _view(func, args, kwargs)
        if func is aten.max_pool2d_with_indices.default and isinstance(args[0], LazyTensor):
            pooled = _max_pool(*args, **kwargs)
            if pooled is not None:
                # No caller can ask for the indices: that path differentiates, which we refuse.
                return pooled, torch.empty(pooled.shape, dtype=torch.int64, device="meta")
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            tree_map(_expose, (args, kwargs))  # it writes, or its result is a view of the memory
        args, kwargs = tree_map(_values, (args, kwargs))
        return func(*args, **kwargs)


def _expose(x: Any) -> None:
    if isinstance(x, LazyTensor):
        x.expose()


def _values(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyTensor) else x


def _view(func: Any, args: Any, kwargs: Any) -> LazyTensor:
    x, rest = args[0], args[1:]

    def view(value: Tensor) -> Tensor:
        seen: Tensor = func(value, *rest, **kwargs)
        return seen

    return LazyTensor(x.source, view(x.meta_tensor), (*x.views, view))


def _max_pool(
    x: LazyTensor,
    kernel: list[int],
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    ceil_mode: bool = False,
) -> LazyTensor | None:
    source = x.source
    if not isinstance(source, SpikeBits) or not x.fusable or not x.only_leading:
        return None
    if ceil_mode or x.dim() != 4:
        return None
    if any(d != 1 for d in dilation or [1]):
        return None
    kernel = _pair(kernel)
    return LazyTensor(source.max_pool(kernel, _pair(stride or kernel), _pair(padding or [0])))


def _pair(values: list[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)
