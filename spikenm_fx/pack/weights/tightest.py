# SPDX-License-Identifier: Apache-2.0
"""The pattern that a weight is stored with."""

from __future__ import annotations

from torch import Tensor

from spikenm_fx.pattern import NM, tightest

__all__ = ["DENSE", "tightest_pattern"]

PATTERNS = tuple(
    NM.parse(p) for p in ("1:16", "1:8", "2:16", "1:4", "2:8", "4:16", "1:2", "2:4", "4:8")
)
DENSE = NM(1, 1)


def tightest_pattern(weight: Tensor) -> NM:
    """The sparsest common pattern that a weight satisfies; 1:1 where it satisfies none.

    Args:
        weight: ``(O, C / groups, *kernel)``.
    """
    return tightest(weight, PATTERNS, remainder=True) or DENSE
