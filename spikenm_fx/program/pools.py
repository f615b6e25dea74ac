# SPDX-License-Identifier: Apache-2.0
"""Pools over the pixels of an image."""

from __future__ import annotations

from typing import Any

from spikenm_fx.program.axes import Atom, Layout
from spikenm_fx.program.calls import Call, Function
from spikenm_fx.program.code import Code
from spikenm_fx.program.draft import Ref, Value
from spikenm_fx.program.layers import see_features

__all__ = ["POOLS", "pooled"]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _max_pool(call: Call) -> Ref:
    if call.get(6, "return_indices", False):
        raise call.refuse("it returns indices")
    kernel = _pair(call.get(1, "kernel_size"))
    stride = _pair(call.get(2, "stride") or kernel)
    padding, dilation = _pair(call.get(3, "padding", 0)), _pair(call.get(4, "dilation", 1))
    return _pool(call, 0, (*kernel, *stride, *padding, *dilation, 0, 0))


def _avg_pool(call: Call) -> Ref:
    kernel = _pair(call.get(1, "kernel_size"))
    stride = _pair(call.get(2, "stride") or kernel)
    padding = _pair(call.get(3, "padding", 0))
    counts = int(call.get(5, "count_include_pad", True))
    divisor = call.get(6, "divisor_override") or 0
    return _pool(call, 1, (*kernel, *stride, *padding, 1, 1, counts, divisor))


def _adaptive_max(call: Call) -> Ref:
    return _pool(call, 2, ())


def _adaptive_mean(call: Call) -> Ref:
    return _pool(call, 3, ())


def _pool(call: Call, mode: int, settings: tuple[int, ...]) -> Ref:
    ref = call.ref()
    see_features(call.draft, call.where, ref, 2)
    assert call.shape is not None
    value = pooled(call, ref, mode, (call.shape[-2], call.shape[-1]), settings)
    layout = value.layout
    pixels = (layout.height, layout.width)
    axes = (*ref.axes[:-2], *((p,) for p in pixels if p is not None))
    return Ref(value, axes, call.draft.step_of(call.where, ref))


def pooled(
    call: Call, ref: Ref, mode: int, size: tuple[int, int], settings: tuple[int, ...] = ()
) -> Value:
    """The value of a pool.

    Args:
        call: the operation.
        ref: what it reads.
        mode: as :class:`~spikenm_fx.program.code.Code` numbers them.
        size: height and width of the result.
        settings: the others, none for adaptive ones.
    """
    old = ref.value.layout
    key = (Code.POOL, mode, size, settings)

    def make() -> tuple[Value, ...]:
        height, width = (Atom(n, "pixels") for n in size)
        atoms = (*old.lead, *(old.channels or ()), height, width)
        layout = Layout(atoms, old.channels, height, width)
        bits = ref.value.bits and mode == 0
        full = (mode, *(settings or (1, 1, 1, 1, 0, 0, 1, 1, 0, 0)))
        return (call.draft.apply(Code.POOL, layout, ref, settings=full, bits=bits),)

    return call.draft.once(key, make, ref)[0]


POOLS: dict[str, Function] = {
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_max_pool2d": _adaptive_max,
    "adaptive_avg_pool2d": _adaptive_mean,
}
"""What becomes of a pool, by its name."""
