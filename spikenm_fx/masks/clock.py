# SPDX-License-Identifier: Apache-2.0
"""The optimizer step as the masks see it, without a word in the user's training loop.

A step is noticed by what it does: optimizers write to parameters in place, which raises a tensor's
version counter or at least (fused optimizers, writes to ``.data``) changes its values.  Forward
passes do not, nor do gradient accumulation, a Python loop over time, the recomputation of
activation checkpoints or a step that a gradient scaler skipped; so all of these share one mask
sample.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikenm_fx.errors import SpikeNMWarning

if TYPE_CHECKING:
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["Clock", "version_of"]

_LENT_PASSES = 500  # more than the inner steps of meta-learning, which are no steps of ours
_IDLE_STEPS = 3  # one or two may belong to a schedule that trains weights and logits in turn


def version_of(tensor: Tensor | None) -> int:
    """The in-place version counter, 0 for a missing or an inference tensor (which has none)."""
    return 0 if tensor is None or tensor.is_inference() else int(tensor._version)


class Clock:
    """Counts optimizer steps for all masked weights of one model.

    Attributes:
        seed: of the run's noise.
        step: optimizer steps seen so far.
    """

    _seen: weakref.WeakKeyDictionary[MaskedWeight, tuple[int, int]]
    _probes: weakref.WeakKeyDictionary[MaskedWeight, tuple[Tensor, ...]]
    _mover: weakref.ref[MaskedWeight] | None
    _backward_seen: bool
    _scores_seen: bool
    _idle_steps: int
    _lent_passes: int

    def __init__(self, seed: int, step: int = 0) -> None:
        self.seed = seed
        self.step = step
        self._reset_watch()

    def now(self, asking: MaskedWeight) -> int:
        """The current step, after a look whether an optimizer has stepped since the last look."""
        if asking not in self._seen:
            self._seen[asking] = asking.versions()
        elif self._has_stepped(asking):
            self.step += 1
            self._look()
        return self.step

    def settle(self) -> int:
        """Count a step that no forward pass has noticed yet, then the current step."""
        if any(map(self.moved, self._seen)):
            self.step += 1
            self._look()
        return self.step

    def set(self, *, seed: int, step: int) -> None:
        """Continue from a checkpoint; the copies that loading made are not optimizer steps."""
        self.seed, self.step = seed, step
        self._reset_watch()

    def note_backward(self, *, scores_too: bool, lent: bool) -> None:
        """Called by every backward pass through a masked weight.

        Args:
            scores_too: whether its logits got a gradient.
            lent: whether the weight was lent by functional_call.
        """
        self._lent_passes += lent
        if self._lent_passes == _LENT_PASSES * len(self._seen):
            warnings.warn(
                f"{_LENT_PASSES} backward passes went through weights lent by functional_call, and "
                f"the model's own parameters did not change: its masks are still those of step "
                f"{self.step}. Steps are counted where the model's own parameters are written to; "
                "copy what was trained into them after each step",
                SpikeNMWarning,
                stacklevel=2,
            )
        self._scores_seen |= scores_too
        self._backward_seen = True
        for weight in self._seen:
            if weight not in self._probes:
                self._probes[weight] = weight.probe()

    def _has_stepped(self, asking: MaskedWeight) -> bool:
        # A step follows a backward pass: look at everything once.  Other steps, and those after
        # one more forward pass, show in the weight that moved last time, or in the one that asks.
        mover = self._mover() if self._mover is not None else None
        if self._backward_seen or mover is None:
            self._backward_seen = False
            return any(map(self.moved, self._seen))
        return (
            self._version_moved(asking)
            or self._version_moved(mover)
            or (asking is mover and self.moved(mover))
        )

    def moved(self, weight: MaskedWeight) -> bool:
        """Whether it was written to since the present step began."""
        return self._version_moved(weight) or any(self._probes_moved(weight))

    def _version_moved(self, weight: MaskedWeight) -> bool:
        return self._seen.get(weight) != weight.versions()

    def _probes_moved(self, weight: MaskedWeight) -> tuple[bool, bool]:
        """Of weight and logits: fused optimizers and writes to ``.data`` leave no version."""
        before = self._probes.get(weight)
        if before is None:
            return False, False
        moved = [not torch.equal(*pair) for pair in zip(before, weight.probe(), strict=True)]
        return moved[0], any(moved[1:])  # a method without scores has only the weight

    def _look(self) -> None:
        self._warn_of_idle_logits()
        mover = next(filter(self.moved, self._seen), None)
        self._mover = None if mover is None else weakref.ref(mover)
        for weight in self._seen:
            self._seen[weight] = weight.versions()
        self._probes.clear()
        self._backward_seen = self._scores_seen = False
        self._lent_passes = 0

    def _warn_of_idle_logits(self) -> None:
        """Tell once of an optimizer that was built before the logits existed."""
        if not self._scores_seen:
            return
        idle = not any(
            self._seen[weight][1] != weight.versions()[1] or self._probes_moved(weight)[1]
            for weight in self._seen
        )
        self._idle_steps = self._idle_steps + 1 if idle else 0
        if self._idle_steps == _IDLE_STEPS:
            warnings.warn(
                f"{_IDLE_STEPS} optimizer steps changed weights but no mask logits, although the "
                "logits have gradients: build the optimizer after sparsify(), or add them with "
                "optimizer.add_param_group(spikenm_fx.param_groups(model)[-1])",
                SpikeNMWarning,
                stacklevel=2,
            )

    def _reset_watch(self) -> None:
        self._seen = weakref.WeakKeyDictionary()
        self._probes = weakref.WeakKeyDictionary()
        self._mover = None
        self._backward_seen = self._scores_seen = False
        self._idle_steps = self._lent_passes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"seed": self.seed, "step": self.settle()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.seed, self.step = state["seed"], state["step"]
        self._reset_watch()
