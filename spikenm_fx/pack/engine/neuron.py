# SPDX-License-Identifier: Apache-2.0
"""A neuron's update rule in the form that the native epilogue executes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikenm_fx.native.library import Neuron
from spikenm_fx.trace import NeuronSpec

__all__ = ["NeuronCall", "NeuronRule", "why_not_native"]

RESET_KINDS = {"subtract": 0, "hard": 1, "none": 2}
RESET_TIMINGS = {"now": 0, "next": 1, "corrected": 2}

ROWS = ("decay", "gain", "drive", "threshold", "reset", "syn_decay", "syn_gain")


def why_not_native(spec: NeuronSpec) -> str:
    """Why the native epilogue cannot run this neuron; "" if it can."""
    if not spec.exact:
        return f"the update rule of {spec.framework} {spec.class_name} is not fully known"
    if spec.output != "spike" or spec.kind == "integrator":
        return f"{spec.class_name} emits {spec.output} values, not spikes"
    if spec.floor is not None:
        return f"{spec.class_name} keeps its membrane above {spec.floor:g}, for which no kernel is"
    if spec.reset_timing == "corrected" and spec.reset == "hard":
        return "a hard reset that is moved between steps has no kernel"
    return ""


@dataclass(frozen=True, slots=True, eq=False)
class NeuronRule:
    """Per-channel parameters of one neuron layer.

    Attributes:
        parameters: fp32 ``(7, channels)``, the rows :data:`ROWS`.
        kind: 0 subtract, 1 hard, 2 none.
        timing: of the reset: 0 now, 1 next step, 2 corrected.
        inclusive: spikes at ``h == threshold`` as well.
        synapse: 0 none, 1 the membrane sees the new current, 2 the undecayed one.
        initial: membrane before the first step, fp32 ``(channels,)``.
    """

    parameters: Tensor
    kind: int
    timing: int
    inclusive: bool
    synapse: int
    initial: Tensor

    @classmethod
    def of(cls, spec: NeuronSpec, channels: int) -> NeuronRule | None:
        """The rule for ``channels`` channels; None where a parameter is not per channel."""
        reset = spec.reset_value if spec.reset == "hard" else spec.reset_amount
        if reset is None:
            reset = spec.threshold
        rest, decay = _double(spec.rest), _double(spec.decay)
        synapse = spec.synapse
        values = (
            spec.decay,
            spec.gain,
            rest * (1.0 - decay) + _double(spec.bias),
            spec.threshold,
            reset,
            0.0 if synapse is None else synapse.decay,
            1.0 if synapse is None else synapse.gain,
            spec.initial,
        )
        rows = [torch.as_tensor(v, dtype=torch.float32).detach().flatten() for v in values]
        if any(row.numel() not in (1, channels) for row in rows):
            return None
        table = torch.stack([row.expand(channels) for row in rows]).contiguous()
        drives = 0 if synapse is None else 1 if synapse.drives == "new" else 2
        return cls(
            table[:7].contiguous(),
            RESET_KINDS[spec.reset],
            RESET_TIMINGS[spec.reset_timing],
            not spec.strict,
            drives,
            table[7].contiguous(),
        )

    def modes(self) -> list[int]:
        """The integers among the rule, as the custom operators take them."""
        return [self.kind, self.timing, int(self.inclusive), self.synapse]


def _double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class NeuronCall:
    """A rule and the state tensors that one call updates in place.

    Attributes:
        parameters: fp32 ``(7, channels)``.
        modes: of :meth:`NeuronRule.modes`.
        v: fp32 membranes, ``[pixels][channels]`` in memory.
        current: of the synapse, laid out alike, or None.
    """

    parameters: Tensor
    modes: list[int]
    v: Tensor
    current: Tensor | None = None

    def structure(self) -> Neuron:
        """The C structure; it points into this object's tensors."""
        first, length = self.parameters.data_ptr(), 4 * self.parameters.shape[1]
        row = {name: first + i * length for i, name in enumerate(ROWS)}
        kind, timing, inclusive, synapse = self.modes
        return Neuron(
            *(row[name] for name in ROWS[:5]),
            self.v.data_ptr(),
            row["syn_decay"] if synapse else None,
            row["syn_gain"] if synapse else None,
            None if self.current is None else self.current.data_ptr(),
            kind,
            timing,
            inclusive,
            int(synapse == 2),
        )
