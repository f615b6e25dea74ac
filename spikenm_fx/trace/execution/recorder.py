# SPDX-License-Identifier: Apache-2.0
"""The execution trace: one real forward, each aten operation written into an fx graph.

It follows whatever Python does (control flow, scripted helpers, custom Functions) because it only
watches the dispatcher; tensors are recognised by identity, then by the storage they live in.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, fx, nn

from spikenm_fx._torch import (
    DispatchMode,
    storage_id,
    storage_kept_apart,
    tree_flatten,
    tree_map,
)
from spikenm_fx.trace.execution.leaves import LeafRule
from spikenm_fx.trace.execution.values import describe

__all__ = ["GraphWriter", "Recorder"]


class GraphWriter(Protocol):
    """What a recorder needs of the tracer whose graph it writes into."""

    @property
    def leaf(self) -> LeafRule:
        """Which modules are one node."""
        ...

    def name_of(self, module: nn.Module) -> str:
        """The qualified name of a module, in the tree or not."""
        ...

    def inside(self, module: nn.Module) -> AbstractContextManager[None]:
        """What is recorded in the block comes from ``module``."""
        ...

    def constant(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor, of any shape, that no recorded operation made."""
        ...

    def create_arg(self, a: Any) -> Any:
        """What a node may hold in place of an argument."""
        ...

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node to the graph."""
        ...


class Recorder(DispatchMode):
    """Watch the dispatcher and write what happens into a graph.

    Args:
        writer: names modules and owns the graph.
    """

    def __init__(self, writer: GraphWriter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writer = writer
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        # by storage: a module writes into tensors that it does not return
        self._writers: dict[int, tuple[fx.Node, object]] = {}
        self._leaf: fx.Node | None = None

    @property
    def in_leaf(self) -> bool:
        """Whether what runs now is part of a leaf."""
        return self._leaf is not None

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made ``tensor``, of any shape; a constant's where none of ours did."""
        entry = self._nodes.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        writer = self._writers.get(storage_id(tensor))
        return self._writer.constant(tensor) if writer is None else writer[0]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called while recording: leaves become nodes, others are passed through."""
        if self._leaf is not None:
            return forward(*args, **kwargs)
        with self._writer.inside(m):
            if not self._writer.leaf(m):
                return forward(*args, **kwargs)
            node = self._record("call_module", self._writer.name_of(m), args, kwargs)
            node.meta["module"] = m
            self._leaf = node
            try:
                out = forward(*args, **kwargs)
            finally:
                self._leaf = None
            self._outputs(node, out, measure=True)
            return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._leaf is not None:
            out = func(*args, **kwargs)
            # whatever a leaf writes, its state included, is known to come from it
            for tensor in _tensors(out):
                self._wrote(tensor, self._leaf)
            return out
        node = self._record("call_function", func, args, kwargs)
        out = func(*args, **kwargs)
        self._outputs(node, out)
        return out

    def _record(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        to_node = lambda x: self.node_of(x) if isinstance(x, Tensor) else x  # noqa: E731
        args, kwargs = tree_map(to_node, (args, kwargs))
        writer = self._writer
        return writer.create_node(kind, target, writer.create_arg(args), writer.create_arg(kwargs))

    def _outputs(self, node: fx.Node, out: Any, *, measure: bool = False) -> None:
        node.meta["value"] = describe(out, measure=measure)
        if isinstance(out, Tensor):
            self.remember(out, node)
        elif isinstance(out, tuple | list | dict):
            items = out.items() if isinstance(out, dict) else enumerate(out)
            for key, item in items:
                if _tensors(item):
                    child = self._writer.create_node(
                        "call_function", operator.getitem, (node, key), {}
                    )
                    self._outputs(child, item, measure=measure)

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        """Note that ``tensor``, of any shape, was made by ``node``."""
        self._nodes[id(tensor)] = (weakref.ref(tensor), node)
        self._wrote(tensor, node)

    def _wrote(self, tensor: Tensor, node: fx.Node) -> None:
        self._writers[storage_id(tensor)] = (node, storage_kept_apart(tensor))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]
