# SPDX-License-Identifier: Apache-2.0
"""Settings of the distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from spikenm_fx.errors import PlanError

__all__ = ["EID", "Credit"]

Credit = Literal["eligibility", "weight*eligibility", "weight*rate", "weight"]
"""E; |W| * E; |W| * sqrt(firing rate) (Wanda for spikes); |W|."""


@dataclass(frozen=True, slots=True)
class EID:
    """Settings of the distillation.

    Attributes:
        credit: what the targets are made of; see :data:`Credit`.
        every: optimizer steps from one refresh of the credits to the next.
        ema: share of the old average that a refresh keeps; the first one sets it.
        weight: first and last strength, linear over the steps before the freeze (the first one
            where the run's length is unknown).  In units of the root mean square of the layer's
            own logit gradient, so that it means the same under any loss scale, number of
            micro-batches and model.
        temperature: T_e of the targets; small ones are sharp.
        normalise: divide a block's credits by their ``"mean"``, or make them ``"zscore"``.
        automatic: False leaves the gradient to :func:`eid_loss` in the user's own loss.
    """

    credit: Credit = "weight*eligibility"
    every: int = 20
    ema: float = 0.8
    weight: tuple[float, float] = (0.1, 0.1)
    temperature: float = 1.0
    normalise: Literal["mean", "zscore"] = "mean"
    automatic: bool = True

    def __post_init__(self) -> None:
        if self.credit not in get_args(Credit):
            raise PlanError(f"credit={self.credit!r}: known are {list(get_args(Credit))}")
        if self.every < 1 or not 0 <= self.ema < 1 or not self.temperature > 0:
            raise PlanError(
                f"EID(every={self.every}, ema={self.ema}, temperature={self.temperature}): needs "
                "every >= 1, 0 <= ema < 1 and temperature > 0"
            )
        if self.normalise not in ("mean", "zscore") or min(self.weight) < 0:
            raise PlanError(
                f"EID(normalise={self.normalise!r}, weight={self.weight}): normalise is 'mean' or "
                "'zscore', weights are not negative"
            )

    @property
    def needs_neuron(self) -> bool:
        """Whether the credit is defined only where a neuron follows the layer."""
        return "eligibility" in self.credit

    @property
    def needs_input(self) -> bool:
        """Whether the credit looks at activations at all."""
        return self.credit != "weight"
