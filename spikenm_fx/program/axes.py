# SPDX-License-Identifier: Apache-2.0
"""Axes of tensors as named things, so that reshapes are bookkeeping and sizes stay open.

A tensor's axis is a group of atoms, as ``(h w) c`` is in einops: flattening joins groups, a view
splits them again.  Time and batch are atoms like the others, so that a program made from examples
of one size runs on other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

__all__ = [
    "Atom",
    "Axes",
    "Layout",
    "Split",
    "flattened",
    "fresh",
    "regrouped",
    "size_of",
    "unflattened",
]


@dataclass(eq=False, slots=True)
class Atom:
    """One axis that is never split.

    Attributes:
        size: in the example.
        label: for messages.
        parts: what it was split into after all, outermost first.
    """

    size: int
    label: str = ""
    parts: tuple[Atom, ...] = ()


Split: TypeAlias = Callable[["Atom", int], bool]
"""Cuts an atom, whose outer part gets a size; False where the atom must stay whole."""
Axes: TypeAlias = tuple[tuple[Atom, ...], ...]
"""The axes of a tensor, each a group of atoms; an empty group is an axis of size 1."""


@dataclass(eq=False, slots=True)
class Layout:
    """Which atoms of a value are numbers of one token; the others are time and batch.

    Attributes:
        atoms: all of them, as the tensor was made.
        channels: those of the innermost axis of a token, outermost first; None as long as no
            operation has said what is a channel (of the model's input).
        height: of an image, or None.
        width: of an image, or None.
    """

    atoms: tuple[Atom, ...]
    channels: tuple[Atom, ...] | None = None
    height: Atom | None = None
    width: Atom | None = None

    @property
    def features(self) -> tuple[Atom, ...]:
        """The atoms of a token, in any order."""
        return (*(self.channels or ()), *(a for a in (self.height, self.width) if a is not None))

    @property
    def lead(self) -> tuple[Atom, ...]:
        """Time and batch."""
        return tuple(a for a in self.atoms if a not in self.features)

    def over(self, time: Atom) -> Layout:
        """The same numbers, of each time step its own."""
        return self if time in self.lead else replace(self, atoms=(time, *self.atoms))

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        h, w = (1 if a is None else a.size for a in (self.height, self.width))
        return h, w, size_of(self.channels or ())

    def set_pixels(self, pixels: Sequence[Atom]) -> None:
        """Take axes for those of pixels.

        Args:
            pixels: none, the width, or height and width.
        """
        self.height = pixels[0] if len(pixels) == 2 else None
        self.width = pixels[-1] if pixels else None

    def learn(self, channels: tuple[Atom, ...]) -> None:
        """Take an axis of an input for that of its channels.

        Args:
            channels: the axis; what of it seemed to be pixels is none.
        """
        self.channels = channels
        self.height = None if self.height in channels else self.height
        self.width = None if self.width in channels else self.width


def size_of(group: tuple[Atom, ...]) -> int:
    """How long an axis is in the example."""
    return math.prod(atom.size for atom in group)


def flattened(axes: Axes, start: int, end: int) -> Axes:
    """``axes`` with those from ``start`` to ``end``, both counted as torch does, as one."""
    rank = len(axes)
    start, end = start % max(rank, 1), end % max(rank, 1)
    joined = tuple(atom for group in axes[start : end + 1] for atom in group)
    return (*axes[:start], joined, *axes[end + 1 :])


def fresh(group: tuple[Atom, ...]) -> tuple[Atom, ...]:
    """The same axis in the atoms that some of its atoms were split into since."""
    return tuple(part for a in group for part in (fresh(a.parts) if a.parts else (a,)))


def unflattened(
    axes: Axes, at: int, sizes: tuple[int, ...], split: Split | None = None
) -> Axes | None:
    """``axes`` with one of them split into axes of ``sizes``; None where that cuts an atom."""
    at %= len(axes)
    parts = regrouped((axes[at],), sizes, split)
    axes = tuple(map(fresh, axes))
    return None if parts is None else (*axes[:at], *parts, *axes[at + 1 :])


def regrouped(
    axes: Axes,
    shape: tuple[int, ...],
    split: Split | None = None,
    lead: Collection[Atom] = (),
) -> Axes | None:
    """The same atoms in the same order as axes of ``shape``; None where that cuts an atom.

    Args:
        axes: as they are.
        shape: as they shall be.
        split: cuts an atom into an outer and an inner part, or says that it must stay whole.
        lead: time and batch, which stay together where they are of size 1.
    """
    atoms = [atom for group in axes for atom in group]
    found: list[tuple[Atom, ...]] = []
    for place, size in enumerate(shape):
        group: list[Atom] = []
        if size == 1 and atoms and atoms[0].size == 1:
            group.append(atoms.pop(0))
        while size_of(tuple(group)) < size and atoms:
            group.append(atoms.pop(0))
        if size_of(tuple(group)) != size:
            last = group.pop() if group else None
            outer = size // max(1, size_of(tuple(group)))
            if last is None or split is None or not outer or last.size % outer:
                return None
            if not split(last, outer):
                return None
            first, *rest = last.parts
            group.append(first)
            atoms[:0] = rest
        if size_of(tuple(group)) != size:
            return None
        ones = _ones(shape[place + 1 :])
        while all(atom in lead for atom in [*group, *atoms[:1]]) and group and atoms:
            if _ones([atom.size for atom in atoms]) <= ones:
                break
            group.append(atoms.pop(0))
        found.append(tuple(group))
    if any(atom.size != 1 for atom in atoms):
        return None
    if atoms and not found:
        return None
    if atoms:
        found[-1] = (*found[-1], *atoms)
    return tuple(found)


def _ones(sizes: Sequence[int]) -> int:
    """How many sizes are 1 before one is not."""
    return next((at for at, size in enumerate(sizes) if size != 1), len(sizes))


def spelled_out(index: Any, rank: int) -> tuple[Any, ...]:
    """The places of an index, with whole axes where it has an ellipsis.

    Args:
        index: of a tensor; None in it makes a new axis.
        rank: of the tensor.
    """
    places = index if isinstance(index, tuple) else (index,)
    at = next((at for at, place in enumerate(places) if place is Ellipsis), None)
    if at is None:
        return places
    named = sum(place is not None for place in places) - 1
    return (*places[:at], *(slice(None),) * (rank - named), *places[at + 1 :])
