# SPDX-License-Identifier: Apache-2.0
"""snnTorch: ``Leaky``, ``Synaptic`` and their relatives.

``mem' = clamp(beta) * mem + x``; the reset of a step happens in the next one by default
(``reset_delay=True``), taken anew from the membrane.  The default time layout is one step a call.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from spikenm_fx.trace.neurons.adapters.adapter import (
    Adapter,
    is_own_class,
    learned,
    scalar,
    surrogate_of,
)
from spikenm_fx.trace.neurons.spec import NeuronKind, NeuronSpec, Reset, Scalar, Synapse

__all__ = ["ADAPTER", "decay_of"]

RESETS: dict[str, Reset] = {"subtract": "subtract", "zero": "hard", "none": "none"}
STATES = ("mem", "syn", "syn_exc", "syn_inh", "spk", "b")
KINDS: dict[str, NeuronKind] = {"Leaky": "lif", "Synaptic": "synaptic"}


def read(module: nn.Module) -> NeuronSpec:
    """Read a snnTorch neuron."""
    m: Any = module
    name = type(module).__name__
    reset = RESETS.get(getattr(m, "reset_mechanism", "subtract"), "subtract")
    hidden = bool(getattr(m, "init_hidden", False))
    return NeuronSpec(
        framework="snntorch",
        class_name=name,
        kind=KINDS.get(name, "other"),
        exact=_exact(m, reset),
        decay=decay_of(m, "beta"),
        synapse=Synapse(decay_of(m, "alpha")) if name == "Synaptic" else None,
        threshold=scalar(getattr(m, "threshold", None), 1.0),
        strict=True,
        reset=reset,
        reset_timing="next" if getattr(m, "reset_delay", True) else "corrected",
        detach_reset=True,
        surrogate=surrogate_of(getattr(m, "spike_grad", None)),
        output="spike" if _unit_spikes(m) else "analog",
        state=tuple(s for s in STATES if hasattr(m, s)),
        returns_state=not hidden or bool(getattr(m, "output", False)),
        time_axis=0 if name in ("LeakyParallel", "StateLeaky", "AssociativeLeaky") else None,
        step_mode="multi" if name in ("LeakyParallel", "StateLeaky") else "single",
        reset_call="reset_mem" if hasattr(m, "reset_mem") else None,
        learned=learned(module, "beta", "alpha", "threshold", "graded_spikes_factor"),
    )


def decay_of(module: Any, name: str) -> Scalar:
    """The decay that a module keeps as ``name``, within [0, 1]."""
    value = getattr(module, name, None)
    if value is None:
        return 1.0
    return scalar(value.detach().clamp(0, 1) if hasattr(value, "clamp") else min(max(value, 0), 1))


def _unit_spikes(module: Any) -> bool:
    factor = scalar(getattr(module, "graded_spikes_factor", None), 1.0)
    return isinstance(factor, float) and factor == 1.0


def _exact(module: Any, reset: Reset) -> bool:
    plain = not module.inhibition and not module.state_quant and _unit_spikes(module)
    if is_own_class(module, "snntorch", "Leaky"):
        return plain
    # Synaptic's reset to zero clears its current as well, which no field here says.
    return plain and is_own_class(module, "snntorch", "Synaptic") and reset != "hard"


ADAPTER = Adapter(name="snntorch", bases=("snntorch._neurons.neurons:SpikingNeuron",), read=read)
