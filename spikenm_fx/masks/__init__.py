# SPDX-License-Identifier: Apache-2.0
"""Learn masks: inject them, sample them, know them again.

How a masked layer works
------------------------
:func:`sparsify` changes the class of a layer, and nothing else that anybody sees: the new class
extends the old one by a property ``weight``, which hands out ``dense weight * mask``.  The dense
parameter stays where it was, under its name, so that optimizers, checkpoints and weight-decay
rules do not change.  In forward that product is all there is: a differentiable function of a
parameter and a mask tensor, without counting, caching of steps or a look at values, so that
automatic mixed precision, accumulation, data parallelism, ``torch.func``, ``torch.compile`` and
export need nothing special.

Everything else happens once per optimizer step, in two hooks that torch offers for it
(:mod:`spikenm_fx.masks.hooks`):

* **before the step**, from the dense gradient as the optimizer is about to see it (accumulated over
  micro-batches, averaged over ranks, unscaled): the straight-through gradient of the logits
  (:mod:`~spikenm_fx.masks.sampler`), the pull of the distillation
  (:mod:`~spikenm_fx.masks.eid`), and the decay of what is not drawn
  (:mod:`~spikenm_fx.masks.update`).  The logits move by a rule of their own
  (:mod:`~spikenm_fx.masks.rule`): no learning rate, no group, no state in the user's optimizer;
* **after the step**, the masks of the next one, for all layers in one pass, from noise that is a
  function of (seed, step, layer, position) and of nothing else (:mod:`~spikenm_fx.masks.noise`).

Evaluation, checkpoints and ``fold`` use the deterministic mask, the N largest of each block
(:mod:`~spikenm_fx.masks.final`), computed again when weights or logits were written to.  With
``total_steps`` the noise falls within the run and the masks freeze for its last part
(:mod:`~spikenm_fx.masks.schedule`).  Which method makes the masks is one object with a small
interface (:mod:`~spikenm_fx.masks.methods`).
"""

from spikenm_fx.masks.attach import MaskedLayer, masked_layers
from spikenm_fx.masks.eid import EID
from spikenm_fx.masks.eid.loss import eid_loss
from spikenm_fx.masks.hooks import step
from spikenm_fx.masks.progress import Progress, progress
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.masks.sparsify import param_groups, sparsify

__all__ = [
    "EID",
    "MaskedLayer",
    "Progress",
    "Schedule",
    "eid_loss",
    "masked_layers",
    "param_groups",
    "progress",
    "sparsify",
    "step",
]
