# SPDX-License-Identifier: Apache-2.0
"""The order in which operations run: what runs step by step lies together, all else around it."""

from __future__ import annotations

from collections.abc import Sequence

from spikenm_fx.program.code import Code, Op

__all__ = ["loops_of", "needed", "ordered"]


def needed(ops: Sequence[Op], outputs: set[int]) -> list[Op]:
    """The operations that an output or a state needs, in their order.

    Args:
        ops: in an order in which each reads what those before it gave.
        outputs: numbers of the values that the program gives.
    """
    kept: list[Op] = []
    read = set(outputs)
    for op in reversed(ops):
        if op.code in (Code.NEURON, Code.RECALL, Code.STORE) or read & set(op.outputs):
            kept.append(op)
            read |= set(op.inputs)
    return kept[::-1]


def ordered(ops: Sequence[Op]) -> list[Op]:
    """The same operations, so that each runs after those that it reads.

    What a step needs of the step before is a cycle: its operations lie side by side, those that
    recall first.  Layers that feed a cycle, or read it, are none of it, and run once for all steps.

    Args:
        ops: in an order in which each reads what those before it gave.
    """
    if not any(op.code is Code.RECALL for op in ops):
        return list(ops)
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(ops)))
    made = {value: at for at, op in enumerate(ops) for value in op.outputs}
    recalls = {op.settings[0]: at for at, op in enumerate(ops) if op.code is Code.RECALL}
    for at, op in enumerate(ops):
        graph.add_edges_from((made[value], at) for value in op.inputs if value in made)
        if op.code is Code.STORE:
            graph.add_edge(at, recalls[op.settings[0]])
    whole = nx.condensation(graph)
    groups = {n: sorted(data["members"]) for n, data in whole.nodes(data=True)}
    places = nx.lexicographical_topological_sort(whole, key=lambda n: groups[n][0])
    return [
        ops[at]
        for group in places
        for at in sorted(groups[group], key=lambda at: (ops[at].code is not Code.RECALL, at))
    ]


def loops_of(ops: Sequence[Op]) -> list[range]:
    """Which operations run step by step, as the library finds them.

    Args:
        ops: in their order.
    """
    recalls = {op.settings[0]: at for at, op in enumerate(ops) if op.code is Code.RECALL}
    found: list[range] = []
    for at, op in enumerate(ops):
        if op.code is not Code.STORE:
            continue
        loop = range(recalls[op.settings[0]], at + 1)
        while found and found[-1].stop > loop.start:
            loop = range(min(loop.start, found.pop().start), loop.stop)
        found.append(loop)
    return found
