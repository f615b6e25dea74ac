# SPDX-License-Identifier: Apache-2.0
"""Neuron modules that feed their own spikes back through a weight, as their frameworks write them.

With the spikes ``s`` of the step before: ``input + feedback(s)`` drives an ordinary neuron, where
``feedback`` is a layer or one factor per neuron.  Norse's cells multiply their input as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace.neurons.adapters import norse, sinabs, snntorch
from spikenm_fx.trace.neurons.adapters.adapter import is_own_class
from spikenm_fx.trace.neurons.spec import NeuronSpec, Synapse

__all__ = ["Recurrence", "linear_of", "recurrence_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Recurrence:
    """What a recurrent neuron module is made of.

    Attributes:
        spec: the neuron without its feedback, exact.
        feedback: what its spikes of the step before are multiplied with: a layer, or one factor
            for all neurons or for each.
        key: its name in the module.
        inputs: a layer of the module that its input passes first, or None.
        inputs_key: the name of its weight in the module.
        starts_empty: in the first step of each forward nothing is fed back, not even a bias.
    """

    spec: NeuronSpec
    feedback: nn.Module | Tensor
    key: str
    inputs: nn.Module | None = None
    inputs_key: str = ""
    starts_empty: bool = False

    def name(self, neuron: str, key: str | None = None) -> str:
        """Qualified name of the feedback, or of another part of the neuron."""
        return f"{neuron}.{self.key if key is None else key}".lstrip(".")

    def drive(self, x: Tensor, spikes: Tensor) -> Tensor:
        """What drives the neuron.

        Args:
            x: the module's input in one step or several, ``(..., inputs)``.
            spikes: of the step before each, of the shape of what it emits.
        """
        own = x if self.inputs is None else self.inputs(x)
        if isinstance(self.feedback, Tensor):
            return own + spikes * self.feedback
        total: Tensor = own + self.feedback(spikes)
        return total


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer of a parameter that is used without one.

    Args:
        weight: ``(outputs, inputs)``; where it is a parameter it is shared.
        bias: ``(outputs,)`` or None.
    """
    layer = nn.Linear(1, 1, bias=bias is not None)
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.eval()


def recurrence_of(module: nn.Module, spec: NeuronSpec) -> Recurrence | None:
    """The feedback of a recurrent neuron; None for every other neuron.

    Args:
        module: the neuron.
        spec: as it was read.
    """
    if is_own_class(module, "snntorch", "RLeaky", "RSynaptic"):
        return _snntorch(module, spec)
    if is_own_class(module, "norse", *norse.RECURRENT):
        return _norse(module)
    if is_own_class(module, "sinabs", *sinabs.RECURRENT):
        return _sinabs(module, spec)
    return None


def _snntorch(module: Any, spec: NeuronSpec) -> Recurrence | None:
    if module.inhibition or module.state_quant or spec.output != "spike":
        return None
    synaptic = is_own_class(module, "snntorch", "RSynaptic")
    if spec.reset == "hard" and (synaptic or spec.reset_timing == "next"):
        return None  # it then loses the input of the step after a spike as well
    layer = module.recurrent
    feedback: Any = layer if is_weight_layer(layer) else getattr(layer, "V", None)
    if not isinstance(feedback, nn.Module | Tensor):
        return None
    if isinstance(feedback, Tensor):
        feedback = torch.as_tensor(feedback).detach()
    synapse = Synapse(snntorch.decay_of(module, "alpha")) if synaptic else None
    rule = replace(spec, kind="synaptic" if synaptic else "lif", exact=True, synapse=synapse)
    return Recurrence(rule, feedback, "recurrent")


def _norse(module: Any) -> Recurrence | None:
    weights = module.input_weights, module.recurrent_weights
    if not all(isinstance(weight, nn.Parameter) for weight in weights):
        return None
    inputs, feedback = map(linear_of, weights)
    spec = norse.read(module)
    spec = replace(spec, exact=norse.has_own_reset(module))
    return Recurrence(spec, feedback, "recurrent_weights", inputs, "input_weights")


def _sinabs(module: Any, spec: NeuronSpec) -> Recurrence | None:
    if not is_weight_layer(module.rec_connect):
        return None
    rule = replace(spec, exact=sinabs.has_known_rule(module))
    return Recurrence(rule, module.rec_connect, "rec_connect", starts_empty=True)
