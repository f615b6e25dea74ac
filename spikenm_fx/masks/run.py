# SPDX-License-Identifier: Apache-2.0
"""What the masks of one model share: the optimizer step, the seed, and whom to tell what."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from spikenm_fx.errors import SpikeNMWarning

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.watch import Watch
    from spikenm_fx.masks.layer import MaskedWeight

__all__ = ["Run", "runs"]

_UNSEEN_UPDATES = 8  # weights written to after a backward pass, no optimizer seen: SAM has one
_LENT_PASSES = 500  # more than the inner steps of meta-learning, which are no steps of ours

_runs: weakref.WeakSet[Run] = weakref.WeakSet()


def runs() -> list[Run]:
    """All runs of this process."""
    return list(_runs)


class Run:
    """The masks of one model on their way through training.

    Attributes:
        seed: of the noise.
        watch: of the distillation, where there is one.
        ranks_met: whether the ranks of a data parallel model around were found to agree.
        compared: what they have compared since, on a device that is not waited for.
        stepped: of each weight stepped last, by its mask's id: the gradient and its version then.
        stepped_by: the optimizer that did.
    """

    def __init__(self, seed: int, step: int = 0) -> None:
        self.seed = seed
        self._step = step
        self.watch: Watch | None = None
        self._weights: list[weakref.ref[MaskedWeight]] = []
        self._root: weakref.ref[nn.Module] | None = None
        self._source: weakref.ref[Run] | None = None  # of a copy that has not stepped itself
        self.ranks_met = False
        self.compared: Tensor | None = None
        self._ahead = 0
        self.quiet = False  # while the library itself runs the model
        self._warned: set[str] = set()
        self.member_of_row: dict[Any, Tensor] = {}  # of each grouping, see groups.py
        self._not_finite: Tensor | None = None  # on a device that is not waited for
        self.forget_step()
        _runs.add(self)

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        """Go on from there; where credits are due the watch opens its eyes."""
        self._step = step
        if self.watch is not None:
            self.watch.wake()

    @property
    def rhythm(self) -> int:
        """The step by which credits are refreshed and ranks meet.

        It goes on as it was when a checkpoint is loaded in the middle of a run of several ranks:
        whether the others have loaded one is not known before they meet.
        """
        return self._step + self._ahead

    def keep_rhythm(self, ahead: int) -> None:
        """Refresh as if there were ``ahead`` steps more than are counted."""
        self._ahead = ahead
        if self.watch is not None:
            self.watch.wake()

    def forget_step(self) -> None:
        """Start anew in the middle of nowhere: after a checkpoint was loaded."""
        self.advances = 0  # steps that this object has seen
        self.stepped: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.stepped_by: weakref.ref[Optimizer] | None = None
        self.prepared: set[int] = set()
        self._unseen = self._lent_passes = 0

    @property
    def weights(self) -> list[MaskedWeight]:
        """All masked weights that are still there."""
        return [weight for ref in self._weights if (weight := ref()) is not None]

    def add(self, weight: MaskedWeight) -> None:
        """Take a weight in."""
        self._weights.append(weakref.ref(weight))

    def close(self) -> None:
        """The model was folded: nothing steps any more."""
        self._weights.clear()
        _runs.discard(self)

    @property
    def root(self) -> nn.Module | None:
        """The model, as long as it is there and known."""
        return None if self._root is None else self._root()

    @root.setter
    def root(self, model: nn.Module) -> None:
        """Remember the model, but do not keep it alive."""
        self._root = weakref.ref(model)

    @property
    def averaged(self) -> bool:
        """Whether this is a copy into which averages of another model are written.

        Such a copy sees no optimizer step of its own.
        """
        if self._source is None or self._source() is None:
            return False
        return any(weight.written for weight in self.weights)

    @property
    def shown_step(self) -> int:
        """The step to tell and to store: of an average that of the model it follows."""
        source = self._source() if self._source is not None and self.averaged else None
        return self.step if source is None else max(self.step, source.shown_step)

    def own_step(self) -> None:
        """This model is trained itself: it follows no other from here on."""
        self.step = self.shown_step
        self._source = None

    def about_to_step(self) -> None:
        """An optimizer has gradients of this model: a copy that nobody wrote to follows nobody."""
        if self._source is not None and not self.averaged:
            self._source = None

    def set(self, *, seed: int, step: int) -> None:
        """Continue from a checkpoint."""
        if self.ranks_met:
            self.keep_rhythm(self.rhythm - step)
        self.seed, self.step, self._source = seed, step, None
        self.forget_step()

    def warn(self, about: str, text: str) -> None:
        """Say ``text``, once for each ``about``."""
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(text, SpikeNMWarning, stacklevel=3)

    def note_backward(self, *, lent: bool, written: bool) -> None:
        """A backward pass went through a masked weight.

        Args:
            lent: whether functional_call had put it there.
            written: whether the weight was written to since the last optimizer step.
        """
        self._lent_passes += lent
        self._unseen += written
        if self._lent_passes == _LENT_PASSES * max(len(self._weights), 1):
            self.warn(
                "lent",
                f"{_LENT_PASSES} backward passes went through weights lent by functional_call, and "
                f"no optimizer steps the model's own parameters: its masks are still those of step "
                f"{self.step}. Copy what was trained, and its gradients, into the model's own "
                "parameters, and call spikenm_fx.step(model) once per update",
            )
        elif self._unseen == _UNSEEN_UPDATES * max(len(self._weights), 1):
            self.warn(
                "unseen",
                f"masked weights change, but no torch optimizer has stepped them since step "
                f"{self.step}: their masks do not learn. In a loop that updates weights itself, "
                "call spikenm_fx.step(model) once per update, after backward() and before the "
                "weights are changed",
            )

    def note_sizes(self, sizes: Tensor) -> None:
        """Root mean squares ``[W]`` of the score gradients of W weights; none should be inf."""
        if sizes.device.type == "cpu":
            if not np.isfinite(sizes.numpy()).all():
                self.note_not_finite()
        else:
            bad = ~torch.isfinite(sizes).all()
            self._not_finite = bad if self._not_finite is None else self._not_finite | bad

    def look(self) -> None:
        """Ask the device what there is to warn of."""
        if self._not_finite is not None and bool(self._not_finite):
            self.note_not_finite()
        self._not_finite = None

    def note_not_finite(self) -> None:
        """Say that gradients were not finite."""
        self.warn(
            "finite",
            f"gradients at step {self.step} hold NaN or infinity: the mask logits of these layers "
            "stay as they were. Skip such steps (torch.amp.GradScaler does), or clip gradients",
        )

    def stepped_since(self) -> None:
        """An optimizer was seen: the loop is one that is understood."""
        self._unseen = self._lent_passes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        import copy

        other = Run(self.seed, self.step)
        memo[id(self)] = other
        other._source = weakref.ref(self)
        other.watch = copy.deepcopy(self.watch, memo)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        # made before its state is read, which leads to weights that ask for it
        return Run, (self.seed, self.shown_step), {"watch": self.watch}

    def __iter__(self) -> Iterator[MaskedWeight]:
        return iter(self.weights)
