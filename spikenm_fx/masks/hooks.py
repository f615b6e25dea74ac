# SPDX-License-Identifier: Apache-2.0
"""The optimizer step as the masks see it, by torch's own hooks, without a word in the user's loop.

Before an optimizer's ``step`` scores learn from the gradients that it is about to see, and after it
the next masks are drawn.  Torch calls a global hook for every optimizer of the process; ours look
which parameters it holds and leave all others alone.

* An optimizer that makes its gradients itself, by a closure, is looked at when its closure has
  returned for the first time.
* One optimizer inside of another (SAM, Lookahead) is one step: the inner one's.  Masks are drawn
  again after the outer one, which may have written to the weights.
* Optimizers that hold different weights of one model and step after the same backward pass make one
  step together.
* Optimizers that hold the same weights are a step each, with the gradient that each of them finds;
  where both find the same one that is told.
* A step that a gradient scaler skips, and one without any gradient, is none.
* The step by which ``torch.distributed.checkpoint.state_dict`` gives an optimizer a state is none.
* Global hooks run before those that a user gives one optimizer: what these replace in the gradients
  reaches the optimizer, but neither scores nor decay.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spikenm_fx._torch import disable_dynamo, dynamo_is_imported
from spikenm_fx.errors import PlanError, no_module
from spikenm_fx.masks.eid.guide import refresh_together
from spikenm_fx.masks.layer import MaskedWeight
from spikenm_fx.masks.run import Run, runs
from spikenm_fx.masks.update import before_step, draw_masks

__all__ = ["install", "step"]


@functools.cache
def install() -> None:
    """Register the two hooks, once for the process."""
    register_optimizer_step_pre_hook(_never_compiled(_before))
    register_optimizer_step_post_hook(_never_compiled(_after))


def _never_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled ``optimizer.step()`` calls it as it is; dynamo is not imported for that."""
    left_out = disable_dynamo(hook)

    @functools.wraps(hook)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (left_out if dynamo_is_imported() else hook)(*args, **kwargs)

    return called


def step(model: nn.Module) -> None:
    """Count one update in a loop that has no torch optimizer, and let masks learn from it.

    Call it once per update, after ``backward()`` has left the gradients of the whole step in
    ``parameter.grad`` and before the loop changes the weights::

        loss.backward()
        spikenm_fx.step(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    Scores learn from the gradients, decay is added to them, and the masks of the next step are
    drawn; with a torch optimizer all of that happens by itself, and this must not be called.

    Args:
        model: a sparsified model.

    Raises:
        PlanError: if ``model`` is not sparse.
    """
    from spikenm_fx.masks.attach import masked_weights

    if not isinstance(model, nn.Module):
        raise PlanError(no_module("step", model))
    weights = {id(mask): mask for _, _, mask in masked_weights(model)}
    if not weights:
        raise PlanError(
            f"{type(model).__name__} has no masks; call spikenm_fx.sparsify(model) first"
        )
    for run in {id(mask.run): mask.run for mask in weights.values()}.values():
        own = [mask for mask in weights.values() if mask.run is run]
        if all(mask.dense.grad is None for mask in own):
            run.warn(
                "nothing",
                "spikenm_fx.step(model) found no gradient of any masked weight, so that the masks "
                "cannot learn: call it after backward() and before gradients are reset",
            )
        _learn(run, own)
        _advance(run, own, of=None)


class _Active:
    """An optimizer whose ``step`` is on its way."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.advances = {id(run): run.advances for run in runs()}


_active: list[_Active] = []


def _before(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    found = _shares(optimizer)
    if not found or _only_makes_state(optimizer):
        return None
    while any(each.optimizer() is optimizer for each in _active):
        _active.pop()  # an earlier step of it ended in an error
    if not _active:
        for run, _ in found:
            run.prepared.clear()
    _active.append(_Active(optimizer))
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        if not _is_skipped(optimizer):
            for run, share in found:
                _learn(run, share, optimizer)
        return None

    @functools.wraps(closure)
    def evaluated() -> Any:
        loss = closure()
        for run, share in found:
            _learn(run, share, optimizer)
        return loss

    if len(args) > 1:
        return (args[0], evaluated, *args[2:]), kwargs
    return args, {**kwargs, "closure": evaluated}


def _after(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    if not any(each.optimizer() is optimizer for each in _active):
        return
    while True:
        active = _active.pop()
        if active.optimizer() is optimizer:
            break
    if _is_skipped(optimizer):
        return
    for run, share in _shares(optimizer):
        if run.advances > active.advances.get(id(run), run.advances):
            draw_masks(run.weights, run.step)  # after an inner optimizer
        elif _has_gradient(optimizer):
            _advance(run, share, of=optimizer)


def _learn(run: Run, share: list[MaskedWeight], optimizer: Optimizer | None = None) -> None:
    """What comes before the step, for what has a gradient; scores learn once a step."""
    ready = [mask for mask in share if mask.there and mask.dense.grad is not None]
    if ready:
        run.about_to_step()
    fresh = [mask for mask in ready if id(mask) not in run.prepared]
    ranks = None if run.watch is None else run.watch.ranks
    refresh_together([mask for mask in fresh if not mask.frozen_at(run.rhythm)], ranks)
    if fresh and run.watch is not None:
        run.watch.warn_if_blind()
    if optimizer is not None and not _active_inner():
        _warn_of_two(run, fresh, optimizer)
    _prepare(fresh, run.step, optimizer, learning=True)
    if not _active_inner():  # a closure's further evaluations, whose gradients are new ones
        again = [mask for mask in ready if id(mask) in run.prepared]
        _prepare(again, run.step, optimizer, learning=False)
    run.prepared.update(map(id, ready))


def _prepare(
    weights: list[MaskedWeight], step: int, optimizer: Optimizer | None, *, learning: bool
) -> None:
    scale = None if optimizer is None else getattr(optimizer, "grad_scale", None)
    rising = set() if optimizer is None else _held(optimizer, maximizing=True)
    for sign in (1, -1):
        part = [mask for mask in weights if (id(mask.dense) in rising) is (sign < 0)]
        if part:
            before_step(part, step, learning=learning, scale=scale, sign=sign)


def _active_inner() -> bool:
    """Whether an optimizer steps inside of another, whose closure has been looked at."""
    return len(_active) > 1


def _advance(run: Run, share: list[MaskedWeight], *, of: Optimizer | None) -> None:
    """The step was made: go on to the next, unless another optimizer has made it before."""
    stepped = [mask for mask in share if mask.there and mask.dense.grad is not None]
    if of is not None and not stepped and any(_has_grad(mask) for mask in run.weights):
        return  # of another optimizer's weights
    together = (
        of is not None
        and bool(stepped)
        and bool(run.stepped)
        and not any(id(mask) in run.stepped for mask in stepped)
        and not _new_gradients(run)
    )
    if not together:
        run.own_step()
        run.stepped.clear()
        run.step += 1
        run.advances += 1
        _warn_past_the_end(run)
        _warn_of_rest(run)
        draw_masks(run.weights, run.step)
    else:
        draw_masks(stepped, run.step)
    for mask in stepped:
        grad = mask.dense.grad
        assert grad is not None
        run.stepped[id(mask)] = (weakref.ref(grad), grad._version)
    run.stepped_by = None if of is None else weakref.ref(of)
    run.prepared.difference_update(map(id, stepped))
    run.stepped_since()
    if run.watch is not None:
        run.watch.forget()


def _has_grad(mask: MaskedWeight) -> bool:
    return mask.there and mask.dense.requires_grad and mask.dense.grad is not None


def _warn_of_rest(run: Run) -> None:
    learning = [m for m in run.weights if m.there and m.learns and not m.frozen]
    if learning and not any(m.dense.requires_grad for m in learning):
        run.warn(
            "rest",
            "none of the masked weights requires a gradient, so that their masks do not learn; "
            "steps count and the masks freeze all the same. To learn masks let the weights "
            "require gradients, also where no optimizer holds them",
        )


def _warn_past_the_end(run: Run) -> None:
    totals = {m.schedule.total_steps for m in run.weights if m.schedule.total_steps is not None}
    total = max(totals, default=None)
    if total is not None and run.step == total + 1:
        run.warn(
            "end",
            f"training goes on past total_steps={total}, for which the masks were sparsified: they "
            "have been frozen since and stay so. total_steps counts optimizer steps of the whole "
            "run, not epochs: epochs * len(loader), over accumulated batches once",
        )


def _warn_of_two(run: Run, weights: list[MaskedWeight], optimizer: Optimizer) -> None:
    last = None if run.stepped_by is None else run.stepped_by()
    if last is None or last is optimizer:
        return
    if any(id(mask) in run.stepped and not _is_new(run, mask) for mask in weights):
        run.warn(
            "two",
            f"two optimizers step the same masked weights on the same gradients (step {run.step}): "
            "each counts as a step of the masks, for total_steps as well. Give each weight to one "
            "optimizer, or run a backward pass for each of them",
        )


def _new_gradients(run: Run) -> bool:
    """Whether a backward pass went through what was stepped since."""
    stepped = [mask for mask in run.weights if id(mask) in run.stepped and _has_grad(mask)]
    return any(_is_new(run, mask) for mask in stepped)


def _is_new(run: Run, mask: MaskedWeight) -> bool:
    """Whether the gradient of a mask that was stepped is another one since."""
    grad, version = run.stepped[id(mask)]
    now = mask.dense.grad
    return now is not None and (grad() is not now or now._version != version)


def _only_makes_state(optimizer: Optimizer) -> bool:
    """Whether torch's checkpoint functions step it at rate 0, so that it has a state to load."""
    if any(group.get("lr", 1.0) != 0.0 for group in optimizer.param_groups):
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False


def _shares(optimizer: Optimizer) -> list[tuple[Run, list[MaskedWeight]]]:
    """The runs that an optimizer steps, each with the masked weights that it holds."""
    held = None
    found = []
    for run in runs():
        weights = run.weights
        if not weights:
            continue
        held = _held(optimizer) if held is None else held
        share = [mask for mask in weights if mask.there and mask.is_one_of(held)]
        if share or _steps_the_rest(run, weights, held):
            found.append((run, share))
    return found


def _held(optimizer: Optimizer, *, maximizing: bool = False) -> set[int]:
    """The parameters of an optimizer, or of its groups that climb."""
    groups = [g for g in optimizer.param_groups if not maximizing or g.get("maximize", False)]
    return {id(p) for group in groups for p in group["params"]}


def _steps_the_rest(run: Run, weights: list[MaskedWeight], held: set[int]) -> bool:
    """Whether no masked weight is trained, but something else of the model is (LoRA)."""
    root = run.root
    if root is None or any(m.there and m.dense.requires_grad for m in weights):
        return False
    return any(id(parameter) in held for parameter in nn.Module.parameters(root))


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to skip the step, which it finds out on the device."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
