# SPDX-License-Identifier: Apache-2.0
"""Tensors with a node attached, and the way between them and ordinary ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikenm_fx._torch import DisableTorchFunction, no_torch_function

__all__ = ["Traced", "Unwrapped", "as_traced", "holds_tensors", "rebuild"]


_ATOMS = frozenset({int, float, bool, str, type(None), nn.Parameter})
"""What arguments mostly are beside tensors of the trace, and needs no look inside."""


class Traced(Tensor):
    """A tensor of the trace: the example's value, its node, and the tensor it is a view of."""

    __torch_function__ = no_torch_function
    node: fx.Node
    base: Traced | None


def as_traced(value: Tensor, node: fx.Node, base: Traced | None = None) -> Traced:
    """``value``, of any shape, with ``node`` attached; ``base`` is what it is a view of."""
    with DisableTorchFunction():  # our own business, and each mode that sees it costs time
        free = value.detach() if value.requires_grad else value
        traced = free.as_subclass(Traced)
    traced.node, traced.base = node, base
    return traced


class Unwrapped:
    """Ordinary tensors for a call, and the way back from them to the traced ones."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Traced]] = []

    def plain(self, tree: Any) -> Any:
        """``tree`` with ordinary tensors in place of traced ones."""
        if isinstance(tree, Traced):
            with DisableTorchFunction():
                tensor = tree.as_subclass(Tensor)
            self._pairs.append((tensor, tree))
            return tensor
        if type(tree) is tuple:
            return tuple([x if type(x) in _ATOMS else self.plain(x) for x in tree])
        if type(tree) is dict and not tree:  # no keyword arguments, as mostly
            return tree
        if isinstance(tree, tuple) and hasattr(tree, "_make"):
            return tree._make(self.plain(x) for x in tree)
        if isinstance(tree, tuple | list) and not isinstance(tree, torch.Size):
            return type(tree)(self.plain(x) for x in tree)
        if isinstance(tree, dict):
            return {k: self.plain(v) for k, v in tree.items()}
        if isinstance(tree, slice):
            return slice(*(self.plain(x) for x in (tree.start, tree.stop, tree.step)))
        return tree

    def __iter__(self) -> Iterator[tuple[Tensor, Traced]]:
        return iter(self._pairs)

    def origin(self, tensor: Tensor) -> Traced | None:
        """The traced argument that ``tensor``, of any shape, is."""
        return next((traced for plain, traced in self._pairs if plain is tensor), None)

    def base(self, tensor: Tensor) -> Traced | None:
        """The traced argument that ``tensor``, of any shape, is a view of."""
        with DisableTorchFunction():
            return next((t for p, t in self._pairs if shares_memory(p, tensor)), None)


def rebuild(value: Any, wrap: Callable[[Any, Any], Any]) -> Any:
    """A tuple, list or dict of results with its tensors wrapped."""
    if isinstance(value, dict):
        items = {k: wrap(k, v) if holds_tensors(v) else v for k, v in value.items()}
        return items if type(value) is dict else type(value)(items)
    parts = [wrap(i, v) if holds_tensors(v) else v for i, v in enumerate(value)]
    if hasattr(value, "_make"):
        return value._make(parts)
    if isinstance(value, list):
        return parts
    try:
        return type(value)(parts)  # torch.return_types are tuples, built from one sequence
    except TypeError:
        return tuple(parts)


def holds_tensors(value: Any) -> bool:
    """Whether a nest of containers holds any tensor."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, torch.Size):
        return False
    if isinstance(value, dict):
        return any(holds_tensors(v) for v in value.values())
    return isinstance(value, tuple | list) and any(holds_tensors(v) for v in value)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both, of any shapes, lie in the same storage."""
    if a.layout is not torch.strided or b.layout is not torch.strided or a.is_meta or b.is_meta:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
