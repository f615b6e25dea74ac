# SPDX-License-Identifier: Apache-2.0
"""The native passes: what a step does to one weight, in few walks over its memory.

They serve ``method="spikenm"``, and masks by magnitude and decay of ``method="srste"``, on float32
weights in this process's memory; the torch path of
:mod:`spikenm_fx.masks.update` does the same work everywhere else, with the same noise, and agrees
with it to rounding.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spikenm_fx.masks import native
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.masks.methods.srste import SRSTE
from spikenm_fx.masks.rule import KEEP, LOOK
from spikenm_fx.native.library import Draws, Kernels, kernels
from spikenm_fx.native.threads import kernel_threads

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["before_step", "decay", "draw_mask", "usable"]


def usable(weight: MaskedWeight) -> bool:
    """Whether the native passes know the method and may read the memory."""
    scores = weight.scores
    return isinstance(weight.method, SpikeNM) and scores is not None and _readable(weight, scores)


def _readable(weight: MaskedWeight, scores: Tensor) -> bool:
    """Whether weight, mask and ``scores``, in blocks, are memory that the kernels can read."""
    if weight.shard is not None:
        return False
    if weight.view.padding or weight.view.blocked_shape != tuple(scores.shape):
        return False
    tensors = (weight.dense, scores, weight.mask)
    if not all(tensor.is_contiguous() and tensor.numel() for tensor in tensors):
        return False
    if weight.mask.device.type != "cpu" or not native.plain(weight.dense):
        return False
    return native.kernel_for(scores, weight.view.nm.keep) is not None


def before_step(
    weight: MaskedWeight, step: int, *, learning: bool, scale: Tensor | None, sign: int
) -> bool:
    """Learn from the gradient of one weight, and let decay into it.

    Args:
        weight: that has a gradient.
        step: the optimizer step.
        learning: False where the scores have learnt in this step already.
        scale: the scalar that a fused optimizer is about to divide the gradients by, if it does.
        sign: -1 where the optimizer climbs.

    Returns:
        False where the torch path must do it.
    """
    grad, scores = weight.dense.grad, weight.scores
    if grad is None or scores is None or scores.grad is not None or not usable(weight):
        return False
    if not learning or weight.frozen or not native.plain(grad) or not grad.is_contiguous():
        return False
    settings = None if weight.guide is None else weight.guide.settings
    strength = 0.0 if weight.guide is None else weight.guide.strength(weight.schedule, step)
    if strength and settings is not None and settings.normalise != "mean":
        return False
    method = weight.method
    assert isinstance(method, SpikeNM)
    if method.decay is None or method.gradient != "draws":
        return False
    call = _call(weight, step)
    move = native.roomy(scores.shape)
    tau = weight.schedule.tau_at(step)
    call.mode, call.grad, call.out = native.LEARN, grad.data_ptr(), move.data_ptr()
    call.inverse_tau, call.gain = 1 / tau, call.kappa / tau
    call.decay = _decay(method.decay, scale, sign)
    size = math.sqrt(_sum(call) / scores.numel())
    if not math.isfinite(size):
        weight.run.note_not_finite()
    if not size or not math.isfinite(size):
        return True
    call.mode, call.grad, call.out = native.MOVE, move.data_ptr(), None
    call.rate, call.inverse_size = method.step_size, sign / size
    call.momentum, call.look, call.keep_momentum = weight.momentum_now().data_ptr(), LOOK, KEEP
    average = None if weight.guide is None else weight.guide.average
    if strength and settings is not None:
        average = average.contiguous() if average is not None else None
        call.strength, call.inverse_temperature = strength, 1 / settings.temperature
        call.credit = None if average is None else average.data_ptr()
        call.credit_by_weight = int(settings.credit.startswith("weight"))
    weight.measured = _sum(call)
    torch.autograd.graph.increment_version(scores)
    weight.measured_at = scores._version
    return True


def decay(weight: MaskedWeight, *, scale: Tensor | None, sign: int) -> bool:
    """Let decay into the gradient of a weight whose scores do not learn from it.

    Args:
        weight: that has a gradient, of its own shape ``(O, C / groups, *kernel)``.
        scale: as of :func:`before_step`.
        sign: as of :func:`before_step`.

    Returns:
        False where the torch path must do it.
    """
    grad, rate = weight.dense.grad, weight.method.decay
    if grad is None or not rate or grad.device.type != "cpu" or weight.shard is not None:
        return False
    factor = _decay(rate, scale, sign)
    return native.add_decay(grad.detach(), weight.dense.detach(), weight.mask, factor)


def _decay(rate: float, scale: Tensor | None, sign: int) -> float:
    return sign * rate * (1.0 if scale is None else float(scale))


def draw_mask(weight: MaskedWeight, step: int, *, follow_prior: bool) -> bool:
    """Measure the spread of the scores, and write the mask of a step.

    Args:
        weight: to mask.
        step: the optimizer step.
        follow_prior: whether the prior's strength follows the spread.

    Returns:
        False where the torch path must do it.
    """
    if isinstance(weight.method, SRSTE):
        return _largest(weight)
    if not usable(weight):
        return False
    scores, method = weight.scores, weight.method
    assert scores is not None
    if weight.measured_at != scores._version or weight.measured is None:
        call = _call(weight, step)
        call.mode = native.SPREAD
        weight.measured, weight.measured_at = _sum(call), scores._version
    spread = math.sqrt(weight.measured / scores.numel())
    spread = spread if math.isfinite(spread) else 0.0
    weight.spread.fill_(spread)
    if weight.prior is not None and follow_prior:
        weight.prior.detach().fill_(method.moving_prior * spread)
    call = _call(weight, step)
    call.mode, call.mask = native.MASK, weight.mask.data_ptr()
    _run(call)
    torch.autograd.graph.increment_version(weight.mask)
    return True


def _largest(weight: MaskedWeight) -> bool:
    """The mask of the largest weights now."""
    dense = weight.dense.detach()
    if type(dense) is not Tensor or dense.dtype != torch.float32 or weight.view.padding:
        return False
    blocks = weight.view.to_blocks(dense)
    if not _readable(weight, blocks) or blocks.data_ptr() != dense.data_ptr():
        return False
    lead, m, inner = blocks.shape
    call = Draws(lead=lead, m=m, inner=inner, keep=weight.view.nm.keep)
    call.threads, call.absolute = kernel_threads(), 1
    call.scores, call.mask = dense.data_ptr(), weight.mask.data_ptr()
    _run(call)
    torch.autograd.graph.increment_version(weight.mask)
    return True


def _call(weight: MaskedWeight, step: int) -> Any:
    """The C structure with what every pass over ``weight`` needs."""
    scores = weight.scores
    assert scores is not None
    lead, m, inner = scores.shape
    call = Draws(
        *(0, 0, 0, 0, 0, 0),
        *(lead, m, inner, weight.view.nm.keep, kernel_threads()),
        *(word & 0xFFFFFFFF for word in weight.key_at(step)),
        1,
    )
    call.scores, call.weight = scores.data_ptr(), weight.dense.data_ptr()
    kappa = weight.kappa_at(step)
    call.kappa = float(kappa.numpy().item()) if isinstance(kappa, Tensor) else kappa
    call.prior = 0.0 if weight.prior is None else float(weight.prior.detach().numpy().item())
    return call


def _table() -> Kernels:
    found = kernels()
    assert found is not None
    return found


def _sum(call: Any) -> float:
    """Run it, and add up what its parts have found, in the same order on any number of threads."""
    sums = np.zeros(_table().items(ctypes.byref(call)), dtype=np.float64)
    call.sums, call.items = sums.ctypes.data, len(sums)
    _run(call)
    call.sums = None
    return float(sums.sum())


def _run(call: Any) -> None:
    status = _table().draws(ctypes.byref(call))
    if status:
        raise RuntimeError(f"the mask kernel refused blocks of {call.m} (status {status})")
