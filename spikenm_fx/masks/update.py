# SPDX-License-Identifier: Apache-2.0
"""What one optimizer step does to all masks of a model: before it, and after it.

Before: from the dense gradient as the optimizer is about to see it (accumulated, reduced over
ranks, unscaled) come the gradient of the scores, the pull of EID, and the decay of what is not
kept.  After: the next masks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx._torch import foreach
from spikenm_fx.masks import fused
from spikenm_fx.masks.eid.pull import pull
from spikenm_fx.masks.groups import Group, grouped, noise_of
from spikenm_fx.masks.methods import kept
from spikenm_fx.masks.piece import Piece
from spikenm_fx.masks.rule import moved
from spikenm_fx.masks.shard import total

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["before_step", "draw_masks", "final_masks", "learn"]


@torch.no_grad()
def before_step(
    weights: Sequence[MaskedWeight],
    step: int,
    *,
    learning: bool,
    scale: Tensor | None,
    sign: int = 1,
) -> None:
    """Let scores learn from the gradients of ``weights``, and finish these for the optimizer.

    Args:
        weights: that have a gradient.
        step: the optimizer step.
        learning: False where the scores have learnt in this step already.
        scale: the scalar that a fused optimizer is about to divide the gradients by, if it does.
        sign: -1 where the optimizer climbs.
    """
    rest = [
        weight
        for weight in weights
        if not fused.before_step(weight, step, learning=learning, scale=scale, sign=sign)
    ]
    searching = [w for w in rest if learning and w.learns and not w.frozen]
    groups = grouped(searching)
    if searching:
        learn(groups, step, sign)
    for weight in rest:
        if learning and weight.method.remembers:
            _remember(weight, step)
    left = [weight for weight in rest if not fused.decay(weight, scale=scale, sign=sign)]
    _finish_gradients(left, groups if searching == left else grouped(left), scale, sign)


def learn(groups: Sequence[Group], step: int, sign: int = 1) -> None:
    """Move the scores of groups along their straight-through gradient.

    Each layer's gradient is divided by its own root mean square: neither the scale of the loss nor
    the user's learning rate decides how fast masks move.  What this makes of a layer whose gradient
    is zero or not finite is nothing at all.

    Args:
        groups: whose weights have gradients.
        step: the optimizer step.
        sign: -1 where the optimizer climbs.
    """
    few = _few(groups)
    noise = noise_of(groups, step) if few else [None] * len(groups)
    tasks, norms, pulls = [], [], []
    room = {} if few else _room(groups)
    for group, own in zip(groups, noise, strict=True):
        task, norm, pulled = _directions(group, step, own, pulling=few)
        tasks.append(task if few else room[group.device].popleft().view_as(task).copy_(task))
        norms.append(norm)
        pulls.append(pulled)
    for index, norm in enumerate(_over_ranks(groups, norms)):
        group = groups[index]
        pulled = pulls[index] if few else _pull(group, step)
        _move(group, tasks[index], group.root_mean(norm), pulled, sign)


def _room(groups: Sequence[Group]) -> dict[torch.device, deque[Tensor]]:
    """Memory for a float32 number a score, of all groups of a device together, in their order.

    What passes leave behind must not lie between what they free again: the gaps would be lost.
    """
    sizes: dict[torch.device, list[int]] = defaultdict(list)
    for group in groups:
        scores = [member.scores for member in group.members]
        sizes[group.device].append(sum(s.numel() for s in scores if s is not None))
    return {
        device: deque(torch.empty(sum(each), dtype=torch.float32, device=device).split(each))
        for device, each in sizes.items()
    }


def _few(groups: Sequence[Group]) -> bool:
    """Whether all of them together are small: nothing is then computed twice to save memory."""
    return len(groups) < 2 or not any(member.owner is not member for member in _members(groups))


def _members(groups: Sequence[Group]) -> list[MaskedWeight | Piece]:
    return [member for group in groups for member in group.members]


def _over_ranks(groups: Sequence[Group], norms: Sequence[Tensor]) -> Sequence[Tensor]:
    """Norms of each member's part, float64 ``[members]``, to those of whole weights."""
    if not any(group.apart for group in groups):
        return norms
    members = _members(groups)
    owners = list({id(member.owner): member.owner for member in members}.values())
    places = {id(owner): place for place, owner in enumerate(owners)}
    index = [places[id(member.owner)] for member in members]
    parts = torch.cat(list(norms)).square_()
    squares = parts.new_zeros(len(owners))
    squares.index_add_(0, torch.tensor(index, device="cpu").to(parts.device), parts)
    together: Tensor = total(owners, squares).sqrt_()[index]
    return list(together.split([len(group.members) for group in groups]))


def _move(
    group: Group, task: Tensor, size: Tensor, pulled: tuple[Tensor, Tensor] | None, sign: int
) -> None:
    inverse = size.reciprocal().nan_to_num_(0.0, 0.0, 0.0)  # 0 where nothing is to be learnt
    rows = group.rows(inverse)
    gradient = task.nan_to_num(0.0, 0.0, 0.0).mul_(rows if sign > 0 else -rows)
    if pulled is not None:
        gradient.addcmul_(*pulled)
    momenta = [member.momentum_now() for member in group.members]
    direction, momentum = moved(gradient, group.stacked(momenta), rows.sign())
    own = [member.scores.detach() for member in group.members if member.scores is not None]
    foreach("add_", own, group.split(direction), alpha=-group.first.method.step_size)
    foreach("copy_", momenta, group.split(momentum))
    group.first.run.note_sizes(size)


def _remember(weight: MaskedWeight, step: int) -> None:
    """Let a method without learnt scores renew what it remembers of a weight, and the weight."""
    scores, dense = weight.scores, weight.dense.detach()
    assert scores is not None
    blocks = weight.view.to_blocks(dense)
    new_weight, new_scores = weight.method.remember(blocks, scores.detach(), weight.draw(step))
    if new_weight is not blocks:
        dense.copy_(weight.view.from_blocks(new_weight))
    if new_scores is not scores:
        scores.detach().copy_(new_scores)


def _directions(
    group: Group, step: int, noise: Tensor | None, *, pulling: bool = True
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Gradient of the scores in blocks, its norms by member, and the pull of EID."""
    method = group.first.method
    grads = group.blocks([_grad(member) for member in group.members])
    weights, scores = group.weights(), group.scores()
    assert scores is not None
    draw = group.draw(step, noise_of([group], step)[0] if noise is None else noise)
    logits = method.logits(weights, scores, draw)
    task = _with_losses(group, method.score_grad(grads, weights, logits, draw))
    pulled = pull(group, weights, logits, draw, step) if pulling else None
    if not pulling:
        group.forget()
    return task, group.norms(group.split(task)), pulled


def _pull(group: Group, step: int) -> tuple[Tensor, Tensor] | None:
    """The pull of EID alone; the noise takes no part in it."""
    scores, draw = group.scores(), group.draw(step)
    assert scores is not None
    logits = group.first.method.logits(group.weights(), scores, draw)
    pulled = pull(group, group.weights(), logits, draw, step)
    group.forget()
    return pulled


@torch.no_grad()
def gradients(weight: MaskedWeight, step: int) -> tuple[Tensor, Tensor]:
    """Gradient of one weight's scores from the task alone, and with the pull of EID.

    Args:
        weight: that has a gradient.
        step: the optimizer step.
    """
    if weight.guide is not None:
        weight.guide.refresh(step)
    group = Group([weight])
    (noise,) = noise_of([group], step)
    task, norms, pulled = _directions(group, step, noise)
    (norms,) = _over_ranks([group], [norms])
    size = group.root_mean(norms)
    return task, task if pulled is None else task.addcmul(*pulled, value=float(size))


def _with_losses(group: Group, grad: Tensor) -> Tensor:
    """Add what a loss of the user's, such as ``eid_loss``, has left at the scores."""
    scores = [member.scores for member in group.members]
    if all(score is None or score.grad is None for score in scores):
        return grad
    found = []
    for score in scores:
        assert score is not None
        found.append(torch.zeros_like(score) if score.grad is None else score.grad.float())
        score.grad = None  # the user's optimizer must not step it as well
    return grad + torch.cat(found)


def _grad(member: MaskedWeight | Piece) -> Tensor:
    grad = member.grad
    assert grad is not None
    return grad


def _finish_gradients(
    weights: Iterable[MaskedWeight], groups: Iterable[Group], scale: Tensor | None, sign: int
) -> None:
    """Add decay where the mask is zero, or take the gradient away there; ``groups`` of the same."""
    for weight in weights:
        decay, grad = weight.method.decay, _grad(weight)
        if decay is None and weight.learns:
            grad.copy_(kept(grad, weight.mask, weight.undrawn))
    for group in (group for group in groups if group.first.method.decay):
        drawn = group.together([member.mask for member in group.members])
        rest = group.weights() * drawn.logical_not()
        if scale is not None:
            rest *= scale
        grads = [_grad(member) for member in group.members]
        decay = sign * float(group.first.method.decay or 0.0)
        foreach("add_", grads, group.weight_shaped(rest), alpha=decay)


@torch.no_grad()
def draw_masks(weights: Iterable[MaskedWeight], step: int, *, follow_prior: bool = True) -> None:
    """Write the masks of an optimizer step, in place.

    Args:
        weights: of one model.
        step: the optimizer step.
        follow_prior: set the prior's strength by the spread of the scores; else keep it, as it
            was loaded with them.
    """
    moving, settling, still = [], [], []
    for weight in weights:
        if not weight.there:
            continue
        if weight.method.fixed or (weight.settled and weight.frozen):
            still.append(weight)
        elif weight.frozen:
            settling.append(weight)
        elif not fused.draw_mask(weight, step, follow_prior=follow_prior):
            moving.append(weight)
        else:
            _started(weight, step)
    for weight in still:
        weight.after_step(weight.schedule.undrawn_at(step))
    _settle(settling)
    if moving:
        _draw(moving, step, follow_prior)


def _draw(weights: Sequence[MaskedWeight], step: int, follow_prior: bool) -> None:
    groups = grouped(weights)
    noisy = [group for group in groups if group.first.method.learns]
    few = _few(groups)
    noise = dict(zip(map(id, noisy), noise_of(noisy, step) if noisy and few else [], strict=few))
    # put side by side once where that takes little memory
    known = {id(group): group.scores() for group in groups} if few else {}
    _measure(groups, known, follow_prior)
    for group in groups:
        blocks, scores = group.weights(), known[id(group)] if few else group.scores()
        own = noise.get(id(group))
        if own is None and group in noisy:
            (own,) = noise_of([group], step)
        draw = group.draw(step, own)
        method = group.first.method
        logits = None if scores is None else method.logits(blocks, scores, draw)
        masks = group.weight_shaped(method.train_mask(blocks, logits, draw))
        foreach("copy_", [member.mask for member in group.members], masks)
        undrawn = group.first.schedule.undrawn_at(step)
        if any(member.undrawn != undrawn for member in group.members):
            faded = list({id(member.owner): member.faded for member in group.members}.values())
            foreach("zero_", faded)
            foreach("add_", faded, undrawn)
        group.forget()
        for owner in {id(member.owner): member.owner for member in group.members}.values():
            owner.settled = False
            owner.after_step(undrawn, told=True)


def _started(weight: MaskedWeight, step: int) -> None:
    weight.settled = False
    weight.after_step(weight.schedule.undrawn_at(step))


def _measure(
    groups: Sequence[Group], known: Mapping[int, Tensor | None], follow_prior: bool
) -> None:
    """The spread of the scores: their root mean square within the blocks."""
    asking = [g for g in groups if g.first.method.relative or g.first.method.moving_prior]
    asking = [group for group in asking if group.first.scores is not None]
    norms = _over_ranks(asking, [_norms_in_blocks(g, known.get(id(g))) for g in asking])
    for group, norm in zip(asking, norms, strict=True):
        spread = group.root_mean(norm).nan_to_num(0.0, 0.0, 0.0)
        foreach("copy_", [member.spread for member in group.members], list(spread.split(1)))
        priors = [member.prior.detach() for member in group.members if member.prior is not None]
        if priors and follow_prior:
            foreach("copy_", priors, list((spread * group.first.method.moving_prior).split(1)))


def _norms_in_blocks(group: Group, known: Tensor | None) -> Tensor:
    """Norms of the scores about the means of their blocks, float64 ``[members]``."""
    scores = group.scores() if known is None else known
    assert scores is not None
    return group.norms(group.split(scores - scores.mean(1, keepdim=True)))


def _settle(weights: Sequence[MaskedWeight]) -> None:
    """The masks freeze now: the scores take the prior in, and from here on they alone decide."""
    for group in grouped(weights) if weights else ():
        blocks, scores = group.weights(), group.scores()
        assert scores is not None
        draw = group.draw(None)
        logits = group.first.method.logits(blocks, scores, draw)
        if group.priors() is not None:
            own = [m.scores.detach() for m in group.members if m.scores is not None]
            foreach("copy_", own, group.split(logits))
    # not before all pieces of a weight, which may lie in several groups, have taken it in
    priors = [weight.prior.detach() for weight in weights if weight.prior is not None]
    if priors:
        foreach("zero_", priors)
    for weight, mask in final_masks(weights).items():
        weight.mask.copy_(mask)
        weight.settled = True
        weight.momentum = None
        weight.after_step(0.0)


@torch.no_grad()
def final_masks(weights: Sequence[MaskedWeight]) -> dict[MaskedWeight, Tensor]:
    """The final masks of what weights and scores hold now."""
    found: dict[MaskedWeight, Tensor] = {}
    rest = []
    for weight in weights:
        if fused.usable(weight):
            found[weight] = weight.final()
        else:
            rest.append(weight)
    for group in grouped(rest) if rest else ():
        blocks, scores = group.weights(), group.scores()
        draw, method = group.draw(None), group.first.method
        logits = None if scores is None else method.logits(blocks, scores, draw)
        masks = group.weight_shaped(method.final_mask(blocks, logits, draw))
        group.forget()
        for member, mask in zip(group.members, masks, strict=True):
            if isinstance(member, Piece):
                whole = found.setdefault(member.owner, torch.empty_like(member.owner.mask))
                whole[member.first : member.end] = mask
            else:
                found[member] = mask
    return found
