# SPDX-License-Identifier: Apache-2.0
"""Which firings are one neuron: the steps of a loop, and one membrane compared more than once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from spikenm_fx.trace.analysis.firing import Firing
from spikenm_fx.trace.analysis.flow import Flow
from spikenm_fx.trace.analysis.nodes import is_identity, value_users
from spikenm_fx.trace.analysis.ops import MOVES, RESHAPES, module_family, op_name

__all__ = ["Group", "grouped"]

_ORDERED = (
    RESHAPES
    | MOVES
    | {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"}
)
"""What a threshold may be applied before or after: the same neurons fire."""


@dataclass(slots=True)
class Group:
    """Firings of one neuron: of one place in the code, or of one membrane.

    Attributes:
        scope: qualified name of the module whose code fires.
        function: the autograd Function that does; None for a comparison.
        places: lines of the code.
        layers: what drives it.
        sources: what is compared with the threshold.
        membranes: the same before pooling and reshaping.
        goes_on: whether its spikes go anywhere but into what is compared in its own module next.
        members: the firings.
    """

    scope: str
    function: object
    places: set[tuple[int, ...]]
    layers: set[str]
    sources: set[fx.Node]
    membranes: set[fx.Node]
    goes_on: bool
    members: list[Firing]

    def is_with(self, other: Group) -> bool:
        """Whether both are the same neuron, of one module's code."""
        if self.scope == other.scope and not self.sources.isdisjoint(other.sources):
            return True  # one membrane, compared once to fire and once more to reset
        if (self.scope, self.function) != (other.scope, other.function):
            return False
        here = not self.places.isdisjoint(other.places)
        driven = not self.layers.isdisjoint(other.layers) or not other.layers
        return here and driven

    def is_reset_of(self, other: Group) -> bool:
        """Whether a module resets by it the membrane that the code around the module fires from."""
        around = f"{self.scope}.".startswith(f"{other.scope}.".lstrip("."))
        return not self.goes_on and around and not self.membranes.isdisjoint(other.membranes)

    def merged(self, other: Group) -> Group:
        """Both as one: named after the one whose spikes go on."""
        first, second = (self, other) if self.goes_on else (other, self)
        return Group(
            first.scope,
            first.function,
            self.places | other.places,
            self.layers | other.layers,
            self.sources | other.sources,
            self.membranes | other.membranes,
            self.goes_on or other.goes_on,
            first.members + second.members,
        )


def grouped(firings: Sequence[Firing], nodes: Sequence[fx.Node], flow: Flow) -> list[Group]:
    """One neuron per call site and driving layer: steps of a loop over time are one neuron.

    Args:
        firings: what fires, in order.
        nodes: all operations, in order.
        flow: tells which of them are layers.
    """
    groups: list[Group] = []
    compared = {firing.source for firing in firings}
    for firing in firings:
        node = firing.node
        one = Group(
            str(node.meta["scope"]),
            getattr(node.target, "function", None),
            {node.meta.get("at", ())},
            set(flow.backward(node)[0]),
            {firing.source},
            {_membrane(firing.source)},
            _goes_on(firing, compared, flow),
            [firing],
        )
        for other in [group for group in groups if group.is_with(one)]:
            groups.remove(other)
            one = other.merged(one)
        groups.append(one)
    for reset in [group for group in groups if not group.goes_on]:
        fired = [group for group in groups if group is not reset and reset.is_reset_of(group)]
        for other in fired:
            groups.remove(other)
        if fired:
            groups.remove(reset)
            groups.append(functools.reduce(Group.merged, fired, reset))
    place = {node: index for index, node in enumerate(nodes)}
    return sorted(groups, key=lambda group: min(place[one.node] for one in group.members))


def _membrane(node: fx.Node) -> fx.Node:
    """Where ``node`` comes from, through what keeps the order of values."""
    while node.op in ("call_function", "call_method", "call_module") and node.all_input_nodes:
        module = node.meta.get("module")
        name = module_family(module) if module is not None else op_name(node)
        if not (is_identity(node) or name in _ORDERED):
            break
        node = node.all_input_nodes[0]
    return node


def _goes_on(firing: Firing, compared: set[fx.Node], flow: Flow) -> bool:
    """Whether its spikes reach anything but what is compared in its own module next."""
    scope = firing.node.meta.get("scope")
    waiting, seen = [firing.node], {firing.node}
    for one in waiting:
        for user in value_users(one):
            if user in seen or user in compared:
                continue
            seen.add(user)
            if user.meta.get("scope") != scope or user.op == "output" or flow.is_layer(user):
                return True
            waiting.append(user)
    return False
