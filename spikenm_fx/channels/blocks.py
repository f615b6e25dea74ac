# SPDX-License-Identifier: Apache-2.0
"""Which channels stay, in which order, so that the weights that read them stay N:M."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikenm_fx.pattern import NM
from spikenm_fx.trace import Member

__all__ = ["Columns", "columns_of", "staying"]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The non-zeros of one N:M weight along a group's channels.

    Attributes:
        nonzero: bool ``[channels, rows]``.
        nm: the pattern that it has and must keep.
    """

    nonzero: Tensor
    nm: NM


def columns_of(weight: Tensor, member: Member, size: int, nm: NM) -> Columns | str | None:
    """The columns; None where each channel fills whole blocks; else why blocks would be torn.

    Args:
        weight: of any shape.
        member: which part of it, along which axis, reads the channels.
        size: the number of channels.
        nm: the pattern of the weight.
    """
    if member.inner % nm.of == 0 and member.offset % nm.of == 0:
        return None
    if member.inner > 1 or member.offset % nm.of:
        return f"{member.tensor}: blocks of {nm} hold more than these channels"
    if member.outer > 1 and size % nm.of:
        return f"{member.tensor}: {member.outer} x {size} channels share blocks of {nm}"
    length = member.outer * size
    part = weight.detach().narrow(member.axis, member.offset, length).movedim(member.axis, 0)
    rows = part.reshape(member.outer, size, -1).transpose(0, 1).flatten(1)
    return Columns((rows != 0).cpu(), nm)


def staying(dead: Tensor, columns: Sequence[Columns]) -> Tensor:
    """The channels that stay, in order: all live ones, and dead ones that fill up their blocks.

    Blocks whose channels are all dead go.  Of the others, two become one where their live channels
    fit in and no row then has more non-zeros than it may.

    Args:
        dead: bool ``[channels]``.
        columns: of the N:M weights that read the channels; without any, all dead channels go.
    """
    size = len(dead)
    if not columns:
        return (~dead).nonzero().flatten()
    of = max(c.nm.of for c in columns)
    if any(of % c.nm.of for c in columns) or size % of:
        return torch.arange(size, device="cpu")  # blocks that do not nest: as it is
    blocks = torch.arange(size, device="cpu").reshape(-1, of)
    live = [block[~dead[block]] for block in blocks]
    filled = sorted((b for b in range(len(blocks)) if len(live[b])), key=lambda b: -len(live[b]))
    bins: list[tuple[int, list[int]]] = []  # the block that gives the padding, its live channels
    for b in filled:
        for place, (home, held) in enumerate(bins):
            merged = [*held, *live[b].tolist()]
            if len(merged) <= of and _fits(merged, of, columns):
                bins[place] = (home, merged)
                break
        else:
            bins.append((b, live[b].tolist()))
    alone = [b for b, held in bins if len(held) == len(live[b])]
    kept = {int(c) for b in alone for c in blocks[b]}
    spare = [int(c) for c in dead.nonzero().flatten() if int(c) not in kept]
    order: list[int] = []
    for home, held in sorted(bins):
        if home in alone:  # nothing joined it: every channel keeps its place
            order += blocks[home].tolist()
        else:
            order += [*held, *(spare.pop() for _ in range(of - len(held)))]
    return torch.tensor(order, dtype=torch.int64, device="cpu")


def _fits(channels: list[int], of: int, columns: Sequence[Columns]) -> bool:
    """Whether a block of these channels is N:M for every weight."""
    for c in columns:
        counts = c.nonzero[channels]
        for part in counts.split(c.nm.of) if c.nm.of < of else (counts,):
            if bool((part.sum(0) > c.nm.keep).any()):
                return False
    return True
