# SPDX-License-Identifier: Apache-2.0
"""How scores move: by the sign of a momentum, the same distance whatever the loss.

Lion (Chen et al., arXiv 2302.06675) on the layer's gradient in units of its own root mean square.
One number of state a weight, no learning rate of the user's, no group in an optimizer: masks learn
under every optimizer alike, and neither the scale of the loss nor the number of micro-batches
matters.  As masks are drawn from scores in units of their spread, which grows, each step moves them
less and less.

``weight_logits.grad`` is None, also after ``backward()``: the gradient is made in the optimizer's
pre-hook and used up there.  Anything that gave the attribute a value, be it computed on access,
would be read by ``clip_grad_norm_``, ``GradScaler.unscale_``, the reducers of data parallelism and
the user's own optimizer over ``model.parameters()``, and cost one more weight of memory; what is
learnt shows in ``weight_logits`` and ``weight_momentum`` after the step.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["KEEP", "LOOK", "moved"]

LOOK = 0.9  # weight of the momentum in a step
KEEP = 0.99  # and in the next momentum


def moved(gradient: Tensor, momentum: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The step's direction, in {-1, 0, 1}, and the next momentum.

    Args:
        gradient: in units of its root mean square, of the shape of the scores.
        momentum: of the steps before and the same shape, zeros at first.
        known: 1, or 0 in the rows that are to stay as they are; of the same shape or one a row.
    """
    direction = momentum.lerp(gradient, 1 - LOOK).sign_().mul_(known)
    return direction, momentum.lerp(gradient, known * (1 - KEEP))
