# SPDX-License-Identifier: Apache-2.0
"""Products that name their axes (``einsum``), and attention as torch's one function."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from spikenm_fx.program.axes import Atom, Axes, size_of
from spikenm_fx.program.calls import Call, Function
from spikenm_fx.program.draft import Ref, Value
from spikenm_fx.program.pointwise import softmax
from spikenm_fx.program.products import made_once, matmul, read_features
from spikenm_fx.program.strided import MULTIPLY, Group, laid_out, strided

__all__ = ["ATTENTION"]


def _einsum(call: Call) -> Ref:
    """A product of two tensors, summed over the letters that its result lacks.

    Raises:
        NotLowered: for another number of tensors, diagonals, and sums over time or batch.
    """
    given = call.args[1] if isinstance(call.args[1], list | tuple) else call.args[1:]
    terms, _, result = str(call.args[0]).replace(" ", "").partition("->")
    letters = terms.split(",")
    plain = len(letters) == 2 and all(len(set(t)) == len(t) for t in (*letters, result))
    if not plain or not result or "." in call.args[0]:
        raise call.refuse("it is no product of two tensors with a letter for each axis")
    call.args = (call.args[0], *given)
    a, b = call.ref(1), call.ref(2)
    step = call.draft.step_of(call.where, a, b)
    left, right = (dict(zip(t, x.axes, strict=True)) for t, x in zip(letters, (a, b), strict=True))
    lead = list(a.value.layout.lead)
    outer = {x for x, group in left.items() if any(atom in lead for atom in group)}
    for letter in set(left) | set(right):
        if letter in outer and right.get(letter) == left[letter] and letter in result:
            continue
        read_features(call, a, left.get(letter, ()))
        read_features(call, b, right.get(letter, ()))
        outer.discard(letter)
    groups, axes, taken = list[Group](), dict[str, tuple[Atom, ...]](), set[Atom]()
    for letter in (x for x in {**left, **right} if x not in outer):
        mine, yours = left.get(letter, ()), right.get(letter, ())
        if letter not in result:
            groups.append(((), mine, yours))
            continue
        own = mine or yours
        if taken & set(own):
            own = tuple(Atom(atom.size, atom.label) for atom in own)
        taken |= set(own)
        axes[letter] = own
        groups.append((own, mine, yours))
    out: Axes = tuple(left[x] if x in outer else axes[x] for x in result)
    features = [atom for group in out for atom in group if atom not in lead]

    def make() -> tuple[Value, ...]:
        layout = laid_out(lead, features, a.value.layout, b.value.layout)
        return (strided(call.draft, call.where, MULTIPLY, layout, groups, a, b),)

    return made_once(call, ("einsum", terms, result), make, out, features, step, a, b)


def _attention(call: Call) -> Ref:
    """``scaled_dot_product_attention``."""
    q, k, v = call.args[:3]
    if call.get(3, "attn_mask") is not None or call.get(5, "is_causal", False):
        raise call.refuse("it has a mask")
    if call.get(4, "dropout_p", 0.0) or call.kwargs.get("enable_gqa", False):
        raise call.refuse("it drops some, or has fewer keys than heads")
    scale = call.kwargs.get("scale") or 1.0 / math.sqrt(size_of(call.ref().axes[-1]))
    keys: Ref = replace(call.ref(1), axes=(*k.axes[:-2], k.axes[-1], k.axes[-2]))
    scores = _with(call, matmul, q, keys)
    scaled = replace(scores, value=call.draft.scaled(scores, scale, 0.0))
    return _with(call, matmul, _with(call, softmax(0), scaled, -1), v)


def _with(call: Call, function: Function, *args: Any) -> Ref:
    """Another operation in the place of this one."""
    inner = Call(call.draft, call.node, call.where, args, {}, None)
    found: Ref = function(inner)
    return found


ATTENTION: dict[str, Function] = {
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
"""What becomes of such an operation, by its name."""
