# SPDX-License-Identifier: Apache-2.0
"""Run a NIR graph step by step in plain torch, as its reader would: what an export is held against.

Independent of the readers and of the model's own classes; every parameter is read from the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spikenm_fx.errors import ExportError
from spikenm_fx.export.nir_readers import DT, Reader

__all__ = ["delayed_edges", "run_graph"]


def run_graph(graph: Any, x: Tensor, reader: Reader) -> dict[str, Tensor]:
    """Every node's output in every step.

    Args:
        graph: a ``nir.NIRGraph`` without graphs inside.
        x: ``[T, N, ...]``, the input of each step.
        reader: whose rule of firing and of time applies.

    Returns:
        ``[T, N, ...]`` by the node's name.

    Raises:
        ExportError: for a node that is not known here.
    """
    nodes: Mapping[str, Any] = graph.nodes
    order, late = _order(graph)
    sources: dict[str, list[str]] = {name: [] for name in nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    state: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = {name: [] for name in nodes}
    with torch.no_grad():
        for given in x:
            now: dict[str, Tensor] = {}
            for name in order:
                if type(nodes[name]).__name__ == "Input":
                    now[name] = given
                    continue
                terms = [before.get(s) if (s, name) in late else now[s] for s in sources[name]]
                there = [term for term in terms if term is not None]
                total = sum(there[1:], start=there[0])
                now[name] = _apply(name, nodes[name], total, state, reader)
            for name, value in now.items():
                seen[name].append(value)
            before = now
    return {name: torch.stack(values) for name, values in seen.items()}


def delayed_edges(graph: Any) -> set[tuple[str, str]]:
    """The edges that hand on what was computed a step before: those that close a circle."""
    return _order(graph)[1]


def _order(graph: Any) -> tuple[list[str], set[tuple[str, str]]]:
    network = nx.DiGraph()
    network.add_nodes_from(graph.nodes)
    network.add_edges_from(graph.edges)
    late: set[tuple[str, str]] = set()
    for circle in list(nx.strongly_connected_components(network)):
        if len(circle) == 1 and not network.has_edge(*(2 * tuple(circle))):
            continue
        neurons = {n for n in circle if hasattr(graph.nodes[n], "v_threshold")}
        late |= {(s, t) for s, t in graph.edges if t in neurons and s in circle}
    network.remove_edges_from(late)
    return list(nx.topological_sort(network)), late


def _apply(name: str, node: Any, x: Tensor, state: dict[str, Tensor], reader: Reader) -> Tensor:
    kind = type(node).__name__
    if kind == "Output":
        return x
    if kind in ("Affine", "Linear"):
        return F.linear(x, _tensor(node.weight), _tensor(getattr(node, "bias", None)))
    if kind in ("Conv1d", "Conv2d"):
        options = {key: _plain(getattr(node, key)) for key in ("stride", "padding", "dilation")}
        convolve: Any = F.conv1d if kind == "Conv1d" else F.conv2d
        weight, bias = _tensor(node.weight), _tensor(node.bias)
        return convolve(x, weight, bias, groups=int(node.groups), **options)  # type: ignore[no-any-return]
    if kind in ("AvgPool2d", "SumPool2d"):
        size, stride, padding = (
            _plain(getattr(node, key)) for key in ("kernel_size", "stride", "padding")
        )
        mean = F.avg_pool2d(x, size, stride, padding)
        return mean if kind == "AvgPool2d" else mean * float(np.prod(size))
    if kind == "Flatten":
        start = int(node.start_dim)
        return x.flatten(start + 1 if start >= 0 else start, int(node.end_dim))
    if kind in ("LIF", "IF", "LI", "I"):
        return _neuron(name, node, x, state, reader)
    raise ExportError(f"node {name} is a {kind}, which this check does not know")


def _neuron(name: str, node: Any, x: Tensor, state: dict[str, Tensor], reader: Reader) -> Tensor:
    spikes = hasattr(node, "v_threshold")
    start = _tensor(node.v_reset) if spikes and reader.reset else x.new_zeros(())
    v = state.get(name, torch.zeros_like(x) + start)
    r = x.new_tensor(1.0) if reader.name in ("norse", "sinabs") else _tensor(node.r)
    if hasattr(node, "tau"):
        tau, leak = _tensor(node.tau), _tensor(node.v_leak)
        euler = v + (leak + r * x - v) * (DT / tau)
        v = torch.exp(-1.0 / tau) * v + x if reader.counts else euler
    else:
        v = v + (x if reader.name == "norse" else DT * r * x)
    if not spikes:
        state[name] = v
        return v
    threshold = _tensor(node.v_threshold)
    if reader.counts:
        fired = torch.div(v, threshold, rounding_mode="trunc").clamp_min(0.0)
        state[name] = v - fired * threshold
        return fired
    fired = torch.gt(v, threshold) if reader.strict else torch.ge(v, threshold)
    fired = fired.to(x.dtype)
    reset = _tensor(node.v_reset) if reader.reset else torch.zeros_like(threshold)
    state[name] = (1.0 - fired) * v + fired * reset
    return fired


def _tensor(value: Any) -> Any:
    """As float32; None stays None."""
    return None if value is None else torch.as_tensor(np.asarray(value, dtype=np.float32))


def _plain(value: Any) -> Any:
    """A number, a tuple of them or a word, from whatever a file gives."""
    if isinstance(value, str | bytes):
        return value.decode() if isinstance(value, bytes) else value
    found = np.asarray(value).tolist()
    return tuple(found) if isinstance(found, list) else found
