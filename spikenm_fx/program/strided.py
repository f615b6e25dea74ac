# SPDX-License-Identifier: Apache-2.0
"""Products, sums and copies along any axes of a token, as one operation of nested loops.

A matrix product of spikes (attention), a product with broadcasting, a sum over pixels or within
heads, a slice of channels, an enlarged image: each reads one or two numbers per turn of the loops
and adds the result to one number of the output.  A loop has a size and, for each operand, the
distance of its numbers in memory, 0 where the loop does not move there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from spikenm_fx.program.axes import Atom, Layout
from spikenm_fx.program.code import Code
from spikenm_fx.program.draft import Draft, NotLowered, Ref, Value

__all__ = ["ADD", "COPY", "MULTIPLY", "Group", "distances", "laid_out", "nested", "strided"]

ADD, SUBTRACT, MULTIPLY, AND_NOT, COPY = range(5)
LOOPS = 5

Group: TypeAlias = tuple[tuple[Atom, ...], tuple[Atom, ...], tuple[Atom, ...]]
"""Atoms that run together: of the output, and of both operands; empty where one does not move."""


@dataclass(frozen=True, slots=True)
class _Loop:
    """One loop: how often, and how far each of output and operands moves."""

    size: int
    moves: tuple[int, int, int]


def distances(layout: Layout) -> dict[Atom, int]:
    """How far numbers of a token lie apart in memory, by the atom along which they do."""
    found: dict[Atom, int] = {}
    apart = 1
    for atom in reversed(layout.channels or ()):
        found[atom] = apart
        apart *= atom.size
    for pixel in (layout.width, layout.height):
        if pixel is not None:
            found[pixel] = apart
            apart *= pixel.size
    return found


def laid_out(lead: Sequence[Atom], features: Sequence[Atom], *like: Layout) -> Layout:
    """A layout of some atoms: those that are pixels in the first layout that has any stay so.

    Args:
        lead: time and batch.
        features: all others, outermost first.
        like: layouts of the operands.
    """
    height = width = None
    for layout in like:
        if any(atom in (layout.height, layout.width) for atom in features):
            height = layout.height if layout.height in features else None
            width = layout.width if layout.width in features else None
            break
    if width is None:
        height, width = None, height
    channels = tuple(atom for atom in features if atom is not height and atom is not width)
    return Layout((*lead, *features), channels, height, width)


def strided(
    draft: Draft,
    where: str,
    mode: int,
    layout: Layout,
    groups: Sequence[Group],
    a: Ref,
    b: Ref | None = None,
    offset: int = 0,
) -> Value:
    """The value of nested loops; what an output does not move along is summed.

    Args:
        draft: of the program.
        where: for messages.
        mode: what becomes of the two operands, or :data:`COPY` of one.
        layout: of the output.
        groups: atoms that run together; all of the output's features are among them.
        a: the first operand.
        b: the second one.
        offset: where in a token of ``a`` the first number lies.

    Raises:
        NotLowered: where the axes do not run together, or take more than five loops.
    """
    apart = [distances(v) for v in (layout, a.value.layout, (b or a).value.layout)]
    loops: list[_Loop] = []
    for group in groups:
        if any(a not in near for atoms, near in zip(group, apart, strict=True) for a in atoms):
            raise NotLowered(where, "it takes time steps or samples for an axis of each token")
        parts = [
            [(atom.size, near[atom]) for atom in atoms]
            for atoms, near in zip(group, apart, strict=True)
        ]
        loops += _together(where, parts)
    return _operation(draft, where, mode, layout, loops, a, b, offset)


def nested(
    draft: Draft, where: str, layout: Layout, loops: Sequence[tuple[int, int, int]], a: Ref
) -> Value:
    """A copy by given loops.

    Args:
        draft: of the program.
        where: for messages.
        layout: of the output.
        loops: size of each, and how far output and operand move.
        a: the operand.

    Raises:
        NotLowered: if they are too many.
    """
    found = [_Loop(size, (to, of, of)) for size, to, of in loops if size > 1]
    return _operation(draft, where, COPY, layout, found, a, None, 0)


def _operation(
    draft: Draft,
    where: str,
    mode: int,
    layout: Layout,
    loops: list[_Loop],
    a: Ref,
    b: Ref | None,
    offset: int,
) -> Value:
    ordered = _merged(_ordered(loops)) or [_Loop(1, (0, 0, 0))]
    if len(ordered) > LOOPS:
        raise NotLowered(where, f"it runs along {len(ordered)} axes in different orders")
    words = [word for loop in ordered for word in (loop.size, *loop.moves)]
    words += [0] * (4 * LOOPS - len(words))
    settings = (mode, len(ordered), *words, offset)
    refs = (a,) if b is None else (a, b)
    return draft.apply(Code.STRIDED, layout, *refs, settings=settings)


def _together(where: str, parts: list[list[tuple[int, int]]]) -> list[_Loop]:
    """Loops over atoms of equal total size, cut where any of them is."""
    moving = [place for place, atoms in enumerate(parts) if atoms]
    sizes = {math.prod(size for size, _ in parts[place]) for place in moving}
    if len(sizes) > 1:
        raise NotLowered(where, f"axes of {' and '.join(map(str, sorted(sizes)))} run together")
    left = [[each for each in atoms if each[0] > 1] for atoms in parts]
    loops: list[_Loop] = []
    while any(left):
        step = min(left[place][-1][0] for place in moving)
        moves = [0, 0, 0]
        for place in moving:
            size, near = left[place].pop()
            if size % step:
                raise NotLowered(where, f"axes of {size} and {step} run together")
            moves[place] = near
            if size > step:
                left[place].append((size // step, near * step))
        loops.append(_Loop(step, (moves[0], moves[1], moves[2])))
    return loops[::-1]


def _ordered(loops: list[_Loop]) -> list[_Loop]:
    """What is summed runs inside; innermost what is nearest in memory."""
    kept = sorted((x for x in loops if x.moves[0]), key=lambda x: -x.moves[0])
    summed = sorted((x for x in loops if not x.moves[0]), key=lambda x: -max(x.moves[1:]))
    dot = bool(summed) and all(move == 1 for move in summed[-1].moves[1:])
    if dot or not kept:
        return [*kept, *summed]
    return [*kept[:-1], *summed, kept[-1]]


def _merged(loops: list[_Loop]) -> list[_Loop]:
    """Neighbours that are one loop for everybody become one."""
    found: list[_Loop] = []
    for loop in loops:
        outer = found[-1] if found else None
        if outer is not None and all(
            far == near * loop.size for far, near in zip(outer.moves, loop.moves, strict=True)
        ):
            found[-1] = _Loop(outer.size * loop.size, loop.moves)
        else:
            found.append(loop)
    return found
