# SPDX-License-Identifier: Apache-2.0
"""Gradients in the middle of a forward pass, without the hooks that others have left in its graph.

FSDP2 hooks the outputs of its modules, and the graph before them, to gather weights for a backward
pass and to reduce gradients after it.  Whoever asks for a gradient of a part of the graph while the
forward is still on its way would set that off, and find the weights of the next layer gone.  Here
the nodes of the graph are called one after the other, as the engine does, and hooks are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from spikenm_fx._torch import is_fsdp_node, node_outputs, zeros_for_none

__all__ = ["gradients_without_hooks"]

_COMPILED = "CompiledFunction"


def gradients_without_hooks(
    of: Tensor, grad: Tensor, wanted: Sequence[Tensor]
) -> list[Tensor | None]:
    """As ``torch.autograd.grad(of, wanted, grad, retain_graph=True, allow_unused=True)``.

    Args:
        of: of any shape, with a graph.
        grad: of the same shape.
        wanted: from which ``of`` was computed, each with a graph of its own.

    Returns:
        one gradient each; None where ``of`` does not depend on it.

    Raises:
        RuntimeError: as of autograd: for a compiled graph, or where what a node needs is gone.
    """
    goals = {(id(y.grad_fn), y.output_nr): place for place, y in enumerate(wanted)}
    ends = {id(y.grad_fn) for y in wanted}
    found: list[Tensor | None] = [None] * len(wanted)
    waiting: dict[int, list[Tensor | None]] = {}
    _add(waiting, of.grad_fn, of.output_nr, grad)
    for node in reversed(list(_towards(of.grad_fn, ends))):
        grads = waiting.pop(id(node), None)
        if grads is None:
            continue
        for number, own in enumerate(grads):
            if (id(node), number) in goals:
                found[goals[id(node), number]] = own
        if id(node) in ends:
            continue
        for (before, number), own in zip(node.next_functions, _called(node, grads), strict=False):
            if before is not None and own is not None:
                _add(waiting, before, number, own)
    return found


def _called(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of what the node's operation was given, in the order of ``next_functions``."""
    if is_fsdp_node(node):  # hands its inputs on as they are
        return tuple(grads)
    if _COMPILED in node.name():
        raise RuntimeError("a compiled graph is not walked node by node")
    if callable(node):
        return _as_tuple(node(*grads))
    # a torch.autograd.Function, whose arguments that are no tensors have gradients as well: None
    made = _as_tuple(node.apply(*zeros_for_none(node, grads)))
    needed = (own for own, asked in zip(made, node.needs_input_grad, strict=True) if asked)
    return tuple(None if before is None else next(needed) for before, _ in node.next_functions)


def _as_tuple(made: Any) -> tuple[Tensor | None, ...]:
    return made if isinstance(made, tuple) else (made,)


def _add(waiting: dict[int, list[Tensor | None]], node: Any, number: int, grad: Tensor) -> None:
    grads = waiting.setdefault(id(node), [None] * node_outputs(node))
    known = grads[number]
    grads[number] = grad if known is None else known + grad


def _towards(start: Any, ends: set[int]) -> Iterator[Any]:
    """The nodes between, those nearer to the ends first; nothing behind an end."""
    leads: dict[int, bool] = {}
    stack: list[tuple[Any, bool]] = [(start, False)]
    while stack:
        node, seen = stack.pop()
        if not seen and id(node) in leads:
            continue
        before = [n for n, _ in node.next_functions if n is not None]
        if id(node) in ends:
            before = []
        if not seen:
            leads[id(node)] = id(node) in ends
            stack.append((node, True))
            stack += [(n, False) for n in before if id(n) not in leads]
        else:
            leads[id(node)] |= any(leads[id(n)] for n in before)
            if leads[id(node)]:
                yield node
