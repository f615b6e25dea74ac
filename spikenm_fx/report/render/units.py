# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations

__all__ = ["bytes_text", "count_text", "counted", "energy_text", "percent"]


def percent(value: float | None, digits: int = 1) -> str:
    """``0.1234`` as ``12.3%``; a dash where there is no value."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def count_text(value: float, unit: str = "") -> str:
    """``1234567`` as ``1.23M``, with ``unit`` behind."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"


def energy_text(picojoule: float) -> str:
    """Picojoule in the unit people read: pJ, nJ, uJ, mJ."""
    for size, unit in ((1e9, "mJ"), (1e6, "uJ"), (1e3, "nJ")):
        if picojoule >= size:
            return f"{picojoule / size:.3g} {unit}"
    return f"{picojoule:.3g} pJ"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """``1 thread``, ``4 threads``, ``2 batches``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def bytes_text(count: float) -> str:
    """Bytes in KiB or MiB."""
    for size, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"
