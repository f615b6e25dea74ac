# SPDX-License-Identifier: Apache-2.0
"""Who reaches whom in the recorded operations: layers, neurons, and what lies between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import fx

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace.analysis.nodes import is_step, unique, value_inputs, value_users, walk
from spikenm_fx.trace.analysis.products import parameter_behind
from spikenm_fx.trace.neurons.spec import NeuronSpec

__all__ = ["Flow", "Names"]

Names: TypeAlias = tuple[str, ...]


class Flow:
    """The recorded operations, walked forwards and backwards.

    Args:
        ident: names of nodes, as far as they are known yet.
        weights: raw parameters, by the nodes that multiply with them.
        specs: of the neurons, by name.
    """

    def __init__(
        self,
        ident: Mapping[fx.Node, str],
        weights: Mapping[fx.Node, str],
        specs: Mapping[str, NeuronSpec],
    ) -> None:
        self.ident, self.weights, self.specs = ident, weights, specs
        self.owned: set[fx.Node] = set()  # products with weights that belong to a neuron

    def identity(self, node: fx.Node) -> str:
        """The name under which ``node`` is known: of its layer, neuron or module, or its own."""
        if node in self.ident:
            return self.ident[node]
        if node in self.weights:
            return self.weights[node]
        return str(node.target) if node.op == "call_module" else node.name

    def is_neuron(self, node: fx.Node) -> bool:
        """Whether it is a call of a neuron."""
        if is_step(node):
            return True
        return node.op == "call_module" and str(node.target) in self.specs

    def is_layer(self, node: fx.Node) -> bool:
        """Whether it multiplies with a weight."""
        if node in self.owned:
            return False
        module = node.meta.get("module")
        return node in self.weights or (module is not None and is_weight_layer(module))

    def backward(self, node: fx.Node) -> tuple[Names, Names]:
        """Layers, and all sources, that ``node``'s data comes from, nearest first."""
        layers: list[str] = []
        sources: list[str] = []

        def stop(found: fx.Node) -> bool:
            if self.is_layer(found):
                layers.append(self.identity(found))
                sources.append(self.identity(found))
            elif self.is_neuron(found) or found.op == "placeholder":
                sources.append(self.identity(found))
            elif found.op != "get_attr":
                return False
            return True

        starts = self.data_inputs(node) if self.is_layer(node) else value_inputs(node)
        walk(starts, value_inputs, stop)
        return unique(layers), unique(sources)

    def at(self, node: fx.Node) -> Names:
        """Where the value of ``node`` comes from: itself, if it is a source."""
        is_source = self.is_layer(node) or self.is_neuron(node) or node.op == "placeholder"
        return (self.identity(node),) if is_source else self.backward(node)[1]

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        """A layer's inputs without its weight."""
        if node not in self.weights:
            return node.all_input_nodes
        return [n for n in node.all_input_nodes if parameter_behind(n) is None]

    def multiplies_input(self, node: fx.Node) -> bool:
        """Whether the model's input reaches a layer as it is, and no layer comes before it."""
        near: list[bool] = []
        behind: list[bool] = []

        def stop(found: fx.Node) -> bool:
            near.append(found.op == "placeholder")
            return self.is_layer(found) or self.is_neuron(found)

        def stop_at_layer(found: fx.Node) -> bool:
            behind.append(self.is_layer(found))
            return behind[-1]

        sources = self.data_inputs(node)
        walk(sources, value_inputs, stop)
        if not any(near):
            return False
        walk(sources, value_inputs, stop_at_layer)
        return not any(behind)

    def forward(self, node: fx.Node) -> tuple[Names, Names, bool]:
        """Neurons and layers that ``node``'s output reaches, and whether it leaves the model."""
        neurons: list[str] = []
        layers: list[str] = []
        left: list[bool] = []

        def stop(found: fx.Node) -> bool:
            if self.is_neuron(found):
                neurons.append(self.identity(found))
            elif self.is_layer(found):
                layers.append(self.identity(found))
            elif found.op == "output":
                left.append(True)
            else:
                return False
            return True

        walk(value_users(node), value_users, stop)
        return unique(neurons), unique(layers), bool(left)
