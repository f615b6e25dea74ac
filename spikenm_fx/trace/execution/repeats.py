# SPDX-License-Identifier: Apache-2.0
"""Notice that a model repeats itself: the steps of a loop over time are recorded a few times only.

What is recorded is a sequence of operations, each with its place in the code and its inputs.  Where
the last ones are tandem repeats of one block, and a step reads what the one before it made, or is
given the next entry of the input's first axis, that is a loop over time, or over samples.  (A loop
over parts of channels, as of heads, goes along another axis, and is recorded.)  From there on an
operation that repeats the one a period before it stands for the same nodes; the values go on to be
computed.  The first operation that differs ends this.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import Tensor, fx, nn

from spikenm_fx.trace.execution.calls import NOT_USERS
from spikenm_fx.trace.execution.template import Template
from spikenm_fx.trace.execution.traced import Traced

__all__ = ["Operation", "Repeats", "place_of_call"]

_PERIODS = 8
"""So many steps alike are recorded before the next ones stand for the last of them."""

_PARTS = frozenset({"__getitem__", "__setitem__", "getitem", "setitem", "select", "narrow"})
"""Operations on data whose whole numbers say which part of it a step takes."""

_TAKEN_APART = frozenset({"unbind", "chunk", "split", "tensor_split"})
"""Operations whose results are parts of one tensor, one for each step."""

_MOVES = frozenset(
    {
        *("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "t"),
        *("__get__", "einsum", "rearrange", "roll", "flip", "sum", "mean", "cat", "concat"),
        "index_select",
    }
)
"""Operations after which the first axis may be another one, of the same size by chance."""

_users: dict[CodeType, bool] = {}


def place_of_call() -> tuple[int, int]:
    """The innermost instruction that belongs to neither torch nor this library."""
    frame = sys._getframe(1)
    while True:
        code = frame.f_code
        known = _users.get(code)
        if known is None:
            known = _users[code] = not any(part in code.co_filename for part in NOT_USERS)
        if known or frame.f_back is None:
            return id(code), frame.f_lasti
        frame = frame.f_back


@dataclass(slots=True)
class Operation:
    """One recorded operation.

    Attributes:
        locus: what is called, and where.
        inputs: nodes of its tensor arguments, in order; None for a tensor without one.
        plain: its other arguments.
        is_neuron: whether it steps a neuron that keeps its state.
        ordinary: whether its tensors are torch's own, without a way of their own to compute.
        nodes: what it made: its own node, those of a tuple's items and of writes through views.
        template: what its repeats look like, once they repeat; None where each is looked at.
    """

    locus: tuple[Any, ...]
    inputs: tuple[fx.Node | None, ...]
    plain: tuple[Any, ...]
    is_neuron: bool = False
    ordinary: bool = True
    nodes: list[fx.Node] = field(default_factory=list)
    template: Template | None = None

    @classmethod
    def of(cls, locus: tuple[Any, ...], arguments: Any, *, is_neuron: bool) -> Operation:
        """The operation that is called with ``arguments``."""
        inputs: list[fx.Node | None] = []
        plain: list[Any] = []
        ordinary = _sort(arguments, inputs, plain)
        return cls(locus, tuple(inputs), tuple(plain), is_neuron, ordinary)


def _sort(tree: Any, inputs: list[fx.Node | None], plain: list[Any]) -> bool:
    """Take arguments apart; whether all tensors are ordinary ones."""
    ordinary = True
    for item in tree.values() if isinstance(tree, dict) else tree:
        kind = type(item)
        if kind is Traced:
            inputs.append(item.node)
        elif isinstance(item, Tensor):
            inputs.append(None)
            plain.append(("tensor", id(item)))  # no number: an index may differ, this may not
            ordinary &= kind is Tensor or kind is nn.Parameter
        elif isinstance(item, tuple | list | dict):
            ordinary &= _sort(item, inputs, plain)
        elif kind is slice:
            plain += [item.start, item.stop, item.step]
        else:
            plain.append(item)
    return ordinary


class Repeats:
    """The operations recorded so far, and whether the last ones repeat themselves."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._made_by: dict[fx.Node, int] = {}
        # by operation: the first one that it repeats, in a step that repeats another as a whole
        self._alike_with: list[int] = []
        self._of_data: set[fx.Node] = set()
        self._in_order: set[fx.Node] = set()  # their first axis is that of the model's input
        self._lengths: set[int] = set()  # of it
        self._last: dict[tuple[Any, ...], int] = {}
        self._period = 0
        self._alike = 0  # operations in a row that equal those a period before
        self._next: int | None = None  # the recorded operation that the next one should repeat
        self.expected: Template | None = None
        """What the next operation is if the loop goes on, where that is told at a glance."""

    def seen_before(self, operation: Operation) -> Operation | None:
        """The recorded operation that ``operation`` repeats; None where it is to be recorded."""
        if self._next is None:
            return None
        known = self._operations[self._next]
        return known if self._is_repeat(known, operation) else None

    def skip(self) -> None:
        """Go on to the operation after the one that was repeated."""
        assert self._next is not None
        end = len(self._operations)
        self._next = end - self._period if self._next + 1 == end else self._next + 1
        self.expected = self._operations[self._next].template

    def takes_part(self, operation: Operation) -> bool:
        """Whether whole numbers among its arguments say which part of data it takes."""
        first = operation.inputs[0] if operation.inputs else None
        return first is not None and self._is_data(first) and _name(operation) in _PARTS

    def add(self, operation: Operation) -> None:
        """Note an operation that was recorded, with the nodes it made."""
        if self._next is not None:  # another one was expected: the loop is over
            self._next, self._period, self._alike = None, 0, 0
            self.expected = None
        index = len(self._operations)
        if self._period and self._is_repeat(self._operations[index - self._period], operation):
            self._alike += 1
        else:
            self._period = index - self._last.get(operation.locus, index)
            before = self._operations[index - self._period] if self._period else None
            self._alike = int(before is not None and self._is_repeat(before, operation))
        self._operations.append(operation)
        whole_step = 0 < self._period <= self._alike
        first = self._alike_with[index - self._period] if whole_step else index
        self._alike_with.append(first)
        self._made_by |= dict.fromkeys(operation.nodes, index)
        if any(node is not None and self._is_data(node) for node in operation.inputs):
            self._of_data.update(operation.nodes)
            self._follow_first_axis(operation)
        self._last[operation.locus] = index
        enough = self._period > 0 and self._alike >= _PERIODS * self._period
        if enough and self._alike % self._period == 0 and self._is_over_time():
            self._next = len(self._operations) - self._period
            for step in self._operations[self._next :]:
                step.template = None  # another loop around this one was here before

    def _is_data(self, node: fx.Node) -> bool:
        """Whether it is made of the model's input, not of parameters and constants alone."""
        return node.op == "placeholder" or node in self._of_data

    def _is_over_time(self) -> bool:
        """Whether a step goes on from the one before, or takes what comes next in the input."""
        start = len(self._operations) - self._period
        return any(
            step.is_neuron
            or self._takes_next(step)
            or any(start - self._period <= self._made(node) < start for node in step.inputs)
            for step in self._operations[start:]
        )

    def _takes_next(self, step: Operation) -> bool:
        """Whether it is given one entry of the first axis: ``x[t]``, or an item of ``unbind``."""
        first = step.inputs[0] if step.inputs else None
        if first is None:
            return False
        if self._is_in_order(first):
            numbers = [at for at in step.plain if type(at) is int]
            if len(numbers) != len(step.plain):
                return False
            by_index = _name(step) in ("__getitem__", "getitem") and len(numbers) == 1
            return by_index or (_name(step) == "select" and numbers[:-1] == [0])
        made = self._made(first)
        if made < 0:
            return False
        whole = self._operations[made]
        return (
            _name(whole) == "unbind"
            and whole.plain in ((), (0,))
            and self._is_in_order(whole.inputs[0])
        )

    def _is_in_order(self, node: fx.Node | None) -> bool:
        return node is not None and (node.op == "placeholder" or node in self._in_order)

    def _follow_first_axis(self, operation: Operation) -> None:
        """Note which of its results go along the first axis of the model's input."""
        first, name = operation.inputs[0], _name(operation)
        if self._is_in_order(first) and name not in _MOVES:
            assert first is not None
            length = _length(first)
        elif name == "stack" and operation.plain in ((), (0,)):
            length = len(operation.inputs)
            if length not in self._lengths:
                return
        else:
            return
        found = [node for node in operation.nodes if _length(node) == length]
        self._in_order.update(found)
        if length is not None:
            self._lengths.add(length)

    def _made(self, node: fx.Node | None) -> int:
        return -1 if node is None else self._made_by.get(node, -1)

    def _is_repeat(self, known: Operation, new: Operation) -> bool:
        if known.locus != new.locus or len(known.inputs) != len(new.inputs):
            return False
        if not all(map(self._corresponds, known.inputs, new.inputs)):
            return False
        if _same(known.plain, new.plain):
            return True
        # the number of the step; which part of a weight is read is never all the same
        return self.takes_part(new) and _same(known.plain, new.plain, numbers=False)

    def _corresponds(self, known: fx.Node | None, new: fx.Node | None) -> bool:
        """Whether one step reads as ``new`` what an earlier step read as ``known``."""
        if known is new:
            return True
        before, now = self._made(known), self._made(new)
        if known is None or new is None or before < 0 or now < 0:
            return False
        first, second = self._operations[before], self._operations[now]
        if first.locus != second.locus:
            return False
        start = len(self._operations) - max(self._alike, 2 * self._period)
        same_item = first.nodes.index(known) == second.nodes.index(new)
        if now > before and now >= start and (now - before) % self._period == 0:
            return same_item
        # parts, one for each step, of what was made before the loop: of one tensor, or by steps
        # of another loop; what differs in more than its number is no part
        if max(before, now) >= start or not self._is_data(new):
            return False
        if before == now:
            return _name(first) in _TAKEN_APART
        return same_item and self._alike_with[before] == self._alike_with[now]


def _name(operation: Operation) -> str:
    return str(getattr(operation.locus[0], "__name__", ""))


def _length(node: fx.Node) -> int | None:
    """Of the first axis; None for what has none."""
    shape = node.meta["value"].shape if "value" in node.meta else None
    return shape[0] if shape else None


def _same(known: Sequence[Any], new: Sequence[Any], *, numbers: bool = True) -> bool:
    """Whether arguments are equal, whole numbers as well if ``numbers``."""
    return len(known) == len(new) and all(
        a is b or (type(a) is type(b) and ((type(a) is int and not numbers) or _equal(a, b)))
        for a, b in zip(known, new, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # comparing what users pass may do anything
        return False
