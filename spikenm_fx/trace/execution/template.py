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


@dataclass(slots=True)
class Template:
    """One operation of a loop that repeats itself.

    Attributes:
        target: what is called.
        args: its arguments, a node for each tensor of the trace.
        kwargs: likewise.
        takes_part: whether whole numbers say which part of data is taken, and differ.
        node: what stands for the result.
        shape: of the result; None for a tuple of tensors.
        items: node and shape of each tensor of a tuple.
        base: place of the argument that the result is a view of; None for a result of its own.
        of_torch: whether it is torch's own, rather than a neuron or a function of the user's.
        owned: whether nobody else holds what it gives: a neuron keeps its state.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    takes_part: bool
    node: fx.Node
    shape: tuple[int, ...] | None
    items: tuple[tuple[fx.Node, tuple[int, ...]], ...]
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
        if self.shape is not None:
            if type(value) is not Tensor or value.shape != self.shape:
                return None
            base = None if self.base is None else args[self.base]
            taken: Any = self._joined(value, self.node, base)
        else:
            if type(value) is not tuple or len(value) != len(self.items):
                return None
            for tensor, (_, shape) in zip(value, self.items, strict=True):
                if type(tensor) is not Tensor or tensor.shape != shape:
                    return None
            taken = tuple(
                [self._joined(t, i[0], None) for t, i in zip(value, self.items, strict=True)]
            )
        self.node.meta["repeats"] = self.node.meta.get("repeats", 0) + 1
        return taken

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
    made: tuple[Any, ...] = (value,) if single else value if type(value) is tuple else ()
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
    node = made[0].node if single else made[0].node.args[0]
    shape = tuple(value.shape) if single else None
    items = () if single else tuple((t.node, tuple(t.shape)) for t in made)
    owned = of_torch and not any(_holds_constant(x) for x in (*args, *kwargs.values()))
    return Template(target, *kept, takes_part, node, shape, items, base, of_torch, owned)


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
    if type(value) in (tuple, list):
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
        elif kind is tuple or kind is list:
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
