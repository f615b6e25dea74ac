# SPDX-License-Identifier: Apache-2.0
"""Sums, products and concatenations of values, and of values with constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from spikenm_fx.program.axes import Atom, Layout
from spikenm_fx.program.calls import Call, Function, Lowered
from spikenm_fx.program.code import Code
from spikenm_fx.program.draft import NotLowered, Partial, Ref, Rest, Value
from spikenm_fx.program.over_time import reduced
from spikenm_fx.program.products import broadcast, with_constant
from spikenm_fx.program.tokens import outside, relaid

__all__ = ["JOINS", "joined", "scaled"]


def _add(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if call.kwargs.get("alpha", 1) != 1:
        raise call.refuse("it adds a multiple (alpha=)")
    if isinstance(a, int | float):
        a, b = b, a
    if isinstance(b, int | float):
        return a if b == 0 else scaled(call, a, 1.0, float(b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        own, ref = (a, b) if isinstance(a, Tensor) else (b, a)
        return with_constant(call, ref, 1.0, own)
    added = _accumulated(call, a, b)
    return added if added is not None else joined(call, 0)


def _accumulated(call: Call, a: Any, b: Any) -> Lowered | None:
    """A loop adds up the steps of one value; None where this is another sum."""
    if not isinstance(b, Ref) or b.step is None:
        return None
    count = None
    if isinstance(a, Partial) and a.value is b.value and a.count == b.step:
        count = a.count + 1
    elif isinstance(a, Ref) and a.value is b.value and (a.step, b.step) == (0, 1):
        count = 2
    if count is None:
        return None
    if call.draft.time is not None and count == call.draft.time.size:
        return reduced(call, replace(b, step=None), 0)
    return Partial(b.value, b.axes, count)


def _sub(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if call.kwargs.get("alpha", 1) != 1:
        raise call.refuse("it subtracts a multiple (alpha=)")
    if isinstance(b, Tensor):
        return with_constant(call, a, 1.0, -b)
    if isinstance(a, Tensor):
        return with_constant(call, b, -1.0, a)
    if isinstance(a, Ref) and a == b:
        return 0.0  # as soft - soft.detach(), which hands a gradient on
    if isinstance(b, int | float):
        return scaled(call, a, 1.0, -float(b))
    if isinstance(a, int | float):
        return scaled(call, b, -1.0, float(a))
    return joined(call, 1)


def _rsub(call: Call) -> Lowered:
    return scaled(call, call.args[0], -1.0, float(call.args[1]))


def _mul(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if isinstance(a, int | float):
        a, b = b, a
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        own, ref = (a, b) if isinstance(a, Tensor) else (b, a)
        return with_constant(call, ref, own, 0.0)
    return scaled(call, a, float(b), 0.0) if isinstance(b, int | float) else joined(call, 2)


def _div(call: Call) -> Lowered:
    a, b = call.args[0], call.args[1]
    if isinstance(b, Tensor) and bool((b != 0).all()) and not call.kwargs.get("rounding_mode"):
        return with_constant(call, a, 1.0 / b, 0.0)
    if not isinstance(b, int | float) or not b or call.kwargs.get("rounding_mode"):
        raise call.refuse("it divides by something else than a number")
    if isinstance(a, Ref) and call.draft.time is not None and b == call.draft.time.size:
        mean = call.draft.mean_of(a)
        if mean is not None:
            return mean
    return scaled(call, a, 1.0 / b, 0.0)


def scaled(call: Call, given: Any, factor: Any, shift: Any) -> Ref:
    """``factor * given + shift``.

    Args:
        call: the operation.
        given: a value of the program.
        factor: a number.
        shift: a number.

    Raises:
        NotLowered: for anything else than a value.
    """
    if not isinstance(given, Ref):
        raise call.refuse("it works on what is no value of the program")
    step = call.draft.step_of(call.where, given)
    return Ref(call.draft.scaled(given, factor, shift), given.axes, step)


def _of_one_batch(call: Call, a: Ref, b: Ref) -> tuple[Ref, Ref]:
    """Two operands, of which axes of time and batch at the same place are the same."""
    rank = min(len(a.axes), len(b.axes))
    pairs = [
        (x[0], y[0])
        for x, y in zip(a.axes[-rank:], b.axes[-rank:], strict=True)
        if len(x) == len(y) == 1 and x[0] is not y[0]
        if x[0] in a.value.layout.lead and y[0] in b.value.layout.lead
    ]
    if pairs and rank:
        call.draft.same(tuple(x for x, _ in pairs), tuple(y for _, y in pairs))
    return a.renewed(), b.renewed()


def joined(call: Call, mode: int) -> Ref:
    """A sum, difference or product of the operation's two operands.

    Args:
        call: the operation.
        mode: as :class:`~spikenm_fx.program.code.Code` numbers them.
    """
    a, b = _of_one_batch(call, call.ref(0), call.ref(1))
    call.args = (a, b, *call.args[2:])
    step = call.draft.step_of(call.where, a, b)
    if not _alike(a, b):
        return broadcast(call, mode)
    wide = a if len(a.value.layout.atoms) >= len(b.value.layout.atoms) else b
    made = call.draft.apply(Code.JOIN, wide.value.layout, a, b, settings=(mode,))
    return Ref(made, wide.axes, step)


def _alike(a: Ref, b: Ref) -> bool:
    """Whether two tensors have the same axes, each of its own layer."""
    left, right = a.value.layout, b.value.layout
    if left is right:
        return a.axes == b.axes
    if left.channels is None or right.channels is None or left.size != right.size:
        return False
    names = dict(zip(left.channels, right.channels, strict=False))
    if len(left.channels) != len(right.channels):
        return False
    for mine, yours in ((left.height, right.height), (left.width, right.width)):
        if mine is not None and yours is not None:
            names[mine] = yours
    return tuple(tuple(names.get(x, x) for x in g) for g in a.axes) == b.axes


def _cat(call: Call) -> Ref:
    members, axis = call.args[0], call.get(1, "dim", 0)
    if len(members) < 2 or not all(isinstance(m, Ref) for m in members):
        why = "it joins what are no values of the program"
        raise NotLowered(call.where, why, carries=any(isinstance(m, Rest) for m in members))
    whole: Ref = members[0]
    for other in members[1:]:
        whole = _cat_two(call, whole, other, axis % len(whole.axes))
    return whole


def _cat_two(call: Call, a: Ref, b: Ref, axis: int) -> Ref:
    a, b = _of_one_batch(call, a, b)
    step = call.draft.step_of(call.where, a, b)
    if a.value.layout.channels is None or b.value.layout.channels is None:
        raise call.refuse("it concatenates what no layer read, so that its channels are not known")
    inside = outside(call.draft, a, a.axes[axis]) + outside(call.draft, b, b.axes[axis])
    if inside or not (a.axes[axis] and b.axes[axis]):
        raise call.refuse("it concatenates along another axis than channels", inside)
    a, b = (relaid(call.draft, call.where, x, x.axes[axis]) for x in (a, b))
    left, right = a.value.layout, b.value.layout
    if left.size[:2] != right.size[:2] or left.lead != right.lead:
        raise call.refuse("it concatenates values of different shape")
    channels = (Atom(left.size[2] + right.size[2], "channels"),)
    key = (Code.CONCAT, a.value.number, b.value.number)

    def make() -> tuple[Value, ...]:
        layout = Layout((*left.lead, *channels, *left.features[len(left.channels or ()) :]))
        layout.channels, layout.height, layout.width = channels, left.height, left.width
        bits = a.value.bits and b.value.bits
        return (call.draft.apply(Code.CONCAT, layout, a, b, bits=bits),)

    (value,) = call.draft.once(key, make, a, b)
    made = value.layout.channels
    assert made is not None
    return Ref(value, (*a.axes[:axis], made, *a.axes[axis + 1 :]), step)


JOINS: dict[str, Function] = {
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "neg": lambda call: scaled(call, call.args[0], -1.0, 0.0),
    "cat": _cat,
}
"""What becomes of such an operation, by its name."""
