# SPDX-License-Identifier: Apache-2.0
"""What a trace remembers of a value: its shape and what was measured on it, not the value."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spikenm_fx.trace.execution.calls import NOT_USERS

__all__ = [
    "InnerCall",
    "Measured",
    "SurrogateCall",
    "ValueInfo",
    "describe",
    "is_matrix",
    "is_scripted",
    "is_scripted_block",
    "measure_kind",
    "user_line",
    "worst_of",
    "write_view",
]

Measured = Literal["spike", "integer", "analog"]


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """Shape, dtype and, where it was looked at, the kind of the example's values.

    Attributes:
        shape: the tensor's shape, or None for a container.
        dtype: its dtype.
        measured: what the example's values were; None where nobody looked.
        varied: False where all measured values were equal, so that little can be concluded.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None = None
    measured: Measured | None = None
    varied: bool = True


def describe(value: Any, *, measure: bool = False) -> ValueInfo:
    """The record of one value; containers have none of their own."""
    if not isinstance(value, Tensor):
        return ValueInfo(None)
    kind, varied = measure_kind(value) if measure else (None, True)
    return ValueInfo(tuple(value.shape), value.dtype, kind, varied)


def measure_kind(value: Tensor) -> tuple[Measured | None, bool]:
    """Look at the values: are they {0,1}, whole numbers, or neither; and do they differ at all."""
    if value.is_meta or value.numel() == 0 or value.is_complex():
        return None, False
    varied = bool((value != value.reshape(-1)[0]).any())
    if bool(((value == 0) | (value == 1)).all()):
        return "spike", varied
    if not value.is_floating_point() or bool((value == value.round()).all()):
        return "integer", varied
    return "analog", varied


def worst_of(info: ValueInfo, driven: Measured | None) -> ValueInfo:
    """``info`` widened by what was measured under strong drive."""
    if driven is None or info.shape is None:
        return info
    order = ("spike", "integer", "analog")
    seen = [k for k in (info.measured, driven) if k is not None]
    return replace(info, measured=max(seen, key=order.index), varied=True)


@dataclass(slots=True)
class InnerCall:
    """What was seen of a layer inside a leaf, e.g. a neuron's recurrent weight."""

    inside: str
    calls: int = 0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None


class SurrogateCall:
    """Stands for ``Function.apply`` in a graph: fx wants a named callable."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = f"{function.__name__}.apply"
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SurrogateCall) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


def write_view(base: Tensor, update: Tensor) -> Tensor:
    """In a graph: ``base`` after ``update`` was written through a view of it."""
    return base


def is_scripted(module: nn.Module) -> bool:
    """Whether torch's script compiler runs ``module``; with ``PYTORCH_JIT=0`` none is."""
    return isinstance(module, torch.jit.ScriptModule) and hasattr(module, "_c")


def is_scripted_block(module: nn.Module) -> bool:
    """Whether ``module`` is scripted and multiplies by matrices: its execution tells which."""
    return is_scripted(module) and any(is_matrix(p) for p in module.parameters())


def is_matrix(parameter: Tensor) -> bool:
    """Whether ``parameter`` has two axes or more that are longer than 1."""
    return sum(size > 1 for size in parameter.shape) >= 2


def user_line(error: BaseException) -> str:
    """``file:line: code`` of the innermost frame that belongs to neither torch nor this library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in NOT_USERS)]
    if not own:
        return "inside torch"
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line or ''}".rstrip(": ")
