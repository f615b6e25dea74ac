# SPDX-License-Identifier: Apache-2.0
"""What a trace remembers of a value: its shape and what was measured on it, not the value."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from spikenm_fx._torch import DisableTorchFunction, is_scripted
from spikenm_fx.trace.execution.calls import NOT_USERS

__all__ = [
    "LARGEST_COUNT",
    "InnerCall",
    "Measured",
    "SurrogateCall",
    "ValueInfo",
    "describe",
    "is_like",
    "is_matrix",
    "is_scripted_block",
    "kind_of_values",
    "measure_kind",
    "user_line",
    "widen",
    "worst_of",
    "write_view",
]

Measured = Literal["spike", "integer", "analog"]

LARGEST_COUNT = 64
"""Whole numbers up to here are taken for spike counts (sums of residual branches, frames of an
event camera); larger ones are pixels or tokens' codes."""


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


def is_like(value: Any, info: ValueInfo) -> bool:
    """Whether a later step's ``value`` has the shape of the one that ``info`` records."""
    if not isinstance(value, Tensor):
        return info.shape is None
    return info.shape == tuple(value.shape)  # one that grows with the steps is none of them


def kind_of_values(values: Tensor, *, largest: float = LARGEST_COUNT) -> Measured | None:
    """What a tensor's values are, wherever this package asks.

    Args:
        values: of any shape.
        largest: whole numbers beyond it, of either sign, are no counts.

    Returns:
        ``"spike"`` for {0,1}, ``"integer"`` for counts, else ``"analog"``; None where there is
        nothing to look at: no values, complex ones, or the meta device.
    """
    if values.is_meta or values.numel() == 0 or values.is_complex():
        return None
    if values.dtype == torch.bool or bool(((values == 0) | (values == 1)).all()):
        return "spike"
    whole = values == values.round() if values.is_floating_point() else True
    return "integer" if bool((whole & (values.abs() <= largest)).all()) else "analog"


def measure_kind(value: Tensor, *, largest: float = LARGEST_COUNT) -> tuple[Measured | None, bool]:
    """The kind of a tensor's values (:func:`kind_of_values`), and whether they differ at all.

    Args:
        value: of any shape.
        largest: as for :func:`kind_of_values`.
    """
    kind = kind_of_values(value, largest=largest)
    return kind, kind is not None and bool((value != value.reshape(-1)[0]).any())


def worst_of(info: ValueInfo, driven: Measured | None) -> ValueInfo:
    """``info`` widened by what was measured under strong drive."""
    if driven is None or info.shape is None:
        return info
    order = ("spike", "integer", "analog")
    seen = [k for k in (info.measured, driven) if k is not None]
    return replace(info, measured=max(seen, key=order.index), varied=True)


def widen(node: fx.Node, value: Any) -> None:
    """A node stands for one more ``value``: what was measured on it holds for all."""
    info: ValueInfo = node.meta["value"]
    settled = info.measured is None or (info.measured == "analog" and info.varied)
    if settled or not isinstance(value, Tensor):
        return
    with DisableTorchFunction():
        if info.measured == "spike" and info.varied and bool_like(value):
            return
        seen = describe(value, measure=True)
    kind = worst_of(info, seen.measured).measured
    node.meta["value"] = replace(info, measured=kind, varied=info.varied or seen.varied)


def bool_like(value: Tensor) -> bool:
    """Whether all values, of any shape, are 0 or 1, in few operations."""
    return torch.equal(value.bool().to(value.dtype), value)


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
        """What the Function computes."""
        return self.function.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SurrogateCall) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)


def write_view(base: Tensor, update: Tensor) -> Tensor:
    """In a graph: ``base``, of any shape, after ``update`` was written through a view of it."""
    return base


def is_scripted_block(module: nn.Module) -> bool:
    """Whether ``module`` is scripted and multiplies by matrices: its execution tells which."""
    return is_scripted(module) and any(is_matrix(p) for p in module.parameters())


def is_matrix(parameter: Tensor) -> bool:
    """Whether ``parameter``, of any shape, has two axes or more that are longer than 1."""
    return sum(size > 1 for size in parameter.shape) >= 2


def user_line(error: BaseException) -> str:
    """``file:line: code`` of the innermost frame that belongs to neither torch nor this library."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not any(part in f.filename for part in NOT_USERS)]
    if not users:
        return "inside torch"
    return f"{users[-1].filename}:{users[-1].lineno}: {users[-1].line or ''}".rstrip(": ")
