# SPDX-License-Identifier: Apache-2.0
"""Neuron modules that feed their own spikes back through a layer: snnTorch's ``RLeaky``."""

from __future__ import annotations

from torch import nn

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import NeuronSpec
from spikenm_fx.trace.neurons.adapters.adapter import is_own_class
from spikenm_fx.trace.neurons.recurrent import Recurrence, recurrence_of

__all__ = ["Recurrence", "own_recurrence"]


def own_recurrence(module: nn.Module, spec: NeuronSpec) -> Recurrence | None:
    """The feedback of an ``RLeaky`` with a layer; None for every other neuron.

    Args:
        module: the neuron.
        spec: as it was read.
    """
    found = recurrence_of(module, spec) if is_own_class(module, "snntorch", "RLeaky") else None
    layer = None if found is None else found.feedback
    return found if isinstance(layer, nn.Module) and is_weight_layer(layer) else None
