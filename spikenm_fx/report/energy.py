# SPDX-License-Identifier: Apache-2.0
"""Energy of operations: the 45 nm convention of the SNN literature, named and overridable.

Horowitz, "Computing's energy problem", ISSCC 2014: a 32-bit float addition costs 0.9 pJ, a
multiplication 3.7 pJ.  The convention counts weight layers only: no memory traffic, no neuron
updates, no control.  It compares models; it does not predict a chip's power.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spikenm_fx.errors import ReportError

__all__ = ["PJ_PER_AC", "PJ_PER_MAC", "EnergyModel"]

PJ_PER_AC = 0.9
"""Picojoule of one accumulation: a spike meets a weight."""

PJ_PER_MAC = 4.6
"""Picojoule of one multiply-accumulate: an analog value meets a weight."""


@dataclass(frozen=True, slots=True)
class EnergyModel:
    """Picojoule per operation; replace the constants by those of your technology.

    Attributes:
        pj_per_ac: of one accumulation (a SynOp).
        pj_per_mac: of one multiply-accumulate.

    Raises:
        ReportError: for a negative or infinite one.
    """

    pj_per_ac: float = PJ_PER_AC
    pj_per_mac: float = PJ_PER_MAC

    def __post_init__(self) -> None:
        for name in ("pj_per_ac", "pj_per_mac"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ReportError(f"{name}={getattr(self, name)!r}: give 0 or more, and finite")

    def picojoule(self, synops: float, macs: float) -> float:
        """Energy of ``synops`` accumulations and ``macs`` multiply-accumulates, in pJ."""
        return self.pj_per_ac * synops + self.pj_per_mac * macs
