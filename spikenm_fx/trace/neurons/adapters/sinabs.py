# SPDX-License-Identifier: Apache-2.0
"""sinabs: ``LIF`` and ``IAF``, their Squeeze variants, ``[N, T, *]`` inside.

``v' = alpha * v + (1 - alpha) * x`` (``norm_input=False``: ``+ x``), ``alpha = exp(-1 / tau_mem)``;
with ``tau_syn``, ``i' = alpha_syn * (i + x)`` comes before.  ``MultiSpike``, the default, emits
``trunc(v / threshold)`` spikes.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from spikenm_fx.trace.neurons.adapters.adapter import (
    Adapter,
    is_own_class,
    learned,
    numbers,
    scalar,
)
from spikenm_fx.trace.neurons.spec import NeuronKind, NeuronSpec, Output, Surrogate, Synapse

__all__ = ["ADAPTER", "RECURRENT", "has_known_rule", "read"]

OWN = ("LIF", "LIFSqueeze", "IAF", "IAFSqueeze", "ExpLeak", "ExpLeakSqueeze")
RECURRENT = ("LIFRecurrent", "IAFRecurrent")


def read(module: nn.Module) -> NeuronSpec:
    """Read a sinabs stateful layer."""
    m: Any = module
    name = type(module).__name__
    mem = scalar(getattr(m, "alpha_mem_calculated", None), 1.0)
    syn = getattr(m, "alpha_syn_calculated", None)
    output = _output(m)
    reset = getattr(m, "reset_fn", None)
    hard = type(reset).__name__ == "MembraneReset"
    floor = getattr(m, "min_v_mem", None)
    amount = getattr(reset, "subtract_value", None)
    return NeuronSpec(
        framework="sinabs",
        class_name=name,
        kind=_kind(name, syn is not None),
        exact=is_own_class(module, "sinabs", *OWN) and has_known_rule(module),
        decay=mem,
        gain=1.0 - mem if getattr(m, "norm_input", False) else 1.0,
        synapse=None if syn is None else Synapse(scalar(syn), scalar(syn)),
        threshold=scalar(getattr(m, "spike_threshold", None), 1.0),
        reset="none" if output == "analog" else "hard" if hard else "subtract",
        reset_amount=None if amount is None else scalar(amount),
        floor=None if floor is None or float(floor) == -math.inf else float(floor),
        surrogate=_surrogate(getattr(m, "surrogate_grad_fn", None)),
        output=output,
        state=tuple(name for name, _ in m.named_buffers(recurse=False)),
        time_axis=1,
        folded_time="Squeeze" in name,
        folded_batch=_positive(m, "batch_size"),
        folded_steps=_positive(m, "num_timesteps"),
        step_mode="multi",
        reset_call="reset_states",
        learned=learned(module, "tau_mem", "tau_syn", "alpha_mem", "alpha_syn"),
    )


def has_known_rule(module: nn.Module) -> bool:
    """Whether one of sinabs' own layers computes what its spec says, feedback left aside.

    Args:
        module: a layer that leaks, or integrates.
    """
    m: Any = module
    reset = getattr(m, "reset_fn", None)
    hard = type(reset).__name__ == "MembraneReset"
    return (
        (_output(m) != "integer" or isinstance(getattr(m, "spike_fn", None), type))
        # MembraneReset adds its value to every neuron, spiking or not: only 0 is a reset
        and (not hard or getattr(reset, "reset_value", 0.0) == 0.0)
    )


def _positive(module: Any, name: str) -> int | None:
    value = getattr(module, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _kind(name: str, synaptic: bool) -> NeuronKind:
    if "ExpLeak" in name:
        return "integrator"
    if synaptic:
        return "synaptic"
    return "if" if name.startswith("IAF") else "lif" if name.startswith("LIF") else "other"


def _output(module: Any) -> Output:
    spike = getattr(module, "spike_fn", None)
    if spike is None:
        return "analog"
    single = getattr(spike, "__name__", "") == "SingleSpike"
    return "spike" if single or getattr(spike, "max_num_spikes_per_bin", None) == 1 else "integer"


def _surrogate(function: object) -> Surrogate | None:
    return Surrogate(type(function).__name__, numbers(function), function) if function else None


ADAPTER = Adapter(name="sinabs", bases=("sinabs.layers.stateful_layer:StatefulLayer",), read=read)
