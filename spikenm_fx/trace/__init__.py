# SPDX-License-Identifier: Apache-2.0
"""Read a spiking model without changing it.

>>> graph = trace(model, example_inputs)            # a tensor or a tuple of arguments
>>> graph.layers["layer1.0.conv1"].pre              # ('sn1',): who feeds it
>>> graph.layers["layer1.0.conv1"].post             # ('layer1.0.sn1',): whom it drives
>>> graph.layers["layer1.0.conv1"].input_signal     # spike {0,1}, integer or analog
>>> graph.neurons["sn1"].spec                       # the exact update rule, for kernels and EID
>>> graph.chains                                    # layer -> (norm) -> neuron, one to one
>>> coupled_groups(graph)                           # what must be permuted or removed together
>>> graph.route, graph.notes                        # how it was read, and what was unusual
"""

from spikenm_fx.trace.analysis.signal import Signal
from spikenm_fx.trace.api import trace
from spikenm_fx.trace.channels.groups import CoupledGroup, Member, coupled_groups, permute_channels
from spikenm_fx.trace.execution.leaves import Limits
from spikenm_fx.trace.graph import Chain, LayerRecord, NeuronRecord, Note, SpikingGraph
from spikenm_fx.trace.neurons.find import find_neurons, neuron_spec, register_neuron
from spikenm_fx.trace.neurons.spec import NeuronSpec, Surrogate, Synapse, membranes, simulate

__all__ = [
    "Chain",
    "CoupledGroup",
    "LayerRecord",
    "Limits",
    "Member",
    "NeuronRecord",
    "NeuronSpec",
    "Note",
    "Signal",
    "SpikingGraph",
    "Surrogate",
    "Synapse",
    "coupled_groups",
    "find_neurons",
    "membranes",
    "neuron_spec",
    "permute_channels",
    "register_neuron",
    "simulate",
    "trace",
]
