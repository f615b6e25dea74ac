# SPDX-License-Identifier: Apache-2.0
"""What is seen of one masked weight: a measure for :class:`~spikenm_fx.masks.eid.Guide`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikenm_fx.masks.eid.connect import hook_layer
from spikenm_fx.masks.eid.eligibility import correlate, presynaptic_rate
from spikenm_fx.masks.eid.slopes import Source, samples_seen, slopes_at

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.watch import Watch

__all__ = ["Observed"]


class Observed:
    """The layers that hold one masked weight, and what their forward passes leave of it.

    Args:
        watch: of the model.
        layers: the layers that hold the weight, by name.
    """

    def __init__(self, watch: Watch, layers: Iterable[tuple[str, nn.Module]]) -> None:
        self.watch = watch
        self.sources = [Source(name, layer) for name, layer in layers]
        watch.sources += self.sources
        for source in self.sources if not watch.needs_neuron else ():
            hook_layer(watch, source)

    def close(self, step: int) -> None:
        """A backward pass has reached the weight: no further forward of the step is kept."""
        for source in self.sources:
            source.closed = step

    @property
    def sees(self) -> bool:
        """Whether there is anything that could be measured: a neuron behind the layer."""
        return not self.watch.needs_neuron or any(source.posts for source in self.sources)

    def measure(self) -> Tensor | None:
        """The credit that this step's forward passes left, without |W|; None where nothing did."""
        self.watch.close()
        one = self._eligibility if self.watch.needs_neuron else _root_rate
        found = [credit for source in self.sources if (credit := one(source)) is not None]
        for source in self.sources:
            source.forget()
        return torch.stack(found).sum(0) if found else None

    def _eligibility(self, source: Source) -> Tensor | None:
        for neuron in source.posts:
            neuron.catch_up()
        slopes = slopes_at(source) if source.uses and source.posts else None
        if slopes is None:
            return None
        sequences = sum(samples_seen(neuron) for neuron in source.posts[:1])
        credit = sum(
            correlate(source.layer, use.inputs, slope)
            for use, slope in zip(source.uses, slopes, strict=True)
        )
        assert isinstance(credit, Tensor)
        return credit / max(sequences, 1)


def _root_rate(source: Source) -> Tensor | None:
    if not source.uses:
        return None
    rates = [presynaptic_rate(source.layer, use.inputs) for use in source.uses]
    rate = torch.stack(rates).mean(0).sqrt()
    weight = source.layer._parameters["weight"]
    assert weight is not None
    return rate.expand(weight.shape)
