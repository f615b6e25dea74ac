# SPDX-License-Identifier: Apache-2.0
"""rockpool's torch LIF: ``[N, T, C]``, several spikes a step, returns ``(out, state, record)``.

``i' = beta * (i + x)``, ``v' = alpha * v + sum(i') + bias``, ``floor(v / threshold)`` spikes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spikenm_fx.trace.neurons.adapters.adapter import (
    Adapter,
    is_own_class,
    learned,
    scalar,
    surrogate_of,
)
from spikenm_fx.trace.neurons.spec import NeuronSpec, Synapse

__all__ = ["ADAPTER"]


def read(module: nn.Module) -> NeuronSpec:
    """Read a rockpool LIF module."""
    m: Any = module
    decays = m._get_all_leak_params() if hasattr(m, "_get_all_leak_params") else {}
    beta = decays.get("beta")
    synapse = scalar(beta.squeeze(-1) if isinstance(beta, torch.Tensor) and beta.dim() else beta)
    one_synapse = int(getattr(m, "n_synapses", 1)) == 1
    quiet = float(scalar(getattr(m, "noise_std", 0.0))) == 0.0
    capped = float(scalar(getattr(m, "max_spikes_per_dt", None), 2.0**16))
    return NeuronSpec(
        framework="rockpool",
        class_name=type(module).__name__,
        kind="synaptic",
        exact=is_own_class(module, "rockpool", "LIFTorch")
        and one_synapse
        and quiet
        # without recurrence w_rec is there, but zero and no parameter
        and not isinstance(getattr(m, "w_rec", None), nn.Parameter)
        and capped > 1.0,
        decay=scalar(decays.get("alpha"), 1.0),
        bias=scalar(getattr(m, "bias", None)),
        synapse=Synapse(synapse, synapse),
        threshold=scalar(getattr(m, "threshold", None), 1.0),
        reset="subtract",
        surrogate=surrogate_of(getattr(m, "spike_generation_fn", None)),
        output="spike" if capped == 1.0 else "integer",
        state=("vmem", "isyn", "spikes"),
        time_axis=1,
        step_mode="multi",
        returns_state=True,
        reset_call="reset_state",
        learned=learned(module, "alpha", "beta", "tau_mem", "tau_syn", "threshold", "bias"),
    )


ADAPTER = Adapter(
    name="rockpool",
    bases=("rockpool.nn.modules.torch.lif_torch:LIFBaseTorch",),
    read=read,
)
