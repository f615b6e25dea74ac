# SPDX-License-Identifier: Apache-2.0
"""What an output that waits for a neuron needs of its layer: where both meet."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from spikenm_fx.pack.engine.meter import Meter
from spikenm_fx.pack.engine.spikes import SpikeBits
from spikenm_fx.pack.kernels.cpu import LayerShape

__all__ = ["Choice", "WaitingLayer"]

Choice = Literal["dense", "reference", "fma", "lut", "event", "event8", "amx", "amx8"]
"""How a layer runs: torch's dense layer, the reference backend, or a native kernel."""


class WaitingLayer(Protocol):
    """A packed layer, as the outputs see it that wait for the neuron behind it.

    Attributes:
        name: qualified name, for messages.
        choice: how it runs.
        meter: counts its time while choices are measured; None at all other times.
    """

    name: str
    choice: Choice
    meter: Meter | None

    def run(self, x: Tensor, *, rows: bool = False) -> Tensor:
        """The output for a batch of the layer's input shape, fp32.

        In any memory format where ``rows``, else in that of ``x``.
        """

    def bits_of(self, x: Tensor) -> SpikeBits | None:
        """The bits of a lazy input of the layer's input shape, if it can read them; else None."""

    def call(self, source: SpikeBits | Tensor, shape: LayerShape, **wanted: object) -> bool:
        """Run the chosen kernel on bits or ``(rows, channels)`` floats; False where it cannot."""
