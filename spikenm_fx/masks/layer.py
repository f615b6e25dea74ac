# SPDX-License-Identifier: Apache-2.0
"""One masked weight: its dense parameter, its scores, its mask, and what its module hands out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from spikenm_fx._torch import (
    data_parallel_group,
    disable_dynamo,
    in_functorch,
    is_captured,
    is_stacked_by_vmap,
    joins_uneven,
)
from spikenm_fx.errors import PlanError
from spikenm_fx.masks.computed import computed
from spikenm_fx.masks.final import FinalMask
from spikenm_fx.masks.foreign import tell_of_foreign
from spikenm_fx.masks.gather import (
    adopt,
    handed_out,
    hook,
    masked_part,
    mode_of,
    release,
    scores_here,
)
from spikenm_fx.masks.keys import LOGITS, PRIOR
from spikenm_fx.masks.methods import Draw, Method, kept
from spikenm_fx.masks.multiply import multiply, multiply_anywhere
from spikenm_fx.masks.noise import noise_key
from spikenm_fx.masks.piece import Piece, pieces_of, rows_of
from spikenm_fx.masks.ranks import meet
from spikenm_fx.masks.run import Run
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.masks.shard import Shard, is_sharded, part_of
from spikenm_fx.pattern import BlockView
from spikenm_fx.state.parameters import is_reading

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from spikenm_fx.masks.eid import Guide

__all__ = ["MaskedWeight"]


class MaskedWeight:
    """The mask of one weight: its blocks, its method, and the run it shares with its model.

    Layers that share one Parameter share one ``MaskedWeight``.

    Attributes:
        layer: the module that owns weight and scores; the first of those that share.
        key: under which it owns the weight.
        name: qualified, of the weight's layer; part of the noise key.
        whole: the weight as blocks.
        view: the same of what this rank holds: all of it, unless the weight is a DTensor.
        shard: which part of a DTensor that is; None for a plain parameter.
        holders: the modules that hold the weight, each with its key there.
        method: how masks are made.
        run: of the model.
        schedule: of the temperatures.
        mask: bool, of the weight's shape: that of training, written in place at each step.
        undrawn: what training multiplies weights outside the mask with; 0 but in a fade.
        faded: the same as a tensor, for compiled graphs.
        spread: root mean square of the scores within their blocks, when masks were drawn last.
        asked: the mask when progress was asked for last.
        momentum: of the scores, see ``masks/rule.py``; None before the first step and once frozen.
        measured: squares of the scores about the means of their blocks, by the native passes.
        measured_at: at which version of the scores.
        own: the parameter that was there last.
        pinned: what was assigned to ``layer.weight.data`` in evaluation.
        gathered_for: whether what FSDP gathered last is the weight of training mode.
        noted: the gathered weight whose backward passes are noted.
        part_of_scores: of a DTensor of scores the part here, as blocks; see ``gather.py``.
        settled: whether the scores have taken the prior in and the mask stays for good.
        guide: of the distillation, where there is one.
    """

    mask: Tensor
    faded: Tensor
    spread: Tensor

    def __init__(
        self,
        layer: nn.Module,
        key: str,
        name: str,
        view: BlockView,
        method: Method,
        run: Run,
        schedule: Schedule,
    ) -> None:
        self.layer = layer
        self.key = key
        self.name = name
        self.view = self.whole = view
        self.shard: Shard | None = None
        self.holders = [(layer, key)]
        self.method = method
        self.run = run
        self.schedule = schedule
        self.undrawn = 0.0
        self.settled = False
        self.guide: Guide | None = None
        self.asked: Tensor | None = None  # the mask when progress was asked for last
        self.momentum: Tensor | None = None  # of the scores
        self.measured: float | None = None  # by the native passes: squares of the scores' spread
        self.measured_at = -1  # at which version of the scores
        self.own: nn.Parameter | None = None  # the parameter that was there last
        self.pinned: Tensor | None = None  # what was assigned to .data in evaluation
        self.gathered_for: bool | None = None  # by FSDP: for training, or for evaluation?
        self.noted: Tensor | None = None  # gathered, with a hook that notes backward passes
        self.part_of_scores: tuple[Tensor, nn.Parameter] | None = None
        self.raw = False  # hand out the parameter itself: it is being initialised
        self._final = FinalMask()
        self._handed: _Handed | None = None
        self._seen = self._scores_seen = -1
        run.add(self)

    @property
    def dense(self) -> Tensor:
        """The weight parameter as the optimizer sees it; a DTensor where it is sharded.

        Raises:
            PlanError: if the module has it no more, or if it is sharded across blocks.
        """
        weight = self.layer._parameters.get(self.key)
        if weight is None:
            raise PlanError(
                f"{self.name} {self.view.shape} is masked, but its module has no parameter "
                f"{self.key!r} any more: put it back, and fold(model) before you take it out"
            )
        if self.shard is not None and not (is_sharded(weight) and self._is_own(weight)):
            assert self.own is not None
            return self.own  # FSDP has it gathered for now
        if is_sharded(weight):
            if self.shard is None or not self.shard.fits(cast("DTensor", weight)):
                adopt(self, cast("DTensor", weight))
            hook(self, weight)
        if isinstance(weight, nn.Parameter) and not torch.compiler.is_compiling():
            self.own = weight
        return weight

    def is_one_of(self, held: set[int]) -> bool:
        """Whether the parameter is among those with these ids; nobody else's are looked into."""
        there = self.layer._parameters.get(self.key)
        near = id(there) in held or (self.own is not None and id(self.own) in held)
        return near and id(self.dense) in held

    def _is_own(self, weight: Tensor) -> bool:
        """Whether a DTensor is the parameter; else it is gathered, on a mesh of fewer axes."""
        assert self.shard is not None
        return cast("DTensor", weight).device_mesh.ndim >= self.shard.mesh.ndim

    @property
    def values(self) -> Tensor:
        """What this rank holds of the dense weight, a plain tensor without a graph."""
        return part_of(self.dense).detach()

    @property
    def grad(self) -> Tensor | None:
        """What this rank holds of the weight's gradient, likewise."""
        grad = self.dense.grad
        return None if grad is None else part_of(grad).detach()

    @property
    def gathered(self) -> Tensor | None:
        """What FSDP has put in the parameter's place for now."""
        weight = self.layer._parameters.get(self.key)
        return None if self.shard is None or weight is self.dense else weight

    def as_stored(self, there: Tensor) -> Tensor:
        """What those who shard parameters see in the weight's place: the parameter itself.

        Args:
            there: what the module has there, of the weight's shape.
        """
        if is_sharded(there) and not (self.shard is not None and self.gathered is there):
            return self.dense
        return there

    @property
    def there(self) -> bool:
        """Whether the module still has the weight."""
        return self.layer._parameters.get(self.key) is not None

    @property
    def scores(self) -> Tensor | None:
        """The scores, mostly learnable logits ``(lead, M, inner)``; None for methods without.

        Of a sharded weight those of the part that this rank holds.
        """
        scores = self.layer._parameters.get(self.key + LOGITS)
        return scores_here(self, scores) if scores is not None and is_sharded(scores) else scores

    @property
    def prior(self) -> Tensor | None:
        """The strength of the moving prior, a scalar parameter; None for methods without."""
        return self.layer._parameters.get(self.key + PRIOR)

    @property
    def lent(self) -> bool:
        """Whether functional_call has put another tensor in the parameter's place for now."""
        return not isinstance(self.dense, nn.Parameter)

    @property
    def learns(self) -> bool:
        """Whether its scores are trained."""
        return self.method.learns and self.scores is not None

    @property
    def owner(self) -> MaskedWeight:
        """Itself: of a piece of a weight, the weight."""
        return self

    @property
    def credits(self) -> Tensor | None:
        """The running credits of EID, of the shape of what this rank holds."""
        return None if self.guide is None else self.guide.average

    @property
    def numbers_of_scores(self) -> int:
        """How many scores the whole weight has."""
        lead, _, inner = self.whole.blocked_shape
        return 0 if self.scores is None else lead * self.scores.shape[1] * inner

    def momentum_now(self) -> Tensor:
        """The momentum, zeros at first."""
        if self.momentum is None:
            assert self.scores is not None
            self.momentum = torch.zeros_like(self.scores, dtype=torch.float32, requires_grad=False)
        return self.momentum

    @property
    def frozen(self) -> bool:
        """Whether its mask of training is the final one, for good."""
        return self.frozen_at(self.run.step)

    def frozen_at(self, step: int) -> bool:
        """The same of another step."""
        return self.method.fixed or (self.learns and self.schedule.frozen(step))

    @property
    def written(self) -> bool:
        """Whether somebody has written to weight or scores, by what torch counts."""
        dense, scores = self.layer._parameters.get(self.key), self.scores
        return any(t is not None and version_of(t) > 0 for t in (dense, scores))

    def key_at(self, step: int) -> tuple[int, int]:
        """Noise key of this weight at an optimizer step."""
        return noise_key(self.run.seed, step, self.name)

    def draw(self, step: int | None) -> Draw:
        """What a mask depends on besides the tensors; None for the final mask."""
        prior, key = self.prior, self.key_at(step or 0)
        return Draw(
            nm=self.view.nm,
            kappa=1.0 if step is None else self.kappa_at(step),
            tau=self.schedule.tau_at(step or 0),
            prior=0.0 if prior is None else prior.detach(),
            key=key,
            noise=self.noise(key) if self.shard is not None else None,
            present=self.view.present(self.mask.device),
            step=step,
            total_steps=self.schedule.total_steps,
            view=self.view,
            credit=self.credit(),
        )

    def noise(self, key: tuple[int, int]) -> Tensor:
        """Gumbel noise for each score of a sharded weight that this rank holds."""
        assert self.shard is not None
        k = self.view.nm.of if self.scores is None else self.scores.shape[1]
        return self.shard.noise(key, k, self.mask.device)

    def noise_start(self) -> int | None:
        """The counter of its first noise if the rest follows one by one, else None."""
        if self.shard is None:
            return 0
        return self.shard.noise_start(
            self.view.nm.of if self.scores is None else self.scores.shape[1]
        )

    def credit(self) -> Tensor | None:
        """What a method that is guided goes by, in blocks; None before it is known."""
        if not self.method.guided or self.guide is None or self.guide.average is None:
            return None
        return self.view.to_blocks(self.guide.average.to(self.mask.device))

    def kappa_at(self, step: int) -> float | Tensor:
        """The logit scale; relative ones are counted in one over the spread of the logits."""
        kappa = self.schedule.kappa_at(step)
        if not self.method.relative:
            return kappa
        return kappa / self.spread.masked_fill(self.spread == 0, 1.0)

    def logits(self, draw: Draw) -> Tensor | None:
        """What masks are drawn from, in blocks; differentiable in the scores."""
        if self.scores is None:
            return None
        return self.method.logits(self.view.to_blocks(self.values), self.scores, draw)

    @torch.no_grad()
    def final(self) -> Tensor:
        """The final mask of what weight and scores hold now, computed afresh."""
        if self.method.fixed:
            return self.mask
        parts = [self] if torch.compiler.is_compiling() else pieces_of([self])
        masks = [_final(part) for part in parts]
        return masks[0] if len(masks) == 1 else torch.cat(masks)

    @torch.no_grad()
    def final_weight(self) -> Tensor:
        """The weight under the final mask: what evaluation uses and ``fold`` bakes in.

        Of a sharded weight the part that this rank holds.
        """
        return kept(self.values, self.final())

    def final_here(self) -> Tensor:
        """The final mask, computed anew only where weight or scores have changed."""
        return self._final.of(self)

    def part_to_gather(self, training: bool) -> Tensor:
        """What this rank gives FSDP to gather: its part of the masked weight."""
        self.gathered_for = mode_of(self, training)
        return masked_part(self, self.gathered_for)

    def masked(self, training: bool) -> Tensor:
        """The weight that the layer uses now: at most N non-zeros in each block of M.

        Only where a training schedule fades the undrawn weights out there are more; weights that
        functional_call lends do not take part in that, as nothing tells how long they train.

        Raises:
            PlanError: if ranks differ, train unequally long, or blocks are cut.
        """
        if self.shard is not None or is_sharded(self.dense):
            return self._masked_shard(training)
        if in_functorch():
            if training:
                self._refuse_ensemble()
            return self.masked_anywhere(training)
        if self.pinned is not None and not training:
            return self.pinned
        ranks = data_parallel_group() if training else None
        if ranks is not None:
            if joins_uneven():
                raise _uneven(self)
            if not self.run.ranks_met:
                meet(self.run, ranks)
        if not training or self.run.averaged:
            self.warn_of_fade("evaluated")
            tell_of_foreign(self)
            mask, undrawn = self._final.of(self), 0.0
        else:
            mask, undrawn = self.mask, 0.0 if self.lent else self.undrawn
        if is_captured():  # a graph does not see what compiled kernels write
            if not torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
                return self.masked_anywhere(training)
            other = self.dense * undrawn if undrawn else self.dense.new_zeros(())
            return torch.where(mask, self.dense, other)
        if not (torch.is_grad_enabled() and self.dense.requires_grad):
            return computed(kept(self.dense.detach(), mask, undrawn), weakref.ref(self))
        state = _Handed.state_of(self.dense, mask, undrawn)
        if self._handed is None or self._handed.state != state:
            noted = weakref.ref(self)
            straight = self.method.decay is not None or self.learns
            weight = multiply(
                *(self.dense, mask, undrawn),
                straight=straight,
                on_backward=partial(_note_backward, noted, self.lent),
            )
            computed(weight, noted)
            self._handed = _Handed(state, self.dense, weight, version_of(weight))
        elif version_of(self._handed.weight) != self._handed.version:
            self._handed = None  # somebody wrote to it
            return self.masked(training)
        return self._handed.weight

    def masked_in_graph(self, training: bool) -> Tensor:
        """The same where a compiler looks: what FSDP has gathered for this mode is masked already.

        What is sharded is masked outside of the graph, and so is what was gathered for the other.
        """
        if self.shard is None:
            return self.masked_anywhere(training)
        there = self.layer._parameters[self.key]
        assert there is not None
        if is_sharded(there) or self.gathered_for != training:
            weight: Tensor = _outside_of_graph(self, training)
            return weight
        return there

    def _masked_shard(self, training: bool) -> Tensor:
        """The same of a DTensor: what FSDP has gathered is masked, all else is masked here."""
        dense, shard = self.dense, self.shard
        assert shard is not None
        if training and not self.run.ranks_met:
            meet(self.run, None)
        if self.gathered is not None:
            return handed_out(self, self.gathered, training)
        mask, undrawn = (self.mask, self.undrawn) if training else (self.final_here(), 0.0)
        if not (torch.is_grad_enabled() and dense.requires_grad):
            return shard.like_weight(kept(self.values, mask, undrawn))
        state = _Handed.state_of(dense, mask, undrawn)
        if self._handed is None or self._handed.state != state:
            weight = multiply(
                *(cast("DTensor", dense).to_local(), mask, undrawn),
                straight=self.method.decay is not None or self.learns,
                on_backward=partial(_note_backward, weakref.ref(self), False),
            )
            whole = shard.like_weight(weight)
            self._handed = _Handed(state, dense, whole, version_of(whole))
        return self._handed.weight

    def _refuse_ensemble(self) -> None:
        """Weights that vmap stacks have one mask of training each, which nobody gives us."""
        if is_stacked_by_vmap(self.dense):
            raise PlanError(
                f"{self.name} {self.view.shape} is stacked by vmap in training mode, where "
                "each of the stacked models has masks of its own that are no part of its "
                "parameters: train them one by one, stack them in evaluation mode, or after "
                "spikenm_fx.fold"
            )

    def warn_of_fade(self, what: str) -> None:
        """Say that what is ``what`` now is another network than the one that trains."""
        quiet = self.run.quiet or is_reading() or self.run.averaged
        if self.undrawn > 0 and not quiet:
            end = next(
                step
                for step in range(self.run.step, (self.schedule.total_steps or 0) + 1)
                if not self.schedule.undrawn_at(step)
            )
            self.run.warn(
                "fade",
                f"the model is {what} at step {self.run.step}, but until step {end} the weights "
                "outside the masks fade out and still take part in training: without them it "
                "computes something else, mostly much worse. Train to that step first "
                f"(total_steps={self.schedule.total_steps} sets it), or "
                "sparsify with SpikeNM(fade=0.0)",
            )

    def masked_anywhere(self, training: bool) -> Tensor:
        """The same as a pure function of tensors: for compilers and the transforms of torch.func.

        The final mask is then computed in place of being looked up.
        """
        mask = self.mask if training else self.final()
        # by compiled graphs the factor of now is not looked at: one for the fade and what follows
        now = self.schedule.fade if torch.compiler.is_compiling() else self.undrawn
        fading = training and now > 0 and not self.lent
        return multiply_anywhere(
            self.dense,
            mask,
            self.faded if fading else None,
            straight=self.method.decay is not None or self.learns,
        )

    def after_step(self, undrawn: float, *, told: bool = False) -> None:
        """A new mask was written: let go of what belonged to the old one."""
        self._handed = None
        self._final.forget()
        if undrawn != self.undrawn:
            self.undrawn = undrawn
            if not told:  # the tensor knows already
                self.faded.fill_(undrawn)
        self._seen = version_of(self.dense)
        self.forget_writing()

    @property
    def scores_written(self) -> bool:
        """Whether somebody has written to the scores since masks were drawn, by torch's count."""
        scores = self.scores
        return scores is not None and self._scores_seen not in (-1, version_of(scores))

    def forget_writing(self) -> None:
        """The scores are as they should be."""
        self._scores_seen = -1 if self.scores is None else version_of(self.scores)

    def note_backward(self, *, lent: bool) -> None:
        """A backward pass went through the weight."""
        self._handed = None
        if not self.there:
            return
        if self.guide is not None:
            self.guide.close(self.run.step)
        version = version_of(self.dense)
        written = self._seen not in (-1, version) and not lent
        self._seen = version
        self.run.note_backward(lent=lent, written=written)

    @torch.no_grad()
    def replace(self, value: Tensor) -> None:
        """``layer.weight.data`` was assigned to: the parameter takes the values.

        A copy in evaluation uses exactly these until it trains: counters of operations write ones
        into copies of layers.

        Args:
            value: of the weight's shape.
        """
        self._handed = None
        if self.layer.training or self.run.root is not None:
            self.dense.data = value.detach().clone()
        else:
            self.pinned = value.detach()

    @torch.no_grad()
    def bake(self, mask: Tensor) -> None:
        """Write zeros into the parameter where ``mask``, bool of the shape held here, is False."""
        values = self.dense.data if self.shard is None else self.values
        for part, there in rows_of(values, mask):
            part.copy_(kept(part, there))
        if self.shard is not None:
            release(self)

    def forget_handed(self) -> None:
        """Compute the weight anew at the next access: somebody may write to this one."""
        self._handed = None

    def forget_final(self) -> None:
        """Compute the final mask anew when it is asked for."""
        self.pinned = None
        self._final.forget()

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Take the tensors that are no parameters along when the module moves or is cast.

        Args:
            function: what the module applies to each tensor; it leaves the shape as it is.
        """
        self.mask = function(self.mask)
        device = self.mask.device
        self.faded, self.spread = self.faded.to(device), self.spread.to(device)
        if self.momentum is not None:
            self.momentum = self.momentum.to(device)
        if self.guide is not None and self.guide.average is not None:
            self.guide.average = self.guide.average.to(device)
        self._handed = None
        self._final.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_handed": None,
            "_final": FinalMask(),
            "_seen": -1,
            "_scores_seen": -1,
            "measured": None,
            "noted": None,
            "part_of_scores": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.run.add(self)


def _final(part: MaskedWeight | Piece) -> Tensor:
    """The final mask of a weight or of a piece of it."""
    prior, scores = part.prior, part.scores
    draw = Draw(
        part.view.nm,
        prior=0.0 if prior is None else prior.detach(),
        present=part.view.present(part.mask.device),
        credit=part.credit(),
    )
    blocks = part.view.to_blocks(part.values)
    logits = None if scores is None else part.method.logits(blocks, scores, draw)
    return part.view.from_blocks(part.method.final_mask(blocks, logits, draw))


@disable_dynamo
def _outside_of_graph(weight: MaskedWeight, training: bool) -> Tensor:
    return weight.masked(training)


def _uneven(weight: MaskedWeight) -> PlanError:
    return PlanError(
        f"{weight.name} {weight.whole.shape} is masked, and trains inside of join(): a rank that "
        "runs out of data would make no more steps of its masks, which would be others than those "
        "of the ranks that go on. Give every rank the same number of batches (DistributedSampler "
        "with drop_last=True), or end all ranks together: join(throw_on_early_termination=True)"
    )


@dataclass(slots=True)
class _Handed:
    """A masked weight that a loop over time shares, until its backward pass."""

    state: tuple[Any, ...]
    dense: Tensor  # kept so that its id is not given to another tensor
    weight: Tensor
    version: int

    @staticmethod
    def state_of(dense: Tensor, mask: Tensor, undrawn: float) -> tuple[Any, ...]:
        return (
            *(id(dense), part_of(dense).data_ptr(), version_of(dense)),
            *(id(mask), version_of(mask), undrawn),
        )


def version_of(tensor: Tensor) -> int:
    """How often any tensor was written to in place; 0 for an inference tensor, which counts not."""
    return 0 if tensor.is_inference() else int(tensor._version)


def _note_backward(noted: weakref.ref[MaskedWeight], lent: bool) -> None:
    owner = noted()
    if owner is not None:
        owner.note_backward(lent=lent)
