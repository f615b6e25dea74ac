# SPDX-License-Identifier: Apache-2.0
"""Coupled groups: the (tensor, axis) sets that must be permuted or removed together.

Channel spaces (:mod:`~spikenm_fx.trace.channels.spaces`) are carried along the recorded operations.
What is not understood, or must not change (the model's outputs), is frozen, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikenm_fx.errors import TraceError
from spikenm_fx.trace.channels.rules_nodes import Attachment, ChannelRole
from spikenm_fx.trace.channels.spaces import Spaces
from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["CoupledGroup", "Member", "coupled_groups", "permute_channels", "permute_members"]


@dataclass(frozen=True, slots=True)
class Member:
    """Where one tensor holds a group's channels.

    Along ``axis``, from ``offset`` on, the index runs over ``outer`` x ``size`` x ``inner``; the
    middle one is the group's channel.

    Attributes:
        tensor: qualified name of the parameter or buffer.
        axis: its axis.
        role: whether it makes the channels, reads them, or goes along (norms, thresholds, bias).
        offset: first index, behind other parts of a concatenation.
        outer: slower indices before the channel, e.g. heads.
        inner: faster indices after it, e.g. the pixels of a flattened map.
    """

    tensor: str
    axis: int
    role: ChannelRole
    offset: int = 0
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True, slots=True)
class CoupledGroup:
    """Channels that can only be permuted or removed together.

    Attributes:
        size: number of channels.
        members: every place that holds them.
        frozen: why they must not be touched; empty where permuting all members changes no output.
        mixed: where they meet each other outside of the consumers (a mean, a LayerNorm, a product),
            so that one of them cannot be left out without changing what is computed.
    """

    size: int
    members: tuple[Member, ...]
    frozen: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()

    @property
    def producers(self) -> tuple[Member, ...]:
        """The members that make the channels."""
        return tuple(m for m in self.members if m.role == "producer")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read them."""
        return tuple(m for m in self.members if m.role == "consumer")


def coupled_groups(graph: SpikingGraph) -> tuple[CoupledGroup, ...]:
    """The coupled groups of a traced model, largest producers first found first.

    Raises:
        TraceError: if the graph holds no traced operations (traced without example inputs).
    """
    if graph.spaces is None:
        raise TraceError(
            "coupled groups need a traced forward: call trace(model, example_inputs) first"
        )
    return _collect(graph.spaces, graph.attachments)


def _collect(spaces: Spaces, attachments: Iterable[Attachment]) -> tuple[CoupledGroup, ...]:
    members: dict[int, dict[Member, None]] = {}
    sizes: dict[int, int] = {}
    for attachment in attachments:
        for space, size, member in _members(spaces, attachment):
            members.setdefault(space, {})[member] = None
            sizes[space] = size
    mixed = spaces.mixed()
    return tuple(
        CoupledGroup(sizes[space], tuple(found), spaces.reasons(space), mixed.get(space, ()))
        for space, found in members.items()
        if any(m.role == "producer" for m in found)
    )


def _members(spaces: Spaces, attachment: Attachment) -> list[tuple[int, int, Member]]:
    found, offset = [], 0
    for segment in spaces.fine(attachment.dim):
        sizes = [atom.size for atom in segment]
        for index, atom in enumerate(segment):
            if atom.space is None:
                continue
            outer, inner = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
            member = Member(
                attachment.tensor, attachment.axis, attachment.role, offset, outer, inner
            )
            found.append((atom.space, atom.size, member))
        offset += math.prod(sizes)
    return found


def permute_channels(model: nn.Module, group: CoupledGroup, permutation: Tensor) -> None:
    """Reorder a group's channels in every member, in place: ``new[i] = old[permutation[i]]``.

    The model computes what it did before, up to rounding, as long as the group is not frozen.

    Args:
        model: the traced one.
        group: of :func:`coupled_groups`.
        permutation: shape ``(group.size,)``, whole numbers.

    Raises:
        TraceError: if the group is frozen or ``permutation`` is not one of its size.
    """
    if group.frozen:
        raise TraceError(f"this group is frozen: {group.frozen[0]}")
    if sorted(permutation.tolist()) != list(range(group.size)):
        raise TraceError(f"not a permutation of the group's {group.size} channels")
    permute_members(model, group, group.members, permutation)


def permute_members(
    model: nn.Module, group: CoupledGroup, members: tuple[Member, ...], permutation: Tensor
) -> None:
    """Reorder the channels in some members only: half of a change, for controls and searches.

    Args:
        model: the traced one.
        group: of :func:`coupled_groups`.
        members: those of its members that change.
        permutation: shape ``(group.size,)``, whole numbers.
    """
    tensors = dict(nn.Module.named_parameters(model)) | dict(nn.Module.named_buffers(model))
    with torch.no_grad():
        for member in members:
            tensor = tensors[member.tensor]
            length = member.outer * group.size * member.inner
            part = tensor.narrow(member.axis, member.offset, length).movedim(member.axis, 0)
            folded = part.reshape(member.outer, group.size, member.inner, *part.shape[1:])
            order = permutation.to(tensor.device)
            part.copy_(folded.index_select(1, order).reshape(part.shape))
