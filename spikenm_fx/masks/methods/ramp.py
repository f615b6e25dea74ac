# SPDX-License-Identifier: Apache-2.0
"""The cubic ramp of gradual pruning, and how many of M it keeps (Zhu & Gupta, arXiv 1710.01878)."""

from __future__ import annotations

from spikenm_fx.pattern import NM

__all__ = ["cubic", "keep_at"]


def cubic(first: float, last: float, progress: float) -> float:
    """``last + (first - last) * (1 - progress)^3``: fast while much is left, slow at the end.

    Args:
        first: at progress 0.
        last: at progress 1 and after it.
        progress: share of the ramp that lies behind.
    """
    return last + (first - last) * (1.0 - min(max(progress, 0.0), 1.0)) ** 3


def keep_at(nm: NM, progress: float) -> int:
    """How many of M stay on the way from all of them to N, a whole number."""
    return round(cubic(nm.of, nm.keep, progress))
