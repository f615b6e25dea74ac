# SPDX-License-Identifier: Apache-2.0
"""Why a layer stays torch's or a neuron keeps its own forward, and what its user can do."""

from __future__ import annotations

from torch import nn

from spikenm_fx import surgery
from spikenm_fx.pack.eligible import hooked, why_not_packable
from spikenm_fx.pack.engine.fused import why_not_fused
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.products import PackedProducts
from spikenm_fx.trace.graph import LayerRecord, NeuronRecord

__all__ = ["why_layer_kept", "why_neuron_kept"]

_SHARED = ("forward", "weight", "bias", "name", "train", "extra_repr")
"""Names that a packed layer and the user's class may both have."""


def why_layer_kept(layer: nn.Module, record: LayerRecord | None) -> str:
    """Why this layer is not packed in place, as a sentence with a way out; "" if it can be."""
    reason = why_not_packable(layer, record)
    if reason:
        return reason
    clash = _clash(layer)
    if clash:
        return (
            f"Its class {surgery.plain_class(layer).__name__} has a {clash!r} of its own, a name "
            "that packed layers use; rename it to pack the layer."
        )
    reason = surgery.why_not_extended(layer, PackedLayer, leading=True)
    return f"It stays torch's: {reason}; derive it from nn.Module to pack it." if reason else ""


def _clash(layer: nn.Module) -> str:
    """A name that both the user's class and packed layers give a meaning."""
    taken = {*vars(PackedLayer), *vars(PackedProducts), "values", "indices", "nm", "meter", "waits"}
    taken |= {"choice", "geometry", "scale", "weight_shape"}
    taken = {n for n in taken if not n.startswith("__") and n not in _SHARED}
    return next((n for n in sorted(taken) if hasattr(layer, n) and not hasattr(nn.Module, n)), "")


def why_neuron_kept(module: nn.Module | None, record: NeuronRecord, *, state_read: bool) -> str:
    """Why a neuron keeps its own forward, as a sentence with a way out; "" if it is fused."""
    if record.functional or module is None:
        return (
            "It is code in a forward, not a module, and runs as it is; put it into a module that "
            "spikenm_fx.trace knows, or describe that with register_neuron, to fuse it."
        )
    reason = why_not_fused(module, record.spec, state_read=state_read)
    if hooked(module) or "forward" in vars(module):
        reason = "hooks or a forward set on the instance see what it takes and gives"
    if not reason:
        return ""
    return f"It keeps its own forward: {reason}; {_way_out(reason)}."


def _way_out(reason: str) -> str:
    for part, advice in (
        ("not fully known", "describe it with spikenm_fx.trace.register_neuron(cls, read=...)"),
        ("not spikes", "nothing is to be done where this is the readout"),
        ("hard reset", "use reset_mechanism='subtract' or reset_delay=True"),
        ("first axis", "give it its input time first, [T, N, ...]"),
        ("reads the state", "let the model ignore the returned state"),
        ("carries its state", "let the neuron keep its state (init_hidden, step_mode='m')"),
        ("synaptic current", "use the form that takes all time steps in one call"),
        ("where it keeps", "name its state in the spec given to register_neuron"),
        ("hooks", "remove them from the model before packing"),
    ):
        if part in reason:
            return advice
    return "derive the neuron from nn.Module alone"
