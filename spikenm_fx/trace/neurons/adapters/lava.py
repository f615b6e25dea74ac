# SPDX-License-Identifier: Apache-2.0
"""lava-dl's slayer neurons: fixed-point CUBA-LIF, ``[N, C, ..., T]``, time last.

Their rule is exact in fixed point only (decays are 12-bit integers over 4096), so the spec is
informative and never ``exact``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from spikenm_fx.trace.neurons.adapters.adapter import Adapter, learned, scalar
from spikenm_fx.trace.neurons.spec import NeuronSpec, Scalar, Surrogate, Synapse

__all__ = ["ADAPTER"]


def read(module: nn.Module) -> NeuronSpec:
    """Read a lava-dl neuron."""
    m: Any = module
    current = _kept(m, "current_decay")
    graded = bool(getattr(m, "graded_spike", False))
    return NeuronSpec(
        framework="lava-dl",
        class_name=type(module).__name__,
        kind="synaptic",
        decay=_kept(m, "voltage_decay"),
        synapse=Synapse(current),
        threshold=scalar(getattr(m, "threshold", None), 1.0),
        reset="hard",
        surrogate=Surrogate(
            "slayer",
            {
                name: float(getattr(m, name))
                for name in ("tau_grad", "scale_grad")
                if isinstance(getattr(m, name, None), int | float)
            },
        ),
        output="analog" if graded else "spike",
        state=("voltage_state", "current_state"),
        time_axis=-1,
        step_mode="multi",
        reset_call=None,
        learned=learned(module, "current_decay", "voltage_decay"),
    )


def _kept(module: Any, name: str) -> Scalar:
    """Share that stays after a step: one minus the decay, which is stored times 4096."""
    value = getattr(module, name, None)
    if value is None:
        return 1.0
    scale = float(getattr(module, "p_scale", 1 << 12))
    return 1.0 - scalar(value) / scale


ADAPTER = Adapter(name="lava-dl", bases=("lava.lib.dl.slayer.neuron.base:Neuron",), read=read)
