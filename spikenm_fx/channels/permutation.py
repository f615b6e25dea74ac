# SPDX-License-Identifier: Apache-2.0
"""Channels in the order in which N:M keeps most: planned purely, then applied to all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spikenm_fx.channels.consumers import Reading, readings, sampled, tensor_of
from spikenm_fx.channels.left_alone import Sharing, named_tensors, refuse_unfinished
from spikenm_fx.channels.scores import Score, weight_scores
from spikenm_fx.channels.search import Effort, Scored, best_order, kept, total
from spikenm_fx.errors import PlanError
from spikenm_fx.pattern import PatternLike
from spikenm_fx.plan import Plan, plan
from spikenm_fx.state import reset_to_rest
from spikenm_fx.trace import CoupledGroup, coupled_groups, trace
from spikenm_fx.trace.channels.groups import permute_members

__all__ = ["GroupOrder", "Permutation", "apply_permutation", "permute", "plan_permutation"]

ModelT = TypeVar("ModelT", bound=nn.Module)

_ROWS = 2048
"""Rows that the search looks at; the order found is then judged by all of them."""
_WORK = 4 << 30
"""Comparisons of all groups together, some 4 s on one core: large models search less."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupOrder:
    """The order of one group's channels.

    Attributes:
        group: the coupled channels.
        layers: the N:M weights that read them.
        order: ``[size]``, the channel at each place; None where the group stays as it is.
        reason: why it stays; "" where it moves.
        total: sum of the scores of those weights.
        kept_before: of that, what N:M keeps in the order as it is.
        kept_after: what it keeps in the new one.
    """

    group: CoupledGroup
    layers: tuple[str, ...]
    order: Tensor | None
    reason: str
    total: float = 0.0
    kept_before: float = 0.0
    kept_after: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Permutation:
    """The orders of all groups of a model.

    Attributes:
        model: class name of the model.
        groups: one entry for each coupled group, also for those that stay, with the reason.
    """

    model: str
    groups: tuple[GroupOrder, ...]

    @property
    def moved(self) -> tuple[GroupOrder, ...]:
        """The groups whose channels change places."""
        return tuple(entry for entry in self.groups if entry.order is not None)

    @property
    def gain(self) -> float:
        """What is kept more, as a share of what was kept before; 0 where nothing is N:M."""
        before = sum(entry.kept_before for entry in self.groups)
        after = sum(entry.kept_after for entry in self.groups)
        return after / before - 1.0 if before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON; orders as lists."""
        return {
            "model": self.model,
            "gain": self.gain,
            "groups": [
                {
                    "size": entry.group.size,
                    "members": [m.tensor for m in entry.group.members],
                    "layers": list(entry.layers),
                    "order": None if entry.order is None else entry.order.tolist(),
                    "reason": entry.reason,
                    "total": entry.total,
                    "kept_before": entry.kept_before,
                    "kept_after": entry.kept_after,
                }
                for entry in self.groups
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.moved)} of {len(self.groups)} groups of channels move, "
            f"N:M keeps {100 * self.gain:.2f} % more"
        ]
        for entry in self.groups:
            first = next((m.tensor for m in entry.group.producers), entry.group.members[0].tensor)
            done = entry.reason or (
                f"{100 * entry.kept_before / entry.total:.2f} -> "
                f"{100 * entry.kept_after / entry.total:.2f} % kept in {', '.join(entry.layers)}"
            )
            lines.append(f"  {entry.group.size:>5} channels of {first}: {done}")
        return "\n".join(lines)


def plan_permutation(
    model: nn.Module,
    example_inputs: Any,
    nm: PatternLike | Plan = "2:4",
    *,
    score: Score = "magnitude",
    seconds: float = 10.0,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> Permutation:
    """Find the order of each group of coupled channels in which N:M keeps most; changes nothing.

    Channels are coupled as :func:`spikenm_fx.trace.coupled_groups` tells.  For each group the order
    counts for all N:M weights that read it together (Pool and Yu, "Channel permutations for N:M
    sparsity", NeurIPS 2021, for one weight after the other).

    Args:
        model: dense, not in the middle of training.
        example_inputs: as for :func:`spikenm_fx.trace`.
        nm: a pattern, or the plan of which weights become N:M and how.
        score: what is kept: ``"magnitude"``, ``"rate"`` or given ones, see
            :func:`spikenm_fx.channels.scores.weight_scores`.
        seconds: for the search of all groups together.
        seed: of the search.
        progress: called with the share of the search that is done; what it raises ends it.

    Raises:
        PatternError: for a malformed pattern.
        PlanError: if the model is still masked or being trained, or nothing would become N:M.
        TraceError: if the model cannot be run on the examples.
    """
    refuse_unfinished(model, "permute")
    if seconds <= 0:
        raise PlanError(f"seconds={seconds!r}: the search needs a positive time")
    graph = trace(model, example_inputs)
    decided = nm if isinstance(nm, Plan) else plan(model, nm, graph=graph)
    layers = {tensor_of(layer): layer for layer in decided.sparse}
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    scores = weight_scores(model, arguments, decided.sparse, score)
    sharing = Sharing(named_tensors(model))
    asked = [(g, readings(g, layers, scores)) for g in coupled_groups(graph)]
    search = _Search([_cost(g, r) for g, r in asked], seconds, seed, progress)
    entries = [_order(group, read, _why_not(group, read, sharing), search) for group, read in asked]
    return Permutation(type(model).__name__, tuple(entries))


def permute(
    model: ModelT,
    example_inputs: Any,
    nm: PatternLike | Plan = "2:4",
    *,
    score: Score = "magnitude",
    seconds: float = 10.0,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> ModelT:
    """Reorder coupled channels, in place, so that N:M keeps more; the model computes the same.

    Arguments and errors are those of :func:`plan_permutation`, which also tells what would be done
    and why some groups stay.  Outputs change by rounding alone (weights are summed in another
    order); the neurons' state is reset.  State dicts of the model as it was no longer fit it: they
    hold the channels in the old order.

    Returns:
        ``model`` itself.
    """
    found = plan_permutation(
        model, example_inputs, nm, score=score, seconds=seconds, seed=seed, progress=progress
    )
    return apply_permutation(model, found)


def apply_permutation(model: ModelT, permutation: Permutation) -> ModelT:
    """Carry out a permutation that was planned for this model, in place; all of it or nothing.

    Raises:
        PlanError: if the model is masked or being trained, or is not the one it was planned for.
    """
    refuse_unfinished(model, "apply_permutation")
    tensors = named_tensors(model)
    for entry in permutation.moved:
        _refuse_stranger(entry, tensors)
    touched = {m.tensor for entry in permutation.moved for m in entry.group.members}
    before = {name: tensors[name].detach().clone() for name in touched}
    try:
        for entry in permutation.moved:
            assert entry.order is not None
            permute_members(model, entry.group, entry.group.members, entry.order)
        reset_to_rest(model)
    except BaseException:
        with torch.no_grad():
            for name, values in before.items():
                tensors[name].copy_(values)
        raise
    return model


def _refuse_stranger(entry: GroupOrder, tensors: dict[str, Tensor]) -> None:
    group = entry.group
    if entry.order is None or entry.order.sort().values.tolist() != list(range(group.size)):
        raise PlanError(
            f"{group.members[0].tensor}: this is not an order of its {group.size} channels"
        )
    for member in group.members:
        tensor = tensors.get(member.tensor)
        needed = member.offset + member.outer * group.size * member.inner
        if tensor is None or member.axis >= tensor.dim() or tensor.shape[member.axis] < needed:
            seen = "missing" if tensor is None else tuple(tensor.shape)
            raise PlanError(
                f"the permutation was planned for another model: {member.tensor} is {seen} here, "
                f"and needs {needed} entries along axis {member.axis}; plan it anew"
            )


# -- searching ------------------------------------------------------------------------------------


def _cost(group: CoupledGroup, read: Sequence[Reading]) -> int:
    """Comparisons that a thorough search of this group takes."""
    rows = sum(r.scored.scores.shape[1] for r in read if r.scored is not None)
    effort = Effort.for_channels(group.size)
    return min(rows, _ROWS) * (effort.proposals + effort.tries)


def _why_not(group: CoupledGroup, read: Sequence[Reading], sharing: Sharing) -> str:
    if group.frozen:
        return group.frozen[0]
    shared = sharing.why_not(group)
    if shared:
        return shared
    if not read:
        return "no N:M weight reads these channels"
    if all(r.scored is None for r in read):
        return f"the order makes no difference: {read[0].indifferent}"
    return ""


class _Search:
    """Shares time and work among the groups, and tells how far it is."""

    def __init__(
        self,
        costs: Sequence[int],
        seconds: float,
        seed: int,
        progress: Callable[[float], object] | None,
    ) -> None:
        self.total = max(sum(costs), 1)
        self.share = min(_WORK / self.total, 1.0)
        self.seconds, self.seed, self.progress = seconds, seed, progress
        self.done = 0

    def order(self, parts: list[Scored], channels: int, cost: int) -> Tensor:
        """The best order found within this group's share of time and work."""
        seen = sampled(parts, _ROWS, self.seed)
        rows = max(sum(part.scores.shape[1] for part in seen), 1)
        seconds = self.seconds * cost / self.total
        effort = Effort.for_channels(channels, seconds, int(cost * self.share) // rows)
        before, self.done = self.done, self.done + cost
        tell = self.progress

        def inside(share: float) -> None:
            if tell is not None:
                tell((before + share * cost) / self.total)

        return best_order(
            seen, channels, effort, seed=self.seed, progress=inside if tell is not None else None
        )


def _order(
    group: CoupledGroup, read: Sequence[Reading], reason: str, search: _Search
) -> GroupOrder:
    parts = [r.scored for r in read if r.scored is not None]
    layers = tuple(r.layer.name for r in read)
    size, before = sum(map(total, parts)), sum(map(kept, parts))
    if reason:
        return GroupOrder(group, layers, None, reason, size, before, before)
    order = search.order(parts, group.size, _cost(group, read))
    after = sum(kept(part, order) for part in parts)
    if after <= before:
        why = "no order was found in which N:M keeps more"
        return GroupOrder(group, layers, None, why, size, before, before)
    return GroupOrder(group, layers, order, "", size, before, after)
