# SPDX-License-Identifier: Apache-2.0
"""Channel spaces: which axes index the same channels.

Every weight layer's output opens a space; operations make spaces equal (an addition), split them
(attention heads), or forbid to touch them (the model's output).  An axis of a tensor is described
by a :data:`Dim`: a concatenation of segments, each a row-major product of atoms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Atom", "Dim", "Layout", "Spaces", "plain", "size_of"]


@dataclass(frozen=True, slots=True)
class Atom:
    """One factor of an axis: its length, and its space (None where it indexes no channels)."""

    size: int
    space: int | None = None


Segment: TypeAlias = tuple[Atom, ...]
Dim: TypeAlias = tuple[Segment, ...]
Layout: TypeAlias = tuple[Dim, ...]


def plain(shape: tuple[int, ...]) -> Layout:
    """The layout of a tensor without channels."""
    return tuple(((Atom(size),),) for size in shape)


def size_of(dim: Dim) -> int:
    """Length of an axis."""
    return sum(math.prod(atom.size for atom in segment) for segment in dim)


class Spaces:
    """Union-find over spaces that can also be split into factors."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._factors: dict[int, tuple[int, ...]] = {}
        self._frozen: dict[int, list[str]] = {}
        self._mixed: list[tuple[Dim, str]] = []

    def new(self, size: int) -> int:
        """A space of ``size`` channels."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def find(self, space: int) -> int:
        """The representative of a space."""
        while self._parent[space] != space:
            self._parent[space] = self._parent[self._parent[space]]
            space = self._parent[space]
        return space

    def atoms(self, atom: Atom) -> Segment:
        """``atom`` in terms of the finest factors known so far."""
        if atom.space is None:
            return (atom,)
        root = self.find(atom.space)
        if root not in self._factors:
            return (Atom(atom.size, root),)
        factors = (Atom(self._size[f], f) for f in self._factors[root])
        return tuple(fine for factor in factors for fine in self.atoms(factor))

    def fine(self, dim: Dim) -> Dim:
        """``dim`` in terms of the finest factors."""
        return tuple(tuple(f for atom in segment for f in self.atoms(atom)) for segment in dim)

    def labelled(self, dim: Dim) -> list[int]:
        """The spaces of an axis."""
        return [a.space for s in self.fine(dim) for a in s if a.space is not None]

    def split(self, atom: Atom, outer: int) -> Segment:
        """Cut a finest ``atom`` into ``outer`` x the rest."""
        inner = atom.size // outer
        if outer in (1, atom.size):
            return (atom,)
        if atom.space is None:
            return (Atom(outer), Atom(inner))
        root = self.find(atom.space)
        parts = (self.new(outer), self.new(inner))
        self._factors[root] = parts
        for reason in self._frozen.get(root, []):
            for part in parts:
                self.freeze_space(part, reason)
        return (Atom(outer, parts[0]), Atom(inner, parts[1]))

    def unite(self, a: Dim, b: Dim, where: str) -> Dim:
        """Make two axes of equal length index the same channels; freeze where they cannot.

        Returns:
            What the result's axis is.
        """
        a, b = self.fine(a), self.fine(b)
        if not self.labelled(a) and not self.labelled(b):
            return a
        if [self._length(s) for s in a] != [self._length(s) for s in b]:
            self.freeze(a, f"{where}: concatenated differently")
            self.freeze(b, f"{where}: concatenated differently")
            return ((Atom(size_of(a)),),)
        return tuple(self._unite_segments(s, t, where) for s, t in zip(a, b, strict=True))

    @staticmethod
    def _length(segment: Segment) -> int:
        return math.prod(atom.size for atom in segment)

    def _unite_segments(self, a: Segment, b: Segment, where: str) -> Segment:
        left, right = [x for x in a if x.size > 1], [x for x in b if x.size > 1]
        out: list[Atom] = []
        while left and right:
            x, y = left.pop(0), right.pop(0)
            if x.size != y.size:
                small = min(x.size, y.size)
                if max(x.size, y.size) % small:
                    rest = ((x, *left),), ((y, *right),)
                    for dim in rest:
                        self.freeze(dim, f"{where}: factors do not align")
                    return (*out, Atom(math.prod(f.size for f in (x, *left))))
                if x.size > small:
                    x, *tail = self.split(x, small)
                    left[:0] = tail
                else:
                    y, *tail = self.split(y, small)
                    right[:0] = tail
                # a split refines what else is waiting
                left = [f for atom in left for f in self.atoms(atom)]
                right = [f for atom in right for f in self.atoms(atom)]
            out.append(self._unite_atoms(x, y, where))
        return tuple(out) or (Atom(1),)

    def _unite_atoms(self, x: Atom, y: Atom, where: str) -> Atom:
        if x.space is None and y.space is None:
            return x
        if x.space is None or y.space is None:
            known = x if x.space is not None else y
            self.freeze(((known,),), f"{where}: meets values that do not follow the channels")
            return known
        a, b = self.find(x.space), self.find(y.space)
        if a != b:
            reasons = self._frozen.get(a, []) + self._frozen.get(b, [])
            self._parent[a] = b
            for reason in reasons:
                self.freeze_space(b, reason)
        return Atom(y.size, b)

    def freeze(self, dim: Dim, reason: str) -> None:
        """Nothing may permute the channels of this axis."""
        for space in self.labelled(dim):
            self.freeze_space(space, reason)

    def freeze_space(self, space: int, reason: str) -> None:
        """Freeze a space and all its factors."""
        root = self.find(space)
        reasons = self._frozen.setdefault(root, [])
        if reason not in reasons:
            reasons.append(reason)
        for factor in self._factors.get(root, ()):
            self.freeze_space(factor, reason)

    def reasons(self, space: int) -> tuple[str, ...]:
        """Why a space is frozen; empty if it is not."""
        return tuple(self._frozen.get(self.find(space), ()))

    def mix(self, dim: Dim, reason: str) -> None:
        """The channels of this axis meet each other: their order is free, their number is not."""
        self._mixed.append((dim, reason))

    def mixed(self) -> dict[int, tuple[str, ...]]:
        """By space, where its channels meet each other."""
        found: dict[int, dict[str, None]] = {}
        for dim, reason in self._mixed:
            for space in self.labelled(dim):
                found.setdefault(space, {})[reason] = None
        return {space: tuple(reasons) for space, reasons in found.items()}

    def reshape(self, layout: Layout, shape: tuple[int, ...], where: str) -> Layout:
        """The layout after a reshape: axes are merged, or split at factor boundaries."""
        head = 0
        while head < min(len(layout), len(shape)) and size_of(layout[head]) == shape[head]:
            head += 1
        tail = 0
        while (
            tail < min(len(layout), len(shape)) - head
            and size_of(layout[-1 - tail]) == shape[-1 - tail]
        ):
            tail += 1
        middle = layout[head : len(layout) - tail]
        target = shape[head : len(shape) - tail]
        if any(len(dim) > 1 for dim in middle):
            for dim in middle:
                self.freeze(dim, f"{where}: reshapes a concatenation")
            new = plain(target)
        else:
            new = self._reshape_middle(middle, target, where)
        return (*layout[:head], *new, *layout[len(layout) - tail :])

    def _reshape_middle(self, dims: Layout, shape: tuple[int, ...], where: str) -> Layout:
        waiting = [a for dim in self.fine_all(dims) for a in dim[0] if a.size > 1]
        out: list[Dim] = []
        for size in shape:
            need, atoms = size, []
            while need > 1:
                if not waiting:
                    return plain(shape)
                waiting = [f for a in waiting for f in self.atoms(a)]
                atom = waiting.pop(0)
                if need % atom.size == 0:
                    atoms.append(atom)
                    need //= atom.size
                elif atom.size % need == 0:
                    first, *rest = self.split(atom, need)
                    atoms.append(first)
                    waiting[:0] = rest
                    need = 1
                else:
                    for dim in (*dims, *out):
                        self.freeze(dim, f"{where}: reshape does not align with the channels")
                    return plain(shape)
            out.append((tuple(atoms) or (Atom(1),),))
        return tuple(out)

    def fine_all(self, layout: Layout) -> Layout:
        """Every axis in terms of the finest factors."""
        return tuple(self.fine(dim) for dim in layout)
