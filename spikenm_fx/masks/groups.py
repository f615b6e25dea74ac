# SPDX-License-Identifier: Apache-2.0
"""Many weights as one: their blocks side by side, so that one operation serves all of them.

Weights of one method, pattern, schedule and kernel size are laid together along the first axis of
their blocks.  A step of the optimizer then costs a few hundred operations whatever the number of
layers, none of which waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikenm_fx._torch import foreach
from spikenm_fx.masks.methods import Draw
from spikenm_fx.masks.noise import gumbel_of_layers
from spikenm_fx.masks.piece import Piece, most_at_once, pieces_of

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["Group", "grouped"]


_MOST_KNOWN = 64  # groupings of one run: there are as many as kinds of weights


class Group:
    """Weights whose blocks can lie side by side.

    Attributes:
        members: the weights.
        first: one of them, for what they have in common.
    """

    def __init__(self, members: Sequence[MaskedWeight | Piece]) -> None:
        self.members = list(members)
        self.first = members[0]
        self._leads = [member.view.blocked_shape[0] for member in members]
        self._weights: Tensor | None = None

    @property
    def apart(self) -> bool:
        """Whether its members are parts or pieces of weights, with noise of their own counters."""
        return self.first.shard is not None or any(m.owner is not m for m in self.members)

    def forget(self) -> None:
        """Let go of what was put together."""
        self._weights = None

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.first.mask.device

    def weights(self) -> Tensor:
        """``(lead, M, inner)`` of all, float32; put together once: a group lives for one pass."""
        if self._weights is None:
            self._weights = self.blocks([member.values for member in self.members])
        return self._weights

    def blocks(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of the weight's shape per member, as blocks of all, float32."""
        return self.together(tensors).float()

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same, ``(lead, M, inner)``, of the dtype that the tensors have."""
        views = [m.view.to_blocks(t) for m, t in zip(self.members, tensors, strict=True)]
        return torch.cat(views) if len(views) > 1 else views[0]

    def scores(self) -> Tensor | None:
        """The scores of all, float32."""
        if self.first.scores is None:
            return None
        return self.stacked([m.scores.detach() for m in self.members if m.scores is not None])

    def stacked(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor of the scores' shape per member, side by side, float32."""
        return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).float()

    def rows(self, values: Tensor) -> Tensor:
        """One value a member to one value a row, ``(lead, 1, 1)``."""
        if len(self.members) == 1:
            return values.view(1, 1, 1)
        return values.index_select(0, self._member_of_row()).view(-1, 1, 1)

    def _member_of_row(self) -> Tensor:
        """Int32 ``[lead]``; it stays with the run, as every step asks for the same."""
        known = self.first.run.member_of_row
        key = (self.device, *self._leads)
        if key not in known:
            leads = torch.tensor(self._leads, dtype=torch.int64, device="cpu")
            if self.device.type == "cuda":
                leads = leads.pin_memory()
            leads = leads.to(self.device, non_blocking=True)
            if len(known) >= _MOST_KNOWN:
                known.clear()
            rows = torch.repeat_interleave(leads, output_size=sum(self._leads))
            known[key] = rows.to(torch.int32)  # a byte a weight at n:4, not two
        return known[key]

    def split(self, blocks: Tensor) -> list[Tensor]:
        """Blocks ``(lead, M, inner)`` of all to those of each member, in contiguous memory."""
        whole = blocks.contiguous()
        return list(whole.split(self._leads)) if len(self._leads) > 1 else [whole]

    def weight_shaped(self, blocks: Tensor) -> list[Tensor]:
        """The same in the shapes of the weights."""
        pairs = zip(self.members, self.split(blocks), strict=True)
        return [member.view.from_blocks(part) for member, part in pairs]

    def norms(self, parts: Sequence[Tensor]) -> Tensor:
        """Norm of each member's part, float64 ``[members]``."""
        return torch.stack(foreach("norm", list(parts), 2, dtype=torch.float64))

    def root_mean(self, norms: Tensor) -> Tensor:
        """Root mean square of each member's scores or gradient, of its whole norm ``[members]``.

        Rounded at the end alone, so that weights in parts have the numbers of whole ones.
        """
        counts = [max(member.numbers_of_scores, 1) ** -0.5 for member in self.members]
        # of 64 bits either way: which weights happen to lie in one group must not decide a bit
        factor = counts[0] if len(set(counts)) == 1 else self.numbers(counts, torch.float64)
        roots = torch.empty(len(counts), dtype=torch.float32, device=norms.device)
        return torch.mul(norms, factor, out=roots)

    def numbers(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """One number a member from the host, without waiting for the device."""
        if len(set(values)) == 1:
            return torch.full((len(values),), values[0], dtype=dtype, device=self.device)
        host = torch.tensor(values, dtype=dtype, device="cpu")
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def present(self) -> Tensor | None:
        """Of padded blocks the positions that are there."""
        found = [member.view.present(self.device) for member in self.members]
        there = [each for each in found if each is not None]
        return torch.cat(there) if there else None

    def priors(self) -> Tensor | None:
        """The strength of the moving prior of each member."""
        found = [member.prior.detach() for member in self.members if member.prior is not None]
        return torch.cat(found).float() if found else None  # a model may be cast after sparsify

    def draw(self, step: int | None, noise: Tensor | None = None) -> Draw:
        """What the masks of all members depend on besides their tensors.

        Args:
            step: the optimizer step; None for the final masks.
            noise: Gumbel noise of the shape of the scores of all.
        """
        kappa, prior = self._scales(step)
        return Draw(
            nm=self.first.view.nm,
            kappa=kappa,
            tau=self.first.schedule.tau_at(step or 0),
            prior=prior,
            key=self.first.key_at(0),
            noise=noise,
            present=self.present(),
            step=step,
            total_steps=self.first.schedule.total_steps,
            credit=self.credits(),
        )

    def credits(self) -> Tensor | None:
        """What a guided method goes by, in blocks of all; None where a member has none."""
        found = [member.credit() for member in self.members]
        known = [each for each in found if each is not None]
        return torch.cat(known) if known and len(known) == len(found) else None

    def _scales(self, step: int | None) -> tuple[float | Tensor, float | Tensor]:
        """Kappa and the prior's strength, as one number or one a row; spread and prior together."""
        priors = self.priors()
        kappa = 1.0 if step is None else self.first.schedule.kappa_at(step)
        if step is None or not self.first.method.relative:
            return kappa, 0.0 if priors is None else self.rows(priors)
        own = torch.cat([member.spread for member in self.members])
        kappas = own.reciprocal_().nan_to_num_(posinf=1.0).mul_(kappa)
        if priors is None:
            return self.rows(kappas), 0.0
        if len(self.members) == 1:
            return self.rows(kappas), self.rows(priors)
        both = torch.stack((kappas, priors)).index_select(1, self._member_of_row())
        return both[0].view(-1, 1, 1), both[1].view(-1, 1, 1)


def grouped(weights: Iterable[MaskedWeight]) -> list[Group]:
    """Weights by what they must have in common; large ones in pieces, and no group too large."""
    found: dict[Any, list[MaskedWeight | Piece]] = defaultdict(list)
    for weight in pieces_of(weights):
        scores = weight.scores
        found[
            weight.method,
            weight.view.nm,
            weight.view.blocked_shape[1:],
            weight.schedule,
            bool(weight.view.padding),
            weight.dense.dtype,
            None if scores is None else scores.dtype,
            weight.dense.device,
            None if weight.shard is None else weight.shard.key,
            weight.credit() is None,
        ].append(weight)
    return [Group(members) for each in found.values() for members in _at_once(each)]


def _at_once(members: Sequence[MaskedWeight | Piece]) -> list[list[MaskedWeight | Piece]]:
    device = members[0].mask.device
    found: list[list[MaskedWeight | Piece]] = [[]]
    size = 0
    for member in members:
        lead, m, inner = member.view.blocked_shape
        size += lead * m * inner
        if found[-1] and size > most_at_once(device, cut=member.owner is not member):
            found.append([])
            size = lead * m * inner
        found[-1].append(member)
    return found


def noise_of(groups: Sequence[Group], step: int) -> list[Tensor]:
    """Gumbel noise of the scores of each group at an optimizer step, made at once for a device."""
    devices: dict[torch.device, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        devices[group.device].append(index)
    found: dict[int, Tensor] = {}
    for device, indices in devices.items():
        starts = {i: [m.noise_start() for m in groups[i].members] for i in indices}
        for index in [i for i in indices if None in starts[i]]:
            parts = [m.noise(m.key_at(step)) for m in groups[index].members]
            found[index] = torch.cat(parts) if len(parts) > 1 else parts[0]
        indices = [index for index in indices if index not in found]
        if not indices:
            continue
        members = [m for index in indices for m in groups[index].members]
        counts = [0 if m.scores is None else m.scores.numel() for m in members]
        first = [start or 0 for index in indices for start in starts[index]]
        noise = gumbel_of_layers(counts, [m.key_at(step) for m in members], device, first)
        sizes = [
            sum(0 if m.scores is None else m.scores.numel() for m in groups[index].members)
            for index in indices
        ]
        for index, part in zip(indices, noise.split(sizes), strict=True):
            scores = groups[index].first.scores
            assert scores is not None
            found[index] = part.view(-1, *scores.shape[1:])
    return [found[index] for index in range(len(groups))]
