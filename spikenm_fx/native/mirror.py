# SPDX-License-Identifier: Apache-2.0
"""Are the C structures that Python writes laid out as the compiled library reads them?"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from spikenm_fx.errors import SpikeNMError

__all__ = ["MirrorError", "check_mirrors", "compiled_layout", "mirrored_layout"]

Layout = dict[str, tuple[int, int]]
"""Offset and size in bytes of each field, and under "" those of the whole structure."""

_MENTIONED = 4  # differences in a message; the first one moves all that follow


class MirrorError(SpikeNMError, RuntimeError):
    """A compiled library whose structures are not those of the Python code that calls it."""


def compiled_layout(library: ctypes.CDLL) -> dict[str, Layout]:
    """What ``snm_field`` of the library reports: the layout of each structure by its C name."""
    structure, field = ctypes.c_char_p(), ctypes.c_char_p()
    offset, size = ctypes.c_int64(), ctypes.c_int64()
    answers = [ctypes.byref(answer) for answer in (structure, field, offset, size)]
    layouts: dict[str, Layout] = {}
    index = 0
    while library.snm_field(ctypes.c_int64(index), *answers):
        layout = layouts.setdefault((structure.value or b"").decode(), {})
        layout[(field.value or b"").decode()] = (offset.value, size.value)
        index += 1
    return layouts


def mirrored_layout(mirror: type[ctypes.Structure]) -> Layout:
    """The layout that ctypes gives to a structure."""
    fields = {name: getattr(mirror, name) for name, *_ in mirror._fields_}
    layout = {name: (field.offset, field.size) for name, field in fields.items()}
    return {"": (0, ctypes.sizeof(mirror))} | layout


def check_mirrors(
    library: ctypes.CDLL, mirrors: Mapping[str, type[ctypes.Structure]], path: str
) -> None:
    """Refuse a library that would read other fields than Python writes.

    Args:
        library: that was loaded.
        mirrors: the Python structure of each C structure, by its C name; all of them.
        path: of the library, for the message.

    Raises:
        MirrorError: if a structure or a field is missing on either side, or lies elsewhere.
    """
    compiled = compiled_layout(library)
    wrong = [
        difference
        for name in sorted(compiled.keys() | mirrors.keys())
        for difference in _differences(
            name,
            compiled.get(name, {}),
            mirrored_layout(mirrors[name]) if name in mirrors else {},
        )
    ]
    if wrong:
        more = f"; and {len(wrong) - _MENTIONED} more" if len(wrong) > _MENTIONED else ""
        raise MirrorError(
            f"{path} does not fit this Python code: {'; '.join(wrong[:_MENTIONED])}{more}. "
            "Both must come from one version of the sources: install spikenm_fx again. If you "
            "are changing a structure, change csrc/abi.h, csrc/structures.cpp and its mirror in "
            "native/library.py together."
        )


def _differences(structure: str, compiled: Layout, mirrored: Layout) -> list[str]:
    # The whole structure last: which field made it larger is the better answer.
    names = sorted(compiled.keys() | mirrored.keys(), key=lambda name: (not name, name))
    return [
        f"{structure}{'.' if name else ''}{name} is {_place(compiled.get(name))} in the library, "
        f"{_place(mirrored.get(name))} in Python"
        for name in names
        if compiled.get(name) != mirrored.get(name)
    ]


def _place(place: tuple[int, int] | None) -> str:
    return "not there" if place is None else f"{place[1]} bytes at {place[0]}"
