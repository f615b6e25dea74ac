# SPDX-License-Identifier: Apache-2.0
"""Whether an engine computes what its model does, but for spikes that rounding decides.

Folding a norm into weights, and kernels that sum in another order, round otherwise than torch.  A
membrane that lies on its threshold may then spike or not, and all that follows differs: two outputs
may be far apart although every layer is right.  So every layer is compared on the spikes that the
model itself sends it (see :mod:`spikenm_fx.pack.check.forced`).  There each neuron must receive the
same but for rounding and emit the same but for ties, and so must the output.  Up to the first spike
that differs this is the engine's own free run; behind it, it is what that run would be without the
tie.  Where the rule of a neuron is known, its membrane is too, and tells a tie from an error for
each spike; else the share of spikes that differ has to be small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spikenm_fx.pack.check.difference import ROUNDING, NeuronDifference

__all__ = ["OUTPUT", "ROUNDING", "TIES", "Agreement", "agreement"]

OUTPUT = 1e-3
"""How far an output may be off, relative to its norm."""
TIES = 1e-4
"""Share of a neuron layer's spikes that may lie on the threshold."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """An engine against its model on one sample.

    Attributes:
        output: difference of the outputs relative to the model's norm, each run by itself.
        forced: the same, where the engine's neurons hand on the model's spikes.
        neurons: those that can be observed, in the order in which they first ran.
    """

    output: float
    forced: float
    neurons: tuple[NeuronDifference, ...] = field(repr=False)

    @property
    def first(self) -> NeuronDifference | None:
        """The first neuron whose spikes differ; its inputs were still the same."""
        return next((neuron for neuron in self.neurons if neuron.others), None)

    @property
    def ties(self) -> int:
        """Spikes that differ although what their neuron received agrees."""
        return sum(neuron.others for neuron in self.neurons)

    @property
    def disagreement(self) -> str:
        """What is wrong with the engine, the first of it; "" if nothing is.

        Without neurons that can be observed, the output alone has to agree.
        """
        for neuron in self.neurons:
            if not neuron.received <= ROUNDING:
                return (
                    f"{neuron.name} receives something else, by {neuron.received:.2g} of its "
                    f"largest input, on the same spikes; rounding explains {ROUNDING:g}"
                )
            if not neuron.inner <= ROUNDING:
                return (
                    f"a layer inside {neuron.name} gives something else, by {neuron.inner:.2g} of "
                    f"its largest output, on the same spikes; rounding explains {ROUNDING:g}"
                )
            if neuron.margin is not None and not neuron.margin <= ROUNDING:
                return (
                    f"{neuron.name} emits another spike on the same input, its membrane "
                    f"{neuron.margin:.2g} of the largest off the threshold; rounding explains "
                    f"{ROUNDING:g}"
                )
            # one membrane on its threshold may also differ in all its later steps
            if neuron.others > max(TIES * neuron.spikes, neuron.steps):
                return (
                    f"{neuron.name} emits {neuron.others} of {neuron.spikes} spikes otherwise on "
                    f"the same input; ties explain a share of {TIES:g}"
                )
        if not self.forced <= OUTPUT:
            on = " on the same spikes" if self.neurons else ""
            return f"the output differs by {self.forced:.2g} of its norm{on}"
        if not self.output <= OUTPUT and self.first is None:
            return (
                f"the output differs by {self.output:.2g} of its norm, although every neuron "
                "emits the same"
            )
        return ""


def agreement(
    model: nn.Module,
    engine: nn.Module,
    run: Callable[[nn.Module], Tensor],
    reset: Callable[[nn.Module], None],
) -> Agreement:
    """Compare an engine with the model that it was made of, on one sample.

    Args:
        model: in eval mode; no weight may have changed since.
        engine: what :func:`~spikenm_fx.pack.api.pack` made of it.
        run: calls a module on the sample and gives one tensor of any shape; twice on each.
        reset: forgets a module's state; both are at rest afterwards.
    """
    from spikenm_fx.pack.check.forced import forced  # it knows tensors that programs do without

    def rest() -> None:
        reset(model)
        reset(engine)

    rest()
    wanted, given, neurons = forced(model, engine, lambda module: run(module).clone())
    rest()
    with torch.no_grad():
        free = run(engine).clone()
    rest()
    return Agreement(_relative(free, wanted), _relative(given, wanted), neurons)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
