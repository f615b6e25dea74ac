# SPDX-License-Identifier: Apache-2.0
"""The execution trace: one real forward, each aten operation written into an fx graph.

It follows whatever Python does (control flow, scripted helpers, custom Functions) because it only
watches the dispatcher; tensors are recognised by identity, then by the storage they live in.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from spikenm_fx.trace.execution.values import describe

if TYPE_CHECKING:
    from spikenm_fx.trace.execution.tracer import ValueTracer

__all__ = ["Recorder"]


class Recorder(TorchDispatchMode):
    """Watch the dispatcher and write what happens into ``tracer``'s graph.

    Args:
        tracer: names modules and owns the graph.
    """

    def __init__(self, tracer: ValueTracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._writers: dict[int, fx.Node] = {}
        self._leaf: fx.Node | None = None

    @property
    def in_leaf(self) -> bool:
        """Whether what runs now is part of a leaf."""
        return self._leaf is not None

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that made ``tensor``; a constant's where none of ours did."""
        entry = self._nodes.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        writer = self._writers.get(_storage(tensor))
        return self.tracer.constant(tensor) if writer is None else writer

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called while recording: leaves become nodes, others are passed through."""
        tracer = self.tracer
        if self._leaf is not None:
            return forward(*args, **kwargs)
        tracer._scope.append(m)
        try:
            if not tracer.leaf(m):
                return forward(*args, **kwargs)
            node = self._record("call_module", tracer.name_of(m), args, kwargs)
            node.meta["module"] = m
            self._leaf = node
            try:
                out = forward(*args, **kwargs)
            finally:
                self._leaf = None
            self._outputs(node, out, measure=True)
            return out
        finally:
            tracer._scope.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._leaf is not None:
            out = func(*args, **kwargs)
            # whatever a leaf writes, its state included, is known to come from it
            for tensor in _tensors(out):
                self._writers[_storage(tensor)] = self._leaf
            return out
        node = self._record("call_function", func, args, kwargs)
        out = func(*args, **kwargs)
        self._outputs(node, out)
        return out

    def _record(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        to_node = lambda x: self.node_of(x) if isinstance(x, Tensor) else x  # noqa: E731
        args, kwargs = tree_map(to_node, (args, kwargs))
        tracer = self.tracer
        return tracer.create_node(kind, target, tracer.create_arg(args), tracer.create_arg(kwargs))

    def _outputs(self, node: fx.Node, out: Any, *, measure: bool = False) -> None:
        node.meta["value"] = describe(out, measure=measure)
        if isinstance(out, Tensor):
            self.remember(out, node)
        elif isinstance(out, tuple | list | dict):
            items = out.items() if isinstance(out, dict) else enumerate(out)
            for key, item in items:
                if _tensors(item):
                    child = self.tracer.create_node(
                        "call_function", operator.getitem, (node, key), {}
                    )
                    self._outputs(child, item, measure=measure)

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        """Note that ``tensor`` was made by ``node``."""
        self._nodes[id(tensor)] = (weakref.ref(tensor), node)
        self._writers[_storage(tensor)] = node


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def _storage(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        return -id(tensor)
    return int(tensor.untyped_storage()._cdata)
