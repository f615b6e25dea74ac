# SPDX-License-Identifier: Apache-2.0
"""What the tracer asks about a call: its arguments, its line, the tensors a model holds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "COMPARING",
    "NOT_USERS",
    "OF_SHAPE",
    "PLAIN",
    "call_site",
    "label",
    "tensors_held_by",
    "written_argument",
]

NOT_USERS = ("/torch/", "spikenm_fx/trace/", "spikenm_fx/state/")
"""Parts of the paths of files whose lines are not the user's."""

COMPARING = frozenset(
    {"gt", "ge", "lt", "le", "heaviside", "sign", "signbit", "round", "floor", "ceil", "trunc"}
    | {"clamp", "clamp_min", "clamp_max", "floor_divide"}
)
"""Functions that spikes may be made by: the line that calls them tells one neuron from another."""

OF_SHAPE = frozenset(
    {Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.__len__}
    | {getattr(Tensor, n).__get__ for n in ("shape", "ndim", "dtype", "device", "layout")}
)
"""Functions of tensors that tell nothing of their values."""

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def tensors_held_by(model: nn.Module) -> dict[int, Tensor]:
    """Parameters, buffers and plain tensor attributes, so that they are known as constants."""
    held: dict[int, Tensor] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            held[id(value)] = value
        elif depth and isinstance(value, dict):
            for item in list(value.values()):
                visit(item, depth - 1)
        elif depth and isinstance(value, list | tuple):
            for item in value:
                visit(item, depth - 1)

    for module in nn.Module.modules(model):
        visit(vars(module), 3)
    return held


def written_argument(target: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The tensor that ``x[k] = v`` writes into."""
    return args[0] if getattr(target, "__name__", "") in ("__setitem__", "setitem") else None


def label(target: Any) -> str | None:
    """A readable node name for functions that fx would name after a dunder."""
    name = getattr(target, "__name__", "")
    if name == "__get__":
        return str(getattr(target.__self__, "__name__", "attribute"))
    return name.strip("_") if name.startswith("__") else None


def call_site() -> tuple[int, ...]:
    """Line numbers from the innermost module's forward down to the user's call."""
    lines: list[int] = []
    frame = inspect.currentframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in NOT_USERS):
            lines.append(frame.f_lineno)
            if frame.f_code.co_name == "forward":
                break
        frame = frame.f_back
    return tuple(reversed(lines))
