# SPDX-License-Identifier: Apache-2.0
"""What an engine holds of its file: all of it, or what the library does not hold already."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Held", "Memory", "metadata_of"]

Memory: TypeAlias = Literal["fast", "small"]
"""How weights lie in memory: as they are read fastest, or as they are stored."""


@dataclass(frozen=True, slots=True)
class _Hole:
    """A tensor whose bytes the library holds: its number, and its place in the file."""

    number: int
    start: int
    size: int


class Held:
    """The bytes of an engine's file, or as much of them as the library does not hold already.

    Args:
        content: of the file, which the library has checked.
        stored: gives the bytes of a tensor that the library holds as they are stored, by number,
            and None for every other tensor.
    """

    def __init__(self, content: bytes, stored: Callable[[int], bytes | None]) -> None:
        self._stored = stored
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        names = header["__metadata__"]["program"].splitlines()
        holes: list[_Hole] = []
        if header["__metadata__"].get("memory") == "small":
            for number, name in enumerate(names):
                first, end = (start + at for at in header[name]["data_offsets"])
                if end > first and stored(number) == content[first:end]:
                    holes.append(_Hole(number, first, end - first))
        self._holes = sorted(holes, key=lambda hole: hole.start)
        self._size, parts, at = len(content), [], 0
        for hole in self._holes:
            parts.append(content[at : hole.start])
            at = hole.start + hole.size
        self._rest = b"".join((*parts, content[at:])) if holes else content

    @property
    def nbytes(self) -> int:
        """Bytes that are kept here."""
        return len(self._rest)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def content(self) -> bytes:
        """The whole file again."""
        if not self._holes:
            return self._rest
        parts, taken, at = [], 0, 0
        for hole in self._holes:
            before = hole.start - at
            held = self._stored(hole.number)
            assert held is not None
            parts += [self._rest[taken : taken + before], held]
            taken, at = taken + before, hole.start + hole.size
        return b"".join((*parts, self._rest[taken:]))


def metadata_of(content: bytes) -> dict[str, str]:
    """What a file says of itself; the library has checked the file before.

    Args:
        content: of the file.
    """
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return found
