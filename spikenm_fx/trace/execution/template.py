# SPDX-License-Identifier: Apache-2.0
"""The next operation of a loop over time, known before it comes: it is compared and computed.

Once a step has repeated another, each of its operations reads the same nodes ever after.  So what
an operation was called with is kept, nodes in place of tensors of the trace, and the call a period
later is compared with that.  Where it fits nothing else has to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from spikenm_fx.trace.execution.traced import Traced, as_traced
from spikenm_fx.trace.execution.values import widen

__all__ = ["Template", "template_of"]

_PLAIN = frozenset({int, float, bool, str, type(None), type(...)})


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that an operation gives."""

    node: fx.Node
    shape: tuple[int, ...]


@dataclass(slots=True)
class Template:
    """One operation of a loop that repeats itself.

    Attributes:
        target: what is called.
        args: its arguments, a node for each tensor of the trace.
        kwargs: likewise.
        takes_part: whether whole numbers say which part of data is taken, and differ.
        node: what stands for the result.
        result: of the tensor that it gives node and shape; a tuple of such for a tuple, which may
            hold tuples in turn, as states that neurons return do.
        base: place of the argument that the result is a view of; None for a result of its own.
        of_torch: whether it is torch's own, rather than a neuron or a function of the user's.
        owned: whether nobody else holds what it gives: a neuron keeps its state.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    takes_part: bool
    node: fx.Node
    result: _Made | tuple[Any, ...]
    base: int | None
    of_torch: bool
    owned: bool

    def fits(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
        """Whether a call is the expected one."""
        if target is not self.target and target != self.target:
            return False
        if kwargs or self.kwargs:
            if not kwargs or list(kwargs) != list(self.kwargs):
                return False
            if not _fit(kwargs.values(), tuple(self.kwargs.values()), self.takes_part):
                return False
        return _fit(args, self.args, self.takes_part)

    def take(self, value: Any, args: tuple[Any, ...]) -> Any:
        """What was computed as tensors of the trace; None where it is not as expected.

        Args:
            value: what the call gave.
            args: of the call.
        """
        if not _matches(value, self.result):
            return None
        base = None if self.base is None else args[self.base]
        taken = self._taken(value, self.result, base)
        self.node.meta["repeats"] = self.node.meta.get("repeats", 0) + 1
        return taken

    def _taken(self, value: Any, known: _Made | tuple[Any, ...], base: Any) -> Any:
        if type(known) is _Made:
            return self._joined(value, known.node, base)
        parts = [self._taken(v, k, None) for v, k in zip(value, known, strict=True)]  # type: ignore[arg-type]
        kind: Any = type(value)
        return tuple(parts) if kind is tuple else kind._make(parts)

    def _joined(self, tensor: Any, node: fx.Node, base: Any) -> Any:
        if node.meta["value"].measured is not None:
            widen(node, tensor)
        if not self.owned:
            return as_traced(tensor, node, base)
        tensor.__class__ = Traced  # cheaper than a tensor more
        tensor.node, tensor.base = node, base
        return tensor


def template_of(
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    value: Any,
    *,
    takes_part: bool,
    of_torch: bool,
) -> Template | None:
    """What is expected a period after a call; None where that must be looked at in full.

    Args:
        target: what was called.
        args: its arguments.
        kwargs: likewise.
        value: what came out: tensors of the trace.
        takes_part: whether whole numbers in the arguments say which part of data is taken.
        of_torch: whether ``target`` is torch's own.
    """
    single = type(value) is Traced
    made = _tensors(value)
    if not made or any(type(t) is not Traced or any(t is x for x in args) for t in made):
        return None
    if len(set(map(id, made))) < len(made):
        return None
    base = next((i for i, x in enumerate(args) if x is made[0].base), None) if single else None
    if any(t.base is not None for t in made) and base is None:
        return None
    try:
        kept = tuple(map(_kept, args)), {k: _kept(v) for k, v in kwargs.items()}
    except TypeError:
        return None
    node, first = made[0].node, value
    while type(first) is not Traced:
        if not first:
            return None
        node, first = node.args[0], first[0]
    owned = of_torch and not any(_holds_constant(x) for x in (*args, *kwargs.values()))
    return Template(target, *kept, takes_part, node, _made(value), base, of_torch, owned)


def _is_tuple(value: Any) -> bool:
    """A tuple, or one with names."""
    return type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make"))


def _tensors(value: Any) -> tuple[Any, ...]:
    """What is in tuples and tuples in them; as it is what is none."""
    if not _is_tuple(value):
        return (value,)
    return tuple(part for item in value for part in _tensors(item))


def _made(value: Any) -> Any:
    if _is_tuple(value):
        return tuple(map(_made, value))
    return _Made(value.node, tuple(value.shape))


def _matches(value: Any, known: Any) -> bool:
    """Whether what was computed has the form that is known."""
    if type(known) is _Made:
        return type(value) is Tensor and value.shape == known.shape
    return _is_tuple(value) and len(value) == len(known) and all(map(_matches, value, known))


def _holds_constant(value: Any) -> bool:
    """Whether a function may give back, as it is, a tensor that the model holds."""
    if isinstance(value, tuple | list):
        return any(map(_holds_constant, value))
    return isinstance(value, Tensor) and type(value) is not Traced


def _kept(value: Any) -> Any:
    """An argument as it is kept.

    Raises:
        TypeError: for one whose likeness is not told at a glance.
    """
    if type(value) is Traced:
        return value.node
    if type(value) is list or _is_tuple(value):
        return tuple(map(_kept, value))
    if type(value) is slice:
        return tuple(map(_kept, (value.start, value.stop, value.step)))
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if type(value).__module__ == "torch":  # types, devices, memory formats
        return value
    raise TypeError(type(value).__name__)


def _fit(values: Iterable[Any], kept: tuple[Any, ...], takes_part: bool) -> bool:
    """Whether arguments are those that were kept; whole numbers may differ where a part is taken.

    The two are equally long: the calls are of one function, and lists are compared before.
    """
    count = 0
    for value, known in zip(values, kept, strict=False):
        count += 1
        kind = type(value)
        if kind is Traced:
            if value.node is not known:
                return False
        elif value is known:
            continue
        elif kind is int:
            if type(known) is not int or (value != known and not takes_part):
                return False
        elif isinstance(value, tuple | list):
            if type(known) is not tuple or len(value) != len(known):
                return False
            if not _fit(value, known, takes_part):
                return False
        elif kind is slice:
            if type(known) is not tuple:
                return False
            if not _fit((value.start, value.stop, value.step), known, takes_part):
                return False
        elif isinstance(value, Tensor) or type(known) is not kind or value != known:
            return False
    return count == len(kept)
