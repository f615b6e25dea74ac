# SPDX-License-Identifier: Apache-2.0
"""Batch norms that can move into the layer before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import BatchNormBase
from spikenm_fx.trace import SpikingGraph

__all__ = ["FoldedNorm", "affine_of", "neurons_behind_pools", "norms_behind_layers"]


class FoldedNorm(nn.Identity):
    """Stands where a norm was that the layer before it now computes.

    Models may still read the norm's values: RepVGG-like code pads with what the norm makes of zero.
    They are those of the folded norm, which is no submodule: nothing here trains or is saved.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.__dict__["_norm"] = norm

    def __getattr__(self, name: str) -> Any:
        norm = self.__dict__.get("_norm")  # absent while a copy is being made
        if norm is None or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(norm, name)


def norms_behind_layers(graph: SpikingGraph) -> dict[str, str]:
    """Layer -> norm, where the norm reads the layer alone and nobody else does."""
    found = {chain.layer: chain.norm for chain in graph.chains if chain.norm is not None}
    for norm in graph.of_kind("norm"):
        layer = _only(graph.nx.predecessors(norm))
        if layer is None or graph.nx.nodes[layer].get("kind") != "layer":
            continue
        calls = {graph.nx.nodes[node].get("calls") for node in (layer, norm)}
        if _only(graph.nx.successors(layer)) == norm and len(calls) == 1:
            found.setdefault(layer, norm)
    return found


def neurons_behind_pools(graph: SpikingGraph) -> dict[str, str]:
    """Layer -> neuron, where one path leads from one to the other, with a pool on the way."""
    found: dict[str, str] = {}
    for layer in graph.of_kind("layer"):
        node: str | None = _only(graph.nx.successors(layer))
        pools = 0
        while node is not None and graph.nx.in_degree(node) == 1:
            kind = graph.nx.nodes[node].get("kind")
            if kind == "neuron":
                if pools == 1:
                    found[layer] = node
                break
            if kind not in ("norm", "reshape", "pool"):
                break
            pools += kind == "pool"
            node = _only(graph.nx.successors(node))
    return found


def _only(nodes: Any) -> str | None:
    names = list(nodes)
    return names[0] if len(names) == 1 else None


def affine_of(norm: nn.Module, layer: Any) -> tuple[Tensor, Tensor] | None:
    """Factor and shift per channel of a batch norm in eval mode; None where it is not that."""
    channels = int(layer.weight.shape[0])
    if not isinstance(norm, BatchNormBase) or norm.running_mean is None or norm.running_var is None:
        return None
    if norm.num_features != channels or norm.running_var.dtype != torch.float32:
        return None
    factor = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    affine = factor.float(), shift.float()
    return affine if _does_just_that(norm, affine, channels) else None


def _does_just_that(norm: nn.Module, affine: tuple[Tensor, Tensor], channels: int) -> bool:
    """Whether the norm's own forward agrees: a subclass may do more than its base."""
    spatial = {"1d": 1, "2d": 2}.get(type(norm).__name__[-2:], 2)
    probe = torch.randn(3, channels, *[2] * spatial, generator=torch.Generator().manual_seed(0))
    multi = getattr(norm, "step_mode", "s") == "m"
    with torch.no_grad():
        try:
            seen = norm(probe[None])[0] if multi else norm(probe)
        except Exception:  # whatever a foreign forward dislikes, it is not folded
            return False
    per_channel = [p.view(-1, *[1] * spatial) for p in affine]
    return torch.allclose(seen, probe * per_channel[0] + per_channel[1], rtol=1e-4, atol=1e-5)
