# SPDX-License-Identifier: Apache-2.0
"""Norse: cells (one step a call) and layers over time, parameters in a tuple ``p``.

``LIF``: the current jumps by the input, the membrane sees it undecayed, then it decays:
``v' = v + dt * tau_mem_inv * (v_leak - v + i + x)``, ``i' = (1 - dt * tau_syn_inv) * (i + x)``.
The caller carries the state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from spikenm_fx.trace.neurons.adapters.adapter import Adapter, is_own_class, scalar
from spikenm_fx.trace.neurons.spec import NeuronKind, NeuronSpec, Reset, Scalar, Surrogate, Synapse

__all__ = ["ADAPTER", "RECURRENT", "has_own_reset", "read"]

LIF, BOX, IAF = ("LIF", "LIFCell"), ("LIFBoxCell",), ("IAF", "IAFCell")
LI, LI_BOX = ("LI", "LICell"), ("LIBoxCell",)
RECURRENT = ("LIFRecurrent", "LIFRecurrentCell")
"""Their rule is that of ``LIF``; what they add to their input, their spec does not say."""


def read(module: nn.Module) -> NeuronSpec:
    """Read a Norse cell or layer."""
    m: Any = module
    name = type(module).__name__
    parameters = getattr(m, "p", None)
    mem = _rate(m, parameters, "tau_mem_inv")
    syn = _rate(m, parameters, "tau_syn_inv")
    rule = "LIF" if name in RECURRENT else name
    leaks = rule in (*LIF, *BOX, *LI, *LI_BOX)
    layer = any(cls.__name__ in ("SNN", "SNNRecurrent") for cls in type(module).__mro__)
    v_leak = scalar(getattr(parameters, "v_leak", None))
    reset, known_reset = _reset_kind(parameters)
    return NeuronSpec(
        framework="norse",
        class_name=name,
        kind=_kind(rule),
        exact=known_reset and is_own_class(module, "norse", *LIF, *BOX, *IAF, *LI, *LI_BOX),
        decay=1.0 - mem if leaks else 1.0,
        gain=mem if leaks else 1.0,
        rest=v_leak if leaks else 0.0,
        synapse=Synapse(1.0 - syn, 1.0 - syn, "undecayed") if rule in (*LIF, *LI) else None,
        threshold=scalar(getattr(parameters, "v_th", None), 1.0),
        strict=True,
        reset="none" if _kind(name) == "integrator" else reset,
        reset_value=scalar(getattr(parameters, "v_reset", None)),
        surrogate=_surrogate(parameters),
        output="analog" if _kind(name) == "integrator" else "spike",
        state=(),
        initial=v_leak if leaks else 0.0,
        time_axis=0 if layer else None,
        step_mode="multi" if layer else "single",
        returns_state=True,
        reset_call=None,
        learned=tuple(
            f"p.{field}" for field in getattr(parameters, "_fields", ()) if _is_learned(m, field)
        ),
    )


def has_own_reset(module: nn.Module) -> bool:
    """Whether a cell resets in one of Norse's own ways, and not in one that its user gave."""
    return _reset_kind(getattr(module, "p", None))[1]


def _rate(module: Any, parameters: Any, name: str) -> Scalar:
    value = getattr(parameters, name, None)
    return 0.0 if value is None else scalar(value * getattr(module, "dt", 1e-3))


def _kind(name: str) -> NeuronKind:
    if name in IAF:
        return "if"
    if name.startswith("LI") and not name.startswith("LIF"):
        return "integrator"
    return "synaptic" if name in LIF else "lif" if name in BOX else "other"


def _reset_kind(parameters: Any) -> tuple[Reset, bool]:
    """The reset, and whether it is one of Norse's own: only LIFBox lets the user choose it."""
    method = getattr(parameters, "reset_method", None)
    name = getattr(method, "__name__", "reset_value")
    return ("subtract" if name == "reset_subtract" else "hard"), name in (
        "reset_value",
        "reset_subtract",
    )


def _surrogate(parameters: Any) -> Surrogate | None:
    method = getattr(parameters, "method", None)
    if method is None:
        return None
    alpha = getattr(parameters, "alpha", 0.0)
    return Surrogate(str(method), {"alpha": float(alpha)}, _function(str(method), alpha))


def _function(method: str, alpha: Any) -> Callable[[Tensor], Tensor] | None:
    """Norse's own threshold function with the method filled in."""
    functions = sys.modules.get("norse.torch.functional.threshold")
    threshold = getattr(functions, "threshold", None)
    return None if threshold is None else partial(threshold, method=method, alpha=alpha)


def _is_learned(module: Any, field: str) -> bool:
    value = getattr(module.p, field, None)
    return isinstance(value, Tensor) and value.requires_grad


ADAPTER = Adapter(
    name="norse",
    bases=(
        "norse.torch.module.snn:SNNCell",
        "norse.torch.module.snn:SNN",
        "norse.torch.module.snn:SNNRecurrentCell",
        "norse.torch.module.snn:SNNRecurrent",
        "norse.torch.module.leaky_integrator:LICell",
        "norse.torch.module.leaky_integrator:LI",
        "norse.torch.module.leaky_integrator_box:LIBoxCell",
    ),
    read=read,
)
