# SPDX-License-Identifier: Apache-2.0
"""Average and sum pools, in NIR's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["pool_options"]


def pool_options(
    name: str, shape: tuple[int, ...], args: Sequence[Any], kwargs: Any, module: Any
) -> dict[str, Any] | str:
    """Kernel, stride and padding as pairs; a sentence where NIR cannot say them.

    Args:
        name: of the operation.
        shape: of one sample, ``(channels, height, width)``.
        args: its arguments, the pooled tensor first.
        kwargs: its keyword arguments.
        module: that pools, or None.
    """
    if len(shape) != 3:
        return f"pools a tensor {shape} of one sample; NIR pools (channels, height, width)"
    keys: tuple[str, ...] = (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    )
    if name == "lp_pool2d":
        keys = ("norm_type", "kernel_size", "stride", "ceil_mode")
    if name == "adaptive_avg_pool2d":
        size = getattr(module, "output_size", args[1] if len(args) > 1 else None)
        size = kwargs.get("output_size", size)
        out = pair(size)
        if any(o is None or whole % o for o, whole in zip(out, shape[1:], strict=True)):
            return f"pools {shape[1:]} to {size}, whose windows differ in size"
        kernel = tuple(whole // o for o, whole in zip(out, shape[1:], strict=True))
        return {"op": "avg", "kernel_size": kernel, "stride": kernel, "padding": (0, 0)}
    given = {k: getattr(module, k) for k in keys if hasattr(module, k)}
    given |= dict(zip(keys, args[1:], strict=False)) | {
        k: v for k, v in kwargs.items() if k in keys
    }
    if given.get("ceil_mode") or given.get("divisor_override") is not None:
        return "ceil_mode and divisor_override have no place in NIR"
    padding = pair(given.get("padding", 0))
    if any(padding) and not given.get("count_include_pad", True):
        return "count_include_pad=False has no place in NIR"
    if name == "lp_pool2d" and float(given["norm_type"]) != 1.0:
        return "a power average has no NIR node"
    kernel = pair(given["kernel_size"])
    stride = given.get("stride")
    return {
        "op": "avg" if name == "avg_pool2d" else "sum",
        "kernel_size": kernel,
        "stride": kernel if stride is None or stride == () else pair(stride),
        "padding": padding,
    }


def pair(value: Any) -> tuple[Any, ...]:
    """One number for both axes, or the two that were given."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)
