# SPDX-License-Identifier: Apache-2.0
"""One masked weight: its dense parameter, its scores, and the tensor that its module hands out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PlanError
from spikenm_fx.masks.checkpoint import LOGITS
from spikenm_fx.masks.clock import Clock, version_of
from spikenm_fx.masks.methods import Draw, Method, kept
from spikenm_fx.masks.noise import noise_key
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.pattern import BlockView, planes

if TYPE_CHECKING:
    from spikenm_fx.masks.eid import Guide

__all__ = ["MaskedWeight", "refuse_sharded"]


def refuse_sharded(name: str, weight: Tensor) -> None:
    """Raise PlanError if ``weight`` is a DTensor, as FSDP and tensor parallelism make them."""
    if hasattr(weight, "device_mesh"):
        raise PlanError(
            f"{name} {tuple(weight.shape)} is sharded over devices (a DTensor), but blocks need "
            "the whole weight: train sparse models with DistributedDataParallel, and "
            "fold(model) before you shard them"
        )


class MaskedWeight:
    """The mask of one weight: its blocks, its method, and the clock it shares with its model.

    Layers that share one Parameter share one ``MaskedWeight``.
    """

    def __init__(
        self,
        layer: nn.Module,
        key: str,
        name: str,
        view: BlockView,
        method: Method,
        clock: Clock,
        schedule: Schedule,
    ) -> None:
        self.layer = layer  # the module that owns weight and logits; the first of those that share
        self.key = key  # under which it owns the weight
        self.name = name
        self.view = view
        self.method = method
        self.clock = clock
        self.schedule = schedule
        self._cache: _Cached | None = None
        self._final: _Final | None = None
        self._held: tuple[Tensor, Tensor] | None = None  # frozen logits, and a copy of them
        self.settled = False  # whether the frozen logits have taken the prior in
        self._had_backward = False  # without a step after it that was seen by hold
        self._own: tuple[Tensor, Tensor | None] | None = None
        self.last_backward: int | None = None  # step of it
        self.guide: Guide | None = None

    @property
    def dense(self) -> Tensor:
        """The weight parameter as the optimizer sees it."""
        weight = self.layer._parameters.get(self.key)
        if weight is None:
            raise PlanError(
                f"{self.name} {self.view.shape} is masked, but its module has no parameter "
                f"{self.key!r} any more: put it back, and fold(model) before you take it out"
            )
        return weight

    @property
    def scores(self) -> Tensor | None:
        """The scores, mostly learnable logits ``(lead, M, inner)``; None for methods without."""
        return self.layer._parameters.get(self.key + LOGITS)

    def logits(self, draw: Draw) -> Tensor | None:
        """What masks are drawn from, in blocks; differentiable in the scores."""
        if self.scores is None:
            return None
        return self.method.logits(self.view.to_blocks(self.dense.detach()), self.scores, draw)

    @property
    def lent(self) -> bool:
        """Whether functional_call has put other tensors in the parameters' place for now."""
        scores = self.scores
        own = isinstance(self.dense, nn.Parameter)
        return not (own and (scores is None or isinstance(scores, nn.Parameter)))

    @property
    def own(self) -> tuple[Tensor, Tensor | None]:
        """Weight and scores that an optimizer knows, also while others are lent."""
        if not self.lent:
            self.remember_own()
        assert self._own is not None
        return self._own

    def remember_own(self) -> None:
        """Take what the module holds now for its own."""
        self._own = self.dense, self.scores

    def fresh_scores(self) -> Tensor | None:
        """Initial scores for the present weight."""
        with torch.no_grad():
            blocks = self.view.to_blocks(self.dense.detach())
            return self.method.init_scores(blocks, self.draw(0))

    def restart(self) -> None:
        """Start the scores anew, after a dense checkpoint brought other weights."""
        fresh = self.fresh_scores()
        if self.scores is not None and fresh is not None:
            self.scores.data.copy_(fresh)
        if self.guide is not None:
            self.guide.load(None)
        self.keep_norm()

    @torch.no_grad()
    def keep_norm(self) -> None:
        """Scale the weight so that what the first masks keep is as large as all of it was.

        Only if the method asks for it, and not before a fade, which starts with all of it.
        """
        if not getattr(self.method, "rescale", False) or self.schedule.undrawn_at(0):
            return
        if self.dense.is_inference():
            return  # it may not be written to
        whole, part = (
            torch.linalg.vector_norm(w.float()) for w in (self.dense, self.final_weight())
        )
        factor = whole / part
        if torch.isfinite(factor) and torch.isfinite(self.dense * factor).all():
            # .data: a state left from an earlier forward may hold a graph through this weight; and
            # not in place: the values may be those of a checkpoint that was loaded by assigning
            self.dense.data = self.dense.data * factor.to(self.dense.dtype)

    def versions(self) -> tuple[int, int]:
        """In-place version counters of weight and logits."""
        weight, scores = self.own
        return version_of(weight), version_of(scores)

    def probe(self) -> tuple[Tensor, ...]:
        """A few values of weight and logits, spread over each: did somebody write to them?"""
        return tuple(_few(tensor) for tensor in self.own if tensor is not None)

    def draw(self, step: int | None) -> Draw:
        """Everything a mask depends on besides the tensors.

        Args:
            step: the optimizer step; None for the final mask, for which nothing is drawn.
        """
        final = step is None
        step = self.clock.step if step is None else step
        spread = self._spread()
        return Draw(
            nm=self.view.nm,
            key=noise_key(self.clock.seed, step, self.name),
            start_key=noise_key(self.clock.seed, 0, self.name),
            kappa=1.0 if final else self._kappa(step, spread),
            tau=self.schedule.tau_at(step),
            frozen=final or self.schedule.frozen(step),
            present=self.view.present(self.dense.device),
            undrawn=0.0 if final or self.lent else self.schedule.undrawn_at(step),
            spread=spread,
            settled=self.settled,
        )

    def _kappa(self, step: int, spread: float) -> float:
        """The logit scale; relative ones are counted in one over the spread of the logits."""
        relative = spread and getattr(self.method, "relative", False)
        return self.schedule.kappa_at(step) / (spread if relative else 1.0)

    @torch.no_grad()
    def _spread(self) -> float:
        """Root mean square of the logits within their blocks; 0 where nobody asks for it."""
        if self.scores is None or not getattr(self.method, "uses_spread", False):
            return 0.0
        values = planes(self.scores.detach().float())
        if values.numel():
            values.sub_(values.mean(0))
        spread = float(torch.linalg.vector_norm(values)) / max(values.numel(), 1) ** 0.5
        return spread if spread < float("inf") else 0.0

    def hold(self) -> None:
        """Keep frozen logits where they are.

        They get no gradient, but where the training loop or DistributedDataParallel makes zeros of
        that, an optimizer's momentum goes on moving them.  Its step follows a backward pass; what
        is written at any other time (averaged or restored weights) is left there.
        """
        scores = self.scores
        if self.lent:
            return
        if scores is None or not self.schedule.frozen(self.clock.step):
            self._held, self.settled = None, False
        elif not self.settled:
            self._settle(scores)
        elif self._held is None or self._held[0] is not scores or not self._had_backward:
            self._held, self._had_backward = (scores, scores.detach().clone()), False
        elif self.clock.step != self.last_backward or self.clock.moved(self):
            scores.data.copy_(self._held[1])
            self._had_backward = False

    @torch.no_grad()
    def _settle(self, scores: Tensor) -> None:
        """The masks freeze now: from here on the logits alone decide."""
        logits = self.logits(self.draw(None))
        assert logits is not None
        scores.data.copy_(logits)
        self._held, self._had_backward = (scores, scores.detach().clone()), False
        self.settled = True

    def release(self) -> None:
        """Accept whatever the logits are now: a checkpoint was loaded."""
        self._held = None

    def mask(self, step: int | None = None) -> Tensor:
        """The bool mask of the weight's shape: of a training step, or the final one for None."""
        self.hold()
        choose = self.method.final_mask if step is None else self.method.train_mask
        return self._chosen(choose, self.draw(step))

    @torch.no_grad()
    def _chosen(
        self, choose: Callable[[Tensor, Tensor | None, Draw], Tensor], draw: Draw
    ) -> Tensor:
        blocked = choose(self.view.to_blocks(self.dense.detach()), self.logits(draw), draw)
        return self.view.from_blocks(blocked)

    @torch.no_grad()
    def final_weight(self) -> Tensor:
        """The weight under the final mask: what evaluation uses and ``fold`` bakes in."""
        return kept(self.dense.detach(), self.mask())

    def masked(self, training: bool) -> Tensor:
        """The weight that the layer uses now: at most N non-zeros in each block of M.

        Only where a training schedule fades the undrawn weights out there are more; weights that
        functional_call lends do not take part in that, as nothing tells how long they train.
        """
        refuse_sharded(self.name, self.dense)
        if not training:
            return self._of_evaluation()
        self._final = None
        return self._of_step(self.clock.now(self))

    def _of_step(self, step: int) -> Tensor:
        if self.lent:  # never the same tensors twice
            return self._trained(step)
        state = (
            step,
            *self.versions(),
            id(self.dense),
            self.dense.data_ptr(),
            self.dense.requires_grad,
            self.scores is not None and self.scores.requires_grad,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
        cached = self._cache
        if cached is None or cached.state != state or version_of(cached.masked) != cached.version:
            masked = self._trained(step)
            cached = self._cache = _Cached(state, self.dense, masked, version_of(masked))
        return cached.masked

    def _of_evaluation(self) -> Tensor:
        """Only the mask is kept, for as long as weight and logits are the same bit by bit."""
        dense, scores = self.dense.detach(), self._scores_now()
        if dense.device.type != "cpu" or self.lent:
            return self._applied(
                self.draw(None), self.mask(), training=False
            )  # cheaper than to ask
        final = self._final
        if final is None or not final.still_of(dense, scores):
            mask = self.mask()
            final = self._final = _Final(dense.clone(), self._scores_now().clone(), mask)
        return self._applied(self.draw(None), final.mask, training=False)

    def _scores_now(self) -> Tensor:
        return self.dense.new_empty(0) if self.scores is None else self.scores.detach()

    def _trained(self, step: int) -> Tensor:
        self.hold()
        draw = self.draw(step)  # once for both passes: it measures the logits
        return self._applied(draw, self._chosen(self.method.train_mask, draw), training=True)

    def _applied(self, draw: Draw, mask: Tensor, *, training: bool) -> Tensor:
        context = _Context(self, draw, training)
        return _MaskedFunction.apply(self.dense, self.scores, mask, context)  # type: ignore[no-untyped-call,no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_final": None}


def _few(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    # without NaN, which never equals itself
    return torch.nan_to_num(flat[:: max(flat.numel() // 64, 1)])


@dataclass(slots=True)
class _Cached:
    state: tuple[Any, ...]
    dense: Tensor  # kept so that its id is not given to another tensor
    masked: Tensor
    version: int  # of ``masked``: whoever writes to ``layer.weight`` writes to this tensor


@dataclass(frozen=True, slots=True)
class _Final:
    """The final mask and copies of what it was made from: a write to ``.data`` leaves no trace."""

    dense: Tensor
    scores: Tensor
    mask: Tensor

    def still_of(self, dense: Tensor, scores: Tensor) -> bool:
        """Whether weight and logits are still these, in value, shape and type."""
        return (
            dense.dtype == self.dense.dtype
            and scores.dtype == self.scores.dtype
            and dense.device == self.dense.device
            and torch.equal(dense, self.dense)
            and torch.equal(scores, self.scores)
        )


class _Context:
    """What the backward pass needs; it holds no layer, so that no graph keeps a model alive."""

    __slots__ = (
        "clock",
        "dense",
        "draw",
        "lent",
        "method",
        "owner",
        "scores",
        "training",
        "versions",
        "view",
    )

    def __init__(self, owner: MaskedWeight, draw: Draw, training: bool) -> None:
        self.dense, self.scores = owner.dense, owner.scores
        self.owner = weakref.ref(owner)
        self.view, self.method, self.clock = owner.view, owner.method, owner.clock
        self.draw, self.training, self.lent = draw, training, owner.lent
        self.versions = version_of(self.dense), version_of(self.scores)

    def gradients(
        self, grad: Tensor, mask: Tensor, *, of_weight: bool, of_scores: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and scores from that of the masked weight."""
        if (
            version_of(self.dense) != self.versions[0]
            or version_of(self.scores) != self.versions[1]
        ):
            raise RuntimeError(
                "a masked weight or its logits were written to between forward and backward; "
                "call backward before optimizer.step()"
            )
        weight = self.dense.detach()
        grad_scores = None
        if of_scores and self.training and self.scores is not None:
            blocks = self.view.to_blocks(grad), self.view.to_blocks(weight)
            logits = self.method.logits(blocks[1], self.scores.detach(), self.draw)
            grad_scores = self.method.score_grad(*blocks, logits, self.draw)
            if grad_scores is not None:
                grad_scores = self._guided(grad_scores, logits).to(self.scores.dtype)
        self.clock.note_backward(scores_too=grad_scores is not None, lent=self.lent)
        first = self._first()
        grad_weight = None
        if of_weight:
            grad_weight = self.method.weight_grad(grad, weight, mask, self.draw, first)
        return grad_weight, grad_scores

    def _first(self) -> bool:
        """Whether this is the first backward pass of the step."""
        owner = self.owner()
        if owner is None:
            return True
        first = owner.last_backward != owner.clock.step
        owner.last_backward = owner.clock.step
        owner._had_backward = True
        return first

    def _guided(self, grad_scores: Tensor, logits: Tensor) -> Tensor:
        owner = self.owner()
        if owner is None or owner.guide is None:
            return grad_scores
        owner.guide.refresh(owner, owner.clock.step)
        return owner.guide.pull(owner, grad_scores, self.draw, logits)


class _MaskedFunction(torch.autograd.Function):
    """weight, logits -> masked weight; one node per step, shared by all T calls of the layer.

    Nothing goes through ``save_for_backward``: the node must survive several backward passes
    (gradient accumulation), and a recomputed checkpoint may find it in the cache.  Alive between
    forward and backward are the masked weight and one bool mask.
    """

    @staticmethod
    def forward(weight: Tensor, scores: Tensor | None, mask: Tensor, context: _Context) -> Tensor:
        return kept(weight, mask, context.draw.undrawn)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.mask, ctx.context = inputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        context: _Context = ctx.context
        needs_weight, needs_scores, *_ = ctx.needs_input_grad
        gradients = context.gradients(
            grad, ctx.mask, of_weight=needs_weight, of_scores=needs_scores
        )
        return *gradients, None, None
