# SPDX-License-Identifier: Apache-2.0
"""Walk the recorded operations and carry channel spaces from their inputs to their outputs.

How one kind of operation does that is a rule; rules are registered by the modules that hold them
(:mod:`~spikenm_fx.trace.channels.rules` knows which).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from spikenm_fx.trace.channels.rules_nodes import (
    Attachment,
    ChannelRole,
    NotUnderstood,
    name_of,
    owners,
    shape_of,
)
from spikenm_fx.trace.channels.spaces import Atom, Dim, Layout, Spaces, plain
from spikenm_fx.trace.execution.record import Trace
from spikenm_fx.trace.execution.values import is_matrix

__all__ = ["ChannelReader", "Rule", "rule", "rule_where"]

_SURPRISES = (IndexError, ValueError, TypeError, KeyError, AttributeError, AssertionError)
"""What an operation called in an unforeseen way makes a rule raise."""


Rule: TypeAlias = Callable[["ChannelReader", fx.Node], Layout]
"""From an operation, whose inputs' layouts are known, to the layout of its result."""

_RULES: dict[str, Rule] = {}
_FALLBACKS: list[tuple[Callable[[str], bool], Rule]] = []


def rule(*operations: str) -> Callable[[Rule], Rule]:
    """Decorator: this is the rule of ``operations``, by their canonical names."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operations, function))
        return function

    return register


def rule_where(fits: Callable[[str], bool]) -> Callable[[Rule], Rule]:
    """Decorator: the rule of operations with no rule of their own whose name fits; first come."""

    def register(function: Rule) -> Rule:
        _FALLBACKS.append((fits, function))
        return function

    return register


class ChannelReader:
    """Walk the recorded operations once; afterwards ``attachments`` tells who holds what."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.spaces = Spaces()
        self.attachments: list[Attachment] = []
        self.layouts: dict[fx.Node, Layout] = {}
        self.items: dict[fx.Node, dict[Any, Layout]] = {}
        self.neurons: dict[fx.Node, Layout] = {}
        self.times: list[Dim] = []
        self._time_spaces: frozenset[int] | None = None
        self.outputs: dict[str, Dim] = {}
        self.inputs: dict[str, Dim] = {}
        self.names = {
            id(p): n
            for n, p in (
                *nn.Module.named_parameters(trace.model),
                *nn.Module.named_buffers(trace.model),
            )
        }
        self.matrices = {n: is_matrix(p) for n, p in nn.Module.named_parameters(trace.model)}
        self._uses = owners(trace.model)

    def read(self) -> None:
        """Visit every operation; what no rule covers freezes its inputs."""
        assert self.trace.graph is not None
        for node in self.trace.graph.nodes:
            try:
                self.layouts[node] = self._visit(node)
            except (NotUnderstood, *_SURPRISES) as error:
                label = str(node.target) if node.op == "call_module" else name_of(node)
                reason = f"{node.name}: {error if isinstance(error, NotUnderstood) else label}"
                for source in node.all_input_nodes:
                    self.freeze(source, reason)
                self.layouts[node] = plain(shape_of(node))
        for space, reason in self._shared_weights():
            self.spaces.freeze(space, reason)

    def _shared_weights(self) -> list[tuple[Dim, str]]:
        """Weights that several modules hold are permuted for all of them or not at all."""
        shared = {n for names in self._uses.values() if len(names) > 1 for n in names}
        return [
            (a.dim, f"{a.tensor}: several modules share this tensor")
            for a in self.attachments
            if a.tensor in shared
        ]

    def _visit(self, node: fx.Node) -> Layout:
        if node.op == "placeholder":
            return self.input(shape_of(node), "input of the model")
        if node.op == "get_attr":
            return self._parameter(node)
        if node.op == "output":
            for source in node.all_input_nodes:
                self.freeze(source, "output of the model")
            return ()
        name = name_of(node)
        found = _RULES.get(name) or next((r for fits, r in _FALLBACKS if fits(name)), None)
        if found is not None:
            return found(self, node)
        if not node.all_input_nodes:
            return plain(shape_of(node))  # a factory
        raise NotUnderstood(f"no rule for {name}")

    def input(self, shape: tuple[int, ...], reason: str) -> Layout:
        """Axes that may be followed (is it time?) but never permuted."""
        layout = []
        for size in shape:
            space = self.spaces.new(size) if size > 1 else None
            if space is not None:
                self.spaces.freeze_space(space, reason)
            layout.append(((Atom(size, space),),))
        return tuple(layout)

    def time_axis(self, node: fx.Node) -> int | None:
        """The axis of ``node``'s tensor along which time runs, alone or folded with the batch."""
        if self._time_spaces is None:  # asked for each edge, once everything is read
            labelled = self.spaces.labelled
            self._time_spaces = frozenset(s for axis in self.times for s in labelled(axis))
        if not self._time_spaces:
            return None
        for index, dim in enumerate(self.layouts.get(node, ())):
            if not self._time_spaces.isdisjoint(self.spaces.labelled(dim)):
                return index
        return None

    def _parameter(self, node: fx.Node) -> Layout:
        """A tensor of the model used in its own code: it goes along with whatever it meets."""
        tensor = node.meta.get("tensor")
        if not isinstance(tensor, Tensor) or id(tensor) not in self.names:
            return plain(shape_of(node))
        layout = []
        for axis, size in enumerate(tensor.shape):
            dim: Dim = ((Atom(size, self.spaces.new(size) if size > 1 else None),),)
            if size > 1:
                self.attach(tensor, axis, dim)
            layout.append(dim)
        return tuple(layout)

    def freeze(self, node: fx.Node, reason: str) -> None:
        """Nothing may permute any channels of ``node``."""
        for layout in (self.layouts.get(node, ()), *self.items.get(node, {}).values()):
            for dim in layout:
                self.spaces.freeze(dim, reason)

    def attach(self, tensor: Tensor, axis: int, dim: Dim, role: ChannelRole = "attached") -> None:
        """Note that ``tensor``, of any shape, holds the channels of ``dim`` along ``axis``.

        Raises:
            NotUnderstood: if it is no parameter or buffer of the model.
        """
        name = self.names.get(id(tensor))
        if name is None:
            raise NotUnderstood("a tensor that is no parameter or buffer of the model")
        self.attachments.append(Attachment(name, axis, dim, role))

    def source(self, node: fx.Node) -> Layout:
        """The layout of the first argument.

        Raises:
            NotUnderstood: if that is no tensor.
        """
        source = node.args[0] if node.args else node.all_input_nodes[0]
        if not isinstance(source, fx.Node):
            raise NotUnderstood("no tensor as first argument")
        return self.layouts[source]
