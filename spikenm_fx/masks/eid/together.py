# SPDX-License-Identifier: Apache-2.0
"""Credits of all ranks of a data parallel model, added up: every rank receives the same mean.

Each rank sees other samples, and masks that differed between ranks would be those of different
models.  The sum of R matrices that have nothing in common but their shape needs all their numbers:
with ``b`` bits a number, once in 20 steps, ``b / 640`` of the dense model's traffic of 32 bits a
weight and step.  That is 5 % for float32 and 2.5 % for bfloat16; 1 % leaves 6.4 bits.  Hence:

* float64 credits are added up as they are: a run on several ranks is that of one process.
* float32 credits travel in the six bits a number of :mod:`spikenm_fx.masks.eid.codes`.  Two ranks
  send each other all of theirs, in one collective.  With more of them each rank averages a share
  and sends it round, in two: as much as a ring sends to add up six bits a number.

With the credits come the few numbers by which ranks tell whether they still are one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikenm_fx.masks.eid.codes import BYTES, GROUP, decoded, encoded
from spikenm_fx.masks.fingerprint import compare, fingerprint, summed, told_apart

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["mean_over_ranks", "usable"]


def usable(credit: Tensor) -> Tensor:
    """Whether a credit of any shape is finite and not zero everywhere: a bool scalar."""
    return torch.isfinite(credit).all() & credit.any()


def mean_over_ranks(
    owners: Sequence[MaskedWeight], credits: Sequence[Tensor | None], ranks: Any
) -> list[Tensor]:
    """The mean over the ranks that saw something usable; zeros, which are not, where none did.

    Args:
        owners: W weights of one run, the same and in the same order on every rank.
        credits: W of them, of the weights' shapes; None where this rank saw nothing.
        ranks: a process group.

    Raises:
        PlanError: on every rank, if they differ in steps, seeds or masks.
    """
    device = owners[0].mask.device
    found = [
        torch.zeros(owner.view.shape, dtype=torch.float32, device=device) if one is None else one
        for owner, one in zip(owners, credits, strict=True)
    ]
    own = fingerprint(owners[0].run, owners)
    exact = any(owner.dense.dtype == torch.float64 for owner in owners)
    means, same = (_exact if exact else _in_six_bits)(found, own, ranks)
    compare(owners[0].run, same)
    return [mean.view(owner.view.shape) for owner, mean in zip(owners, means, strict=True)]


def _exact(credits: Sequence[Tensor], own: Tensor, ranks: Any) -> tuple[list[Tensor], Tensor]:
    parts = [summed(own)]
    for credit in credits:
        seen = usable(credit)
        parts += [torch.where(seen, credit.flatten(), 0.0).double(), seen.double().reshape(1)]
    together = torch.cat(parts)
    torch.distributed.all_reduce(together, group=ranks)
    tokens, *sums = together.split([part.numel() for part in parts])
    pairs = zip(sums[::2], sums[1::2], strict=True)
    means = [total / count.clamp_min(1) for total, count in pairs]
    return means, told_apart(tokens, torch.distributed.get_world_size(ranks))


def _in_six_bits(credits: Sequence[Tensor], own: Tensor, ranks: Any) -> tuple[list[Tensor], Tensor]:
    sizes = [credit.numel() for credit in credits]
    largest = torch.stack([c.float().abs().max().where(usable(c), 0.0) for c in credits])
    head = torch.cat((largest.view(torch.uint8), own.view(torch.uint8)))
    groups = torch.cat([_grouped(c, most) for c, most in zip(credits, largest, strict=True)])
    layer = torch.arange(len(sizes), device=own.device).repeat_interleave(
        torch.tensor([-(-size // GROUP) for size in sizes], device=own.device),
        output_size=len(groups),
    )
    world = torch.distributed.get_world_size(ranks)
    if world == 2:
        heads, mean = _to_each_other(head, encoded(groups), layer, len(sizes), ranks)
    else:
        heads, mean = _by_shares(head, groups, layer, len(sizes), ranks)
    tokens = heads[:, largest.nbytes :].contiguous().view(torch.int64)
    parts = mean.split([-(-size // GROUP) for size in sizes])
    means = [part.flatten()[:size] for part, size in zip(parts, sizes, strict=True)]
    return means, (tokens == tokens[0]).all(0)


def _grouped(credit: Tensor, largest: Tensor) -> Tensor:
    """A credit in units of its largest number, zeros if it is not usable, ``[groups, 8]``."""
    unit = credit.flatten().float() / largest
    unit = torch.where(largest > 0, unit, 0.0)
    return torch.nn.functional.pad(unit, (0, -len(unit) % GROUP)).view(-1, GROUP)


def _to_each_other(
    head: Tensor, codes: Tensor, layer: Tensor, layers: int, ranks: Any
) -> tuple[Tensor, Tensor]:
    """Heads of both ranks, and the mean ``[groups, 8]``."""
    own = torch.cat((head, codes.flatten()))
    both = own.new_empty(2 * len(own))
    _collective("all_gather_single", "all_gather_into_tensor")(both, own, group=ranks)
    heads, sent = both.view(2, -1).split([len(head), codes.numel()], dim=1)
    return heads, _mean(heads, sent, layer, layers)


def _by_shares(
    head: Tensor, groups: Tensor, layer: Tensor, layers: int, ranks: Any
) -> tuple[Tensor, Tensor]:
    """The same of any number of ranks, each of which averages a share of the groups."""
    world, mine = torch.distributed.get_world_size(ranks), torch.distributed.get_rank(ranks)
    more = -len(groups) % world
    codes = encoded(torch.nn.functional.pad(groups, (0, 0, 0, more)))
    layer = torch.nn.functional.pad(layer, (0, more))
    out = torch.cat((head.expand(world, -1), codes.view(world, -1)), dim=1)
    got = torch.empty_like(out)
    torch.distributed.all_to_all_single(got, out, group=ranks)
    heads, sent = got.split([len(head), got.shape[1] - len(head)], dim=1)
    share = layer.view(world, -1)[mine]
    mean = _mean(heads, sent, share, layers)
    bound = _bounds(heads, layers)  # every rank knows it, and no mean is larger
    unit = torch.where(bound[share, None] > 0, mean / bound[share, None], 0.0)
    whole = torch.empty_like(codes)
    _collective("all_gather_single", "all_gather_into_tensor")(whole, encoded(unit), group=ranks)
    return heads, (decoded(whole) * bound[layer, None])[: len(groups)]


def _mean(heads: Tensor, sent: Tensor, layer: Tensor, layers: int) -> Tensor:
    """What all ranks have sent of some groups, averaged in the order of the ranks."""
    largest = _largest(heads, layers)
    total = torch.zeros(len(layer), GROUP, dtype=torch.float32, device=sent.device)
    for one, most in zip(sent, largest, strict=True):
        total += decoded(one.reshape(-1, BYTES)) * most[layer, None]
    return total / _count(largest)[layer, None]


def _bounds(heads: Tensor, layers: int) -> Tensor:
    largest = _largest(heads, layers)
    return largest.sum(0) / _count(largest)


def _count(largest: Tensor) -> Tensor:
    """Of each layer: ranks that saw something usable, 1 where none did."""
    return (largest > 0).sum(0).clamp_min(1)


def _largest(heads: Tensor, layers: int) -> Tensor:
    """Of each rank and layer the largest credit, ``[R, layers]``."""
    return heads[:, : 4 * layers].contiguous().view(torch.float32)


def _collective(*names: str) -> Any:
    """The first of torch's functions that is there; the last one is older."""
    return next(getattr(torch.distributed, n) for n in names if hasattr(torch.distributed, n))
