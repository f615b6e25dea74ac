# SPDX-License-Identifier: Apache-2.0
"""BrainCog: nodes that integrate ``mem`` and zero it where they fired.

``layer_by_layer`` folds time into the batch axis, time first.
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
from spikenm_fx.trace.neurons.spec import NeuronKind, NeuronSpec, Scalar

__all__ = ["ADAPTER"]

KINDS: dict[str, NeuronKind] = {"IFNode": "if", "LIFNode": "lif", "PLIFNode": "plif"}
ANALOG = ("ReLUNode", "BiasReLUNode", "LIAFNode", "BurstLIFNode")
BOTH_SIGNS = ("DoubleSidePLIFNode",)


def read(module: nn.Module) -> NeuronSpec:
    """Read a BrainCog node."""
    m: Any = module
    name = type(module).__name__
    leak = _leak(m)
    kind = KINDS.get(name, "other") if is_own_class(module, "braincog", *KINDS) else "other"
    dt = 1.0 if kind == "lif" else float(m.dt)  # LIFNode ignores dt
    folded = bool(m.layer_by_layer) and m.groups == 1
    surrogate = surrogate_of(getattr(m, "act_fun", None))
    return NeuronSpec(
        framework="braincog",
        class_name=name,
        kind=kind,
        # surrogates other than a plain step (BackEIGate, RoundGrad) emit other values
        exact=kind != "other" and m.groups == 1,
        decay=1.0 - leak * dt,
        gain=dt if kind == "if" else leak * dt,
        threshold=_threshold(m, kind),
        detach_reset=True,
        surrogate=surrogate,
        output="analog" if name in ANALOG else "integer" if name in BOTH_SIGNS else "spike",
        state=("mem", "spike"),
        time_axis=0 if folded or m.groups != 1 else None,
        folded_time=folded,
        step_mode="multi" if folded else "single",
        reset_call="n_reset",
        learned=learned(module, "w", "threshold"),
    )


def _leak(module: Any) -> Scalar:
    if hasattr(module, "w") and isinstance(module.w, nn.Parameter):
        return scalar(sigmoid(module.w))
    return 1.0 / scalar(module.tau) if hasattr(module, "tau") else 0.0


def _threshold(module: Any, kind: NeuronKind) -> Scalar:
    value = module.threshold.detach()
    return scalar(sigmoid(value) if module.sigmoid_thres and kind != "lif" else value)


ADAPTER = Adapter(name="braincog", bases=("braincog.base.node.node:BaseNode",), read=read)
