# SPDX-License-Identifier: Apache-2.0
"""One-to-one runs of layer, norm and neuron: what can be fused, and credited, as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx

from spikenm_fx.trace.analysis.nodes import is_identity, readers, unique
from spikenm_fx.trace.channels.rules_nodes import is_item
from spikenm_fx.trace.graph import Chain, NodeKind

__all__ = ["find_chains"]


def find_chains(
    calls: Mapping[str, list[fx.Node]],
    names: Mapping[fx.Node, str],
    kind: Callable[[fx.Node], NodeKind],
) -> tuple[Chain, ...]:
    """The chains that every call of a layer agrees on.

    Args:
        calls: the operations of each graph node.
        names: the graph node of each operation.
        kind: what an operation is.
    """
    chains = []
    for name, nodes in calls.items():
        if kind(nodes[0]) != "layer":
            continue
        found = [_chain_from(name, node, names, kind) for node in nodes]
        first, read = found[0], any(c is not None and c.state_read for c in found)
        if first is not None and all(
            c is not None and replace(c, state_read=first.state_read) == first for c in found
        ):
            chains.append(replace(first, state_read=read))
    return tuple(chains)


def _chain_from(
    layer: str,
    node: fx.Node,
    names: Mapping[fx.Node, str],
    kind: Callable[[fx.Node], NodeKind],
) -> Chain | None:
    norm, between = None, []
    current = node
    while True:
        users = list(current.users)
        if len(users) != 1:
            return None
        current = users[0]
        now = kind(current)
        if now == "neuron":
            break
        if len(current.all_input_nodes) != 1:
            return None
        if now == "norm" and norm is None:
            norm = names[current]
        elif now == "reshape" or is_identity(current):
            between.append(names[current] if current.op == "call_module" else "")
        else:
            return None
    states = [u for u in current.users if is_item(u) and u.args[1] != 0]
    neuron = names[current]
    read = any(names[r] != neuron for state in states for r in readers(state))
    return Chain(layer, norm, neuron, unique(b for b in between if b), read)
