# SPDX-License-Identifier: Apache-2.0
"""Neurons in NIR's numbers, so that a reader steps exactly as the model does.

NIR says ``tau dv/dt = (v_leak - v) + r I``.  One Euler step of length dt is::

    v + dt / tau * (v_leak - v + r I)    =    decay * (v - rest) + rest + gain * I

with ``tau = dt / (1 - decay)``, ``v_leak = rest`` and ``r = gain * tau / dt``.  Not every reader
reads r: then ``r = 1`` is written, and weights and biases are multiplied with ``gain * tau / dt``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikenm_fx.errors import ExportError
from spikenm_fx.export.nir_readers import DT, Reader
from spikenm_fx.export.parts import Part
from spikenm_fx.trace import NeuronSpec

__all__ = ["NeuronNode", "neuron_node"]

_NO_LEAK = 2.0**30
"""Steps of a time constant that float32 cannot tell from infinity: its decay is exactly 1."""


@dataclass(frozen=True, slots=True, eq=False)
class NeuronNode:
    """One neuron layer as a NIR node.

    Attributes:
        kind: of the node: ``"LIF"``, ``"IF"``, ``"LI"`` or ``"I"``.
        numbers: its arrays by their names.
        factor: what weights and biases before it are multiplied with, of its shape or one number.
    """

    kind: str
    numbers: dict[str, Any]
    factor: Any


def neuron_node(part: Part, reader: Reader) -> NeuronNode:
    """The node of a neuron for one reader.

    Raises:
        ExportError: for what NIR or this reader cannot say, by its name.
    """
    spec = part.spec
    assert spec is not None
    _refuse(part, spec, reader)
    values = {
        "decay": _full(spec.decay, part),
        "gain": _full(spec.gain, part),
        "rest": _full(spec.rest, part),
        "threshold": _full(spec.threshold, part),
        "reset value": _full(0.0 if spec.kind == "integrator" else spec.reset_value, part),
    }
    for name in reader.uniform:
        if np.unique(values[name]).size > 1:
            raise ExportError(
                f"{_named(part)}: its {name} differs between neurons, and {reader.name} reads one "
                f"{name} for a layer; target='file' keeps them apart"
            )
    leaks = bool((values["decay"] != 1.0).any())
    if leaks and bool((values["decay"] >= 1.0).any()):
        raise ExportError(
            f"{_named(part)}: some of its neurons leak and others do not, NIR has a node for each "
            "kind; give all of them a decay below 1"
        )
    _refuse_values(part, values, reader, leaks)
    if spec.kind == "integrator":
        return _integrator(values, reader, leaks)
    return _spiking(part, spec, values, reader, leaks)


def _spiking(
    part: Part, spec: NeuronSpec, values: dict[str, Any], reader: Reader, leaks: bool
) -> NeuronNode:
    threshold = values["threshold"].astype(np.float32)
    if spec.strict != reader.strict and not reader.counts:
        # v > a is v >= the next larger number, v >= a is v > the next smaller one
        threshold = np.nextafter(threshold, np.float32(math.inf if spec.strict else -math.inf))
    reset = values["reset value"]
    if not leaks and "IF" in reader.nodes:
        r = 1.0 if reader.name == "norse" else 1.0 / DT
        numbers = {"r": np.full(part.shape, r), "v_threshold": threshold, "v_reset": reset}
        return NeuronNode("IF", _float32(numbers), values["gain"])
    steps = _steps(part, values["decay"], reader)
    r, factor = _resistance(values["gain"], steps, reader)
    numbers = {
        "tau": steps if reader.counts else steps * DT,
        "r": r,
        "v_leak": values["rest"] if leaks else np.zeros(part.shape),
        "v_threshold": threshold,
        "v_reset": reset,
    }
    if reader.counts:
        numbers = {key: _for_sinabs(part, value) for key, value in numbers.items()}
    return NeuronNode("LIF", _float32(numbers), factor)


def _integrator(values: dict[str, Any], reader: Reader, leaks: bool) -> NeuronNode:
    if not leaks:
        return NeuronNode(
            "I", _float32({"r": np.full_like(values["gain"], 1 / DT)}), values["gain"]
        )
    if reader.counts:
        steps, factor = -1.0 / np.log(values["decay"]), values["gain"]
    else:
        steps = 1.0 / (1.0 - values["decay"])
        factor = values["gain"] * steps
    numbers = {
        "tau": steps if reader.counts else steps * DT,
        "r": np.ones_like(steps),
        "v_leak": values["rest"],
    }
    return NeuronNode("LI", _float32(numbers), factor)


def _steps(part: Part, decay: Any, reader: Reader) -> Any:
    """The time constant in steps: of an Euler step, or of sinabs' exponential one."""
    if bool((decay == 1.0).all()):
        return np.full(part.shape, _NO_LEAK)
    if not reader.counts:
        return 1.0 / (1.0 - decay)
    own = getattr(part.module, "tau_mem", None)  # sinabs' own number, before it was rounded
    if isinstance(own, Tensor) and part.spec is not None and part.spec.framework == "sinabs":
        return _full(own, part)
    return -1.0 / np.log(decay)


def _resistance(gain: Any, steps: Any, reader: Reader) -> tuple[Any, Any]:
    """What is written as r, and what the weights are multiplied with instead."""
    if reader.counts:
        return np.ones_like(steps), gain
    full = gain * steps
    if reader.name == "snntorch" or (reader.name == "spikingjelly" and np.allclose(gain, 1.0)):
        return full, np.ones_like(steps)
    near = np.allclose(full, 1.0, rtol=1e-6, atol=0.0)
    return np.ones_like(steps), np.ones_like(steps) if near else full


def _refuse(part: Part, spec: NeuronSpec, reader: Reader) -> None:
    name = _named(part)
    if not spec.exact:
        raise ExportError(
            f"{name}: its update rule is not fully known, so that nobody can tell whether "
            f"{reader.name} computes the same; tell it with spikenm_fx.trace.register_neuron"
        )
    if spec.floor is not None:
        raise ExportError(
            f"{name} keeps its membrane from falling below {spec.floor:g}, which NIR cannot say; "
            "make it with min_v_mem=None"
        )
    if spec.synapse is not None:
        raise ExportError(
            f"{name} filters its input by a synapse ({spec.synapse.drives} current drives the "
            "membrane), for which no two readers of CubaLIF agree; use a neuron without synapse"
        )
    if spec.kind == "integrator":
        return
    if spec.reset == "none":
        raise ExportError(f"{name} is never reset (reset_mechanism 'none'), which NIR cannot say")
    soft = spec.reset == "subtract"
    if reader.counts:
        amount = spec.reset_amount
        own = amount is None or bool(torch.as_tensor(amount == spec.threshold).all())
        if spec.output != "integer" or not soft or not own:
            raise ExportError(
                f"{name}: sinabs reads every LIF node as one that emits several spikes a step and "
                f"is reset by subtraction of its threshold; this one emits {spec.output} and its "
                f"reset is {spec.reset!r}: use another target"
            )
        return
    if spec.output != "spike":
        raise ExportError(
            f"{name} emits {spec.output} values, NIR's neurons one spike a step at most; use "
            "single spikes (sinabs: spike_fn=SingleSpike), or target='sinabs' for several"
        )
    if soft:
        late = f" and reset delay ({spec.reset_timing})" if spec.reset_timing != "now" else ""
        raise ExportError(
            f"{name} has a soft reset (subtract){late}; NIR resets to a value at once: use a hard "
            "reset (snnTorch reset_mechanism='zero', SpikingJelly v_reset=0.)"
        )


def _refuse_values(part: Part, values: dict[str, Any], reader: Reader, leaks: bool) -> None:
    spec, name = part.spec, _named(part)
    assert spec is not None
    start = _full(spec.initial, part)
    at = values["reset value"] if reader.reset else np.zeros(part.shape)
    if spec.kind != "integrator" and bool((start != at).any()):
        raise ExportError(
            f"{name} starts at {np.unique(start)[0]:g}, and {reader.name} at {np.unique(at)[0]:g}; "
            "NIR has no initial membrane"
        )
    moved = bool(values["reset value"].any()) or (leaks and bool(values["rest"].any()))
    if moved and not reader.reset:
        raise ExportError(
            f"{name} is reset to or leaks towards another value than 0, which {reader.name} does "
            "not read; use v_reset=0"
        )
    if reader.name == "spikingjelly" and leaks:
        if bool((values["rest"] != values["reset value"]).any()):
            raise ExportError(f"{name}: SpikingJelly wants v_leak and v_reset to be the same")
        if bool((values["decay"] <= 0.0).any()):
            raise ExportError(f"{name}: SpikingJelly wants tau above one step, decay above 0")
    if bool((values["reset value"] > values["threshold"]).any()):
        raise ExportError(f"{name} is reset to a value above its threshold, where it fires again")
    if bool(torch.as_tensor(spec.bias != 0.0).any()):
        raise ExportError(
            f"{name} has a constant current of its own; move it into the bias of the layer before"
        )


def _full(value: Any, part: Part) -> Any:
    """A float64 array of the neuron's full shape."""
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, np.float64)
    try:
        return np.array(np.broadcast_to(array, part.shape))
    except ValueError as error:
        raise ExportError(
            f"{_named(part)}: a parameter of shape {array.shape} does not fit {part.shape} neurons"
        ) from error


def _for_sinabs(part: Part, value: Any) -> Any:
    """Of more than one axis it cannot test a v_leak: one number then stands for the layer."""
    if len(part.shape) == 1:
        return value
    if np.unique(value).size > 1:
        raise ExportError(
            f"{_named(part)}: its neurons differ, and sinabs reads one number for a layer over "
            f"{part.shape}"
        )
    return np.reshape(value, -1)[:1]


def _float32(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in numbers.items()}


def _named(part: Part) -> str:
    spec = part.spec
    return f"{part.name} ({spec.class_name if spec else 'neuron'})"
