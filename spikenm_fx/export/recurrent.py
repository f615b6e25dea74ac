# SPDX-License-Identifier: Apache-2.0
"""Neuron modules that feed their own spikes back through a weight: snnTorch's ``RLeaky``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import NeuronSpec
from spikenm_fx.trace.neurons.adapters.adapter import is_own_class

__all__ = ["Recurrence", "own_recurrence"]


@dataclass(frozen=True, slots=True, eq=False)
class Recurrence:
    """What a recurrent neuron module is made of.

    Attributes:
        spec: the neuron without its feedback, exact.
        layer: what its spikes of the step before are multiplied with.
        key: its name in the module.
    """

    spec: NeuronSpec
    layer: nn.Module
    key: str

    def name(self, neuron: str) -> str:
        """Qualified name of the layer."""
        return f"{neuron}.{self.key}".lstrip(".")


def own_recurrence(module: nn.Module, spec: NeuronSpec) -> Recurrence | None:
    """The feedback of an ``RLeaky``; None for every other neuron.

    Args:
        module: the neuron.
        spec: as it was read.
    """
    m: Any = module
    if not is_own_class(module, "snntorch", "RLeaky") or m.inhibition or m.state_quant:
        return None
    layer = m.recurrent
    if spec.output != "spike" or not is_weight_layer(layer):
        return None
    if spec.reset == "hard" and spec.reset_timing == "next":
        return None  # it then loses the input of the step after a spike as well
    return Recurrence(replace(spec, kind="lif", exact=True), layer, "recurrent")
