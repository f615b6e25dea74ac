# SPDX-License-Identifier: Apache-2.0
"""Eligibility-inspired distillation (EID): temporal credits as soft targets of the mask logits.

Read in the paper (arXiv 2511.12097, abstract): temporally accumulated credits become block-wise
soft targets that align the mask probabilities with the spiking dynamics, which reduces the
sampling variance.  Formulas, credit, normalisation, strength and rhythm are our choices; the
measurements behind the defaults are in ``spikenm_fx/bench/results/``.

* credit C of each synapse from a running average over refreshes, every ``every`` optimizer steps;
* target q = softmax(C / mean of the block / temperature) in each block;
* KL(q || p) with p = softmax(kappa * pi) has the gradient p - q on kappa * pi: closed form, no
  sampling noise, bounded.  It joins the logits' gradient once an optimizer step, so that the user's
  loss and loop do not change.
"""

from spikenm_fx.masks.eid.guide import Guide
from spikenm_fx.masks.eid.settings import EID, Credit
from spikenm_fx.masks.eid.targets import probabilities, soft_targets

__all__ = ["EID", "Credit", "Guide", "probabilities", "soft_targets"]
