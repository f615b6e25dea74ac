# SPDX-License-Identifier: Apache-2.0
"""SpikingJelly: activation_based (2.x and 0.0.0.0.14) and the older clock_driven.

Charge of ``LIFNode``: ``v + (x - (v - v_reset)) / tau``, or ``v - (v - v_reset) / tau + x`` with
``decay_input=False``.  ``ParametricLIFNode`` learns ``1 / tau = sigmoid(w)``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from spikenm_fx.trace.neurons.adapters.adapter import (
    Adapter,
    is_own_class,
    learned,
    scalar,
    sigmoid,
    surrogate_of,
)
from spikenm_fx.trace.neurons.spec import NeuronKind, NeuronSpec, Output, Scalar

__all__ = ["ADAPTER"]

IF = ("IFNode", "SimpleIFNode", "MultiStepIFNode")
LIF = ("LIFNode", "SimpleLIFNode", "MultiStepLIFNode")
PLIF = ("ParametricLIFNode", "MultiStepParametricLIFNode")
OTHERS = (
    *("psn:PSN", "psn:MaskedPSN", "psn:SlidingPSN", "lif_variants:GatedLIFNode"),
    *("dsr:DSRIFNode", "dsr:DSRLIFNode", "few_spike:FewSpikeNode", "spikezip:STBIFNode"),
    *("inter_layer_connection:ILCBaseNode", "noisy:NoisyBaseNode", "flexsn:FlexSN"),
    "integrate_and_fire:ActivationAwareIFNode",
)


def read(module: nn.Module) -> NeuronSpec:
    """Read a SpikingJelly neuron."""
    name = type(module).__name__
    legacy = type(module).__module__.startswith("spikingjelly.clock_driven")
    multi = (
        name.startswith("MultiStep")
        or getattr(module, "step_mode", "s") == "m"
        or name in ("PSN", "ILCIFNode", "ILCLIFNode", "ILCCUBALIFNode")
    )
    v_reset = getattr(module, "v_reset", None)
    surrogate = getattr(module, "surrogate_function", None)
    kind, leak = _leak(module)
    spiking = getattr(surrogate, "spiking", True) is True
    exact = is_own_class(module, "spikingjelly", *IF, *LIF, *PLIF) and spiking
    return NeuronSpec(
        framework="spikingjelly.clock_driven" if legacy else "spikingjelly",
        class_name=name,
        kind=kind,
        exact=exact,
        decay=1.0 - leak,
        gain=_gain(module, kind, leak),
        rest=scalar(v_reset),
        threshold=scalar(getattr(module, "v_threshold", None), 1.0),
        reset="subtract" if v_reset is None else "hard",
        reset_value=scalar(v_reset),
        detach_reset=bool(getattr(module, "detach_reset", False)),
        surrogate=surrogate_of(surrogate),
        output=_output(module, spiking),
        state=_state(module),
        initial=scalar(v_reset) if not name.startswith("Simple") else 0.0,
        time_axis=0 if multi else None,
        step_mode="multi" if multi else "single",
        learned=learned(module, "w", "v_threshold"),
    )


def _leak(module: nn.Module) -> tuple[NeuronKind, Scalar]:
    if "ParametricLIF" in type(module).__name__:
        return "plif", scalar(sigmoid(module.w))  # type: ignore[arg-type]
    tau: Any = getattr(module, "tau", None)
    leak = 1.0 / float(tau) if isinstance(tau, int | float) else 0.0
    if not _spikes(module):
        return "integrator", leak
    if is_own_class(module, "spikingjelly", *IF):
        return "if", 0.0
    return ("lif" if is_own_class(module, "spikingjelly", *LIF) else "other"), leak


def _gain(module: nn.Module, kind: NeuronKind, leak: Scalar) -> Scalar:
    if kind in ("lif", "plif") or (kind == "integrator" and hasattr(module, "tau")):
        return leak if getattr(module, "decay_input", True) else 1.0
    return 1.0


def _spikes(module: nn.Module) -> bool:
    return "NonSpiking" not in type(module).__name__


def _output(module: nn.Module, spiking: bool) -> Output:
    name = type(module).__name__
    if not _spikes(module) or not spiking or "LIAF" in name:
        return "analog"
    return "integer" if name in ("ILIFNode", "TernaryIFNode", "TernaryLIFNode") else "spike"


def _state(module: nn.Module) -> tuple[str, ...]:
    memories = vars(module).get("_memories")
    return tuple(memories) if isinstance(memories, dict) and memories else ("v",)


ADAPTER = Adapter(
    name="spikingjelly",
    bases=(
        "spikingjelly.activation_based.neuron.base_node:BaseNode",
        "spikingjelly.activation_based.neuron.base_node:SimpleBaseNode",
        "spikingjelly.activation_based.neuron.base_node:NonSpikingBaseNode",
        "spikingjelly.activation_based.neuron:BaseNode",
        # neurons of their own kind, each in its file
        *(f"spikingjelly.activation_based.neuron.{name}" for name in OTHERS),
        "spikingjelly.clock_driven.neuron:BaseNode",
    ),
    read=read,
)
