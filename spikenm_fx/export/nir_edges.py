# SPDX-License-Identifier: Apache-2.0
"""The order of a NIR graph's edges, by which some readers decide what runs when."""

from __future__ import annotations

import networkx as nx

from spikenm_fx.errors import ExportError
from spikenm_fx.export.nir_readers import Reader
from spikenm_fx.export.parts import StepGraph

__all__ = ["ordered_edges"]


def ordered_edges(steps: StepGraph, reader: Reader) -> list[tuple[str, str]]:
    """All edges, those of feedback first, then the nearer targets.

    Raises:
        ExportError: where a reader would run a sum before all that it sums, whatever the order.
    """
    network = nx.DiGraph()
    network.add_nodes_from(steps.parts)
    network.add_edges_from((s, t) for s, t, delay in steps.edges if not delay)
    rank = {name: number for number, name in enumerate(nx.topological_sort(network))}
    late = {(s, t) for s, t, delay in steps.edges if delay}
    returning = {s for s, _ in late}
    edges = sorted(
        ((s, t) for s, t, _ in steps.edges),
        key=lambda edge: (rank[edge[0]], edge[1] not in returning, rank[edge[1]]),
    )
    if reader.in_preorder:
        _refuse_early(edges, late, reader)
    return edges


def _refuse_early(edges: list[tuple[str, str]], late: set[tuple[str, str]], reader: Reader) -> None:
    network = nx.DiGraph(edges)
    order = {name: number for number, name in enumerate(nx.dfs_preorder_nodes(network, "input"))}
    for source, target in edges:
        if (source, target) not in late and order.get(source, -1) > order.get(target, -1):
            raise ExportError(
                f"{target} is fed by branches, and {reader.name} would run it before {source}: it "
                "reads no parallel branches; use target='spikingjelly', 'snntorch' or 'file'"
            )
    if order.get("output") != len(order) - 1:
        raise ExportError(
            f"{reader.name} takes what it runs last for the output, and that would not be this "
            "model's output; use target='spikingjelly', 'snntorch' or 'file'"
        )
