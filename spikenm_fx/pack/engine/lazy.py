# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not there yet: spikes kept as bits, and layers that wait for their neuron.

A packed layer returns a :class:`LazyTensor` where a neuron is expected to follow.  A fused neuron
recognises it and runs layer and neuron in one kernel; its spikes leave as another lazy tensor that
holds bits, which the next packed layer reads.  Any other operation simply gets the values: laziness
never changes a result, only what is computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from spikenm_fx._torch import make_wrapper, may_alias, tree_map
from spikenm_fx.pack.engine.spikes import SpikeBits, in_row_order

__all__ = ["LazySource", "LazyTensor", "SpikeBits"]

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


class LazySource(Protocol):
    """What a lazy tensor stands for.

    Attributes:
        exposed: the values, once somebody may write to their memory; they alone count then.
    """

    exposed: Tensor | None

    @property
    def layout(self) -> Tensor:
        """A meta tensor with the shape and strides that :meth:`dense` will have."""

    def dense(self) -> Tensor:
        """The values, fp32, laid out as ``layout``: pixel by pixel."""

    def values(self) -> Tensor:
        """The values, fp32, contiguous."""

    def max_pool(
        self, kernel: list[int], stride: list[int], padding: list[int]
    ) -> LazySource | None:
        """What stands for the pooled values, or None."""


@dataclass(slots=True, eq=False)
class _Values:
    """A source whose values are there already."""

    exposed: Tensor

    @property
    def layout(self) -> Tensor:
        return self.exposed.to("meta")

    def dense(self) -> Tensor:
        return self.exposed

    def values(self) -> Tensor:
        return self.exposed

    def max_pool(self, *_: Any) -> None:
        return None


class LazyTensor(torch.Tensor):
    """A tensor whose values are computed when an operation first needs them.

    Attributes:
        source: what it stands for.
        meta_tensor: its own shape and strides.
        views: view operations between the source and this tensor.
    """

    source: LazySource
    meta_tensor: Tensor
    views: tuple[Callable[[Tensor], Tensor], ...]

    @staticmethod
    def __new__(
        cls: type[LazyTensor],
        source: LazySource,
        meta_tensor: Tensor | None = None,
        views: tuple[Callable[[Tensor], Tensor], ...] = (),
    ) -> LazyTensor:
        """A lazy tensor for ``source``, seen through ``views``."""
        meta = source.layout if meta_tensor is None else meta_tensor
        self: Any = make_wrapper(
            cls, meta.shape, strides=meta.stride(), dtype=torch.float32, device=torch.device("cpu")
        )
        self.source, self.meta_tensor, self.views = source, meta, views
        lazy: LazyTensor = self
        return lazy

    def materialize(self) -> Tensor:
        """The values, in the memory format that the model's own layers would leave."""
        base = self.source.exposed
        if base is not None:
            try:
                return self._seen(base)
            except RuntimeError:  # views of rows that contiguous memory does not allow
                return self._seen(torch.empty_like(self.source.layout, device="cpu").copy_(base))
        try:
            return self._seen(self.source.values())
        except RuntimeError:
            return self._seen(self.source.dense()).contiguous()

    def numpy(self, *, force: bool = False) -> Any:
        """The values; torch has no such thing for tensors without memory."""
        return self.materialize().numpy(force=force)

    def tolist(self) -> Any:
        """The values, as nested lists."""
        return self.materialize().tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """The values, for numpy's functions."""
        return self.materialize().__array__(*args, **kwargs)

    def in_rows(self) -> Tensor:
        """The values, pixel by pixel in memory where that is possible."""
        return self._seen(self.source.dense()) if self.fusable else self.materialize()

    def snapshot(self) -> LazyTensor:
        """The same bits; what is written to this tensor later does not reach it."""
        if not self.fusable or not isinstance(self.source, SpikeBits):
            return self
        return LazyTensor(self.source.copy(), self.meta_tensor, self.views)

    def _seen(self, value: Tensor) -> Tensor:
        for view in self.views:
            value = view(value)
        return value

    def expose(self) -> None:
        """Give the values a memory of their own, which an in-place operation or a view may hold.

        All lazy tensors of this source see what is written there, and none of them uses the bits
        or the waiting layer any more.
        """
        if self.source.exposed is not None:
            return
        values = self.source.values()
        try:
            self._seen(values)
        except RuntimeError:
            values = self.source.dense()
        self.source.exposed = values

    @property
    def fusable(self) -> bool:
        """Whether the source itself, rather than its values, may still be used."""
        return self.source.exposed is None

    def rows(self, channel_axis: int, channels: int) -> bool:
        """Whether the rows of the source, in their order, are the pixels of this tensor.

        Views may have split or merged time, batch and space; channels lie along ``channel_axis``.
        """
        return in_row_order(self.meta_tensor, channel_axis, channels)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {type(self.source).__name__})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Views stay lazy, what :data:`ON_SOURCES` can do stays bits, the rest gets the values."""
        kwargs = kwargs or {}
        if func in VIEWS and isinstance(args[0], LazyTensor):
            return _view(func, args, kwargs)
        if func in ON_SOURCES:
            result = ON_SOURCES[func](*args, **kwargs)
            if result is not None:
                return result
        if may_alias(func):
            tree_map(_expose, (args, kwargs))  # it writes, or its result is a view of the memory
        args, kwargs = tree_map(_values, (args, kwargs))
        return func(*args, **kwargs)


def _expose(x: Any) -> None:
    if isinstance(x, LazyTensor):
        x.expose()


def _values(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyTensor) else x


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    x, rest = args[0], args[1:]

    def view(value: Tensor) -> Tensor:
        seen: Tensor = func(value, *rest, **kwargs)
        return seen

    try:
        meta = view(x.meta_tensor)
    except RuntimeError:  # rows do not allow it; the values of the model's own layers may
        value = x.materialize().contiguous()
        x.source, x.meta_tensor, x.views = _Values(value), value.to("meta"), ()
        return view(value)
    return LazyTensor(x.source, meta, (*x.views, view))


def _clone(x: Any, **_: Any) -> LazyTensor | None:
    """Bits need no copy of their values; the clone merely forgets who writes to the original."""
    bits = _bits(x)
    if bits is None:
        return None
    return LazyTensor(bits.copy(), x.meta_tensor, x.views)


def _add(x: Any, y: Any, *, alpha: float = 1) -> LazyTensor | None:
    return _joined(SpikeBits.plus, x, y) if alpha == 1 else None


def _multiply(x: Any, y: Any) -> LazyTensor | None:
    return _joined(SpikeBits.times, x, y)


def _joined(
    join: Callable[[SpikeBits, SpikeBits], SpikeBits | None], x: Any, y: Any
) -> LazyTensor | None:
    """Two tensors of bits that lie alike, joined word by word."""
    a, b = _bits(x), _bits(y)
    if a is None or b is None or a.channels != b.channels or not _alike(x, y):
        return None
    result = join(a, b)
    return None if result is None else LazyTensor(result, x.meta_tensor, x.views)


def _complement(x: Any, other: Any, alpha: float = 1) -> LazyTensor | None:
    bits = _bits(x)
    if bits is None or isinstance(other, Tensor) or other != 1 or alpha != 1:
        return None
    result = bits.complement()
    return None if result is None else LazyTensor(result, x.meta_tensor, x.views)


def _bits(x: Any) -> SpikeBits | None:
    if not isinstance(x, LazyTensor) or not isinstance(x.source, SpikeBits) or not x.fusable:
        return None
    return x.source if x.meta_tensor.numel() == x.source.layout.numel() else None  # not expanded


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether the same index means the same place in memory."""
    if x.shape != y.shape:
        return False
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    return all(length == 1 or a == b for length, a, b in strides)


def _max_pool(
    x: Any,
    kernel: list[int],
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    ceil_mode: bool = False,
) -> tuple[LazyTensor, Tensor] | None:
    if not _is_image_batch(x) or ceil_mode or any(d != 1 for d in dilation or [1]):
        return None
    kernel = _pair(kernel)
    pooled = x.source.max_pool(kernel, _pair(stride or kernel), _pair(padding or [0]))
    if pooled is None:
        return None
    lazy = LazyTensor(pooled)
    # No caller can ask for the indices: that path differentiates, which we refuse.
    return lazy, torch.empty(lazy.shape, dtype=torch.int64, device="meta")


def _avg_pool(
    x: Any,
    kernel: list[int],
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> LazyTensor | None:
    bits = _bits(x)
    if bits is None or not _is_image_batch(x) or ceil_mode or divisor_override is not None:
        return None
    if any(padding or [0]):
        return None
    kernel = _pair(kernel)
    pooled = bits.avg_pool(kernel, _pair(stride or kernel))
    return None if pooled is None else LazyTensor(pooled)


def _is_image_batch(x: Any) -> bool:
    """Whether ``x`` is its source's own ``(images, channels, height, width)``."""
    return (
        isinstance(x, LazyTensor)
        and x.fusable
        and x.dim() == 4
        and _alike(x.meta_tensor, x.source.layout)
    )


def _pair(values: list[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


ON_SOURCES: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _clone,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _multiply,
    aten.rsub.Scalar: _complement,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
}
"""Operations that may stay with the source: each gives None where it must have the values."""
