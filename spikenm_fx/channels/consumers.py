# SPDX-License-Identifier: Apache-2.0
"""The weights that read a coupled group, as the columns of scores that the search orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spikenm_fx.channels.search import Scored
from spikenm_fx.pattern import NM
from spikenm_fx.plan import LayerPlan
from spikenm_fx.plan.weights import RAW
from spikenm_fx.trace import CoupledGroup, Member

__all__ = ["Reading", "readings", "sampled", "tensor_of"]


def tensor_of(layer: LayerPlan) -> str:
    """Qualified name of the layer's weight."""
    return layer.name if layer.kind == RAW else f"{layer.name}.weight".lstrip(".")


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One place where an N:M weight reads a group's channels.

    Attributes:
        layer: the weight.
        member: the place.
        scored: its columns of scores; None where the order of channels makes no difference.
        indifferent: why it makes none.
    """

    layer: LayerPlan
    member: Member
    scored: Scored | None
    indifferent: str = ""


def readings(
    group: CoupledGroup, layers: Mapping[str, LayerPlan], scores: Mapping[str, Tensor]
) -> list[Reading]:
    """Where N:M weights read the channels of ``group`` along their blocks.

    Args:
        group: of coupled channels.
        layers: those that become N:M, by the names of their weights.
        scores: of the shapes of their weights, by the names of the layers.
    """
    found = []
    for member in group.members:
        layer = layers.get(member.tensor)
        if layer is not None and layer.nm is not None and member.axis == layer.axis:
            found.append(_reading(group.size, member, layer, layer.nm, scores[layer.name]))
    return found


def _reading(size: int, member: Member, layer: LayerPlan, nm: NM, scores: Tensor) -> Reading:
    columns = scores.movedim(member.axis, 0).flatten(1)
    if nm.keep == nm.of:
        return Reading(layer, member, None, f"{nm} keeps all")
    if member.inner % nm.of == 0 and member.offset % nm.of == 0:
        return Reading(layer, member, None, f"each channel fills blocks of {nm.of} by itself")
    if member.inner > 1:
        why = f"{member.inner} positions of a channel do not fill blocks of {nm.of}"
        return Reading(layer, member, None, why)
    if member.outer == 1:
        first = member.offset // nm.of * nm.of
        last = -(-(member.offset + size) // nm.of) * nm.of
        return Reading(layer, member, Scored(columns[first:last], nm, member.offset - first))
    if member.offset % nm.of or size % nm.of:
        why = f"{member.outer} x {size} channels share blocks of {nm.of}"
        return Reading(layer, member, None, why)
    inside = columns[member.offset : member.offset + member.outer * size]
    rows = inside.unflatten(0, (member.outer, size)).transpose(0, 1).flatten(1)
    return Reading(layer, member, Scored(rows, nm))


def sampled(parts: list[Scored], rows: int, seed: int) -> list[Scored]:
    """At most ``rows`` rows of all parts together, the same share of each, drawn by ``seed``."""
    total = sum(part.scores.shape[1] for part in parts)
    if total <= rows:
        return parts
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    out = []
    for part in parts:
        own = part.scores.shape[1]
        wanted = max(own * rows // total, 1)
        chosen = torch.randperm(own, generator=generator)[:wanted]
        out.append(Scored(part.scores.index_select(1, chosen), part.nm, part.fixed))
    return out
