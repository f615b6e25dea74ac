# SPDX-License-Identifier: Apache-2.0
"""What one neuron layer computes, in one vocabulary for every framework.

The update of a time step, with input ``x``, membrane ``v``, synaptic current ``i``:

.. code-block:: text

    drive    = x                                        without a synapse
    i', drive = see Synapse                             with one
    h        = decay * (v - rest) + rest + gain * drive + bias
    s        = 1 where h > threshold (strict) or h >= threshold, else 0
    v'       = h - s * amount                           reset "subtract"
             = (1 - s) * h + s * reset_value            reset "hard"
             = h                                        reset "none"

With ``reset_timing="next"`` the reset of a step is carried out in the one after it (snnTorch's
``reset_delay``): ``v'`` is ``h``; the next step takes the spikes anew from ``v``, and "hard" resets
``v`` before it decays while "subtract" lowers ``h`` after.  ``"corrected"`` (``reset_delay=False``)
does the same to decide the spikes and then moves the reset into the step of the spike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["NeuronSpec", "Scalar", "State", "Surrogate", "Synapse", "membranes", "simulate"]

Scalar: TypeAlias = float | Tensor
"""One value for the whole layer, or one per channel (a detached tensor)."""

NeuronKind = Literal["if", "lif", "plif", "synaptic", "integrator", "other"]
Output = Literal["spike", "integer", "scaled", "analog"]
Reset = Literal["hard", "subtract", "none"]
ResetTiming = Literal["now", "next", "corrected"]


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """The derivative that training uses for the step function.

    Attributes:
        name: the framework's class or function name, e.g. ``"ATan"``, ``"Sigmoid"``, ``"super"``.
        parameters: its numbers by their names, e.g. ``{"alpha": 2.0}``.
        function: the framework's own callable ``h - threshold -> spike``, where there is one.
    """

    name: str
    parameters: dict[str, float] = field(default_factory=dict)
    function: object | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Synapse:
    """An exponential synapse before the membrane: ``i' = decay * i + gain * x``.

    Attributes:
        decay: share of the current that stays after one step.
        gain: factor on the input.
        drives: what the membrane sees in this step: the ``"new"`` current ``i'``, or the current
            ``i + x`` ``"undecayed"`` (Norse).
    """

    decay: Scalar
    gain: Scalar = 1.0
    drives: Literal["new", "undecayed"] = "new"


@dataclass(frozen=True, slots=True, eq=False)
class NeuronSpec:
    """The update rule and the calling convention of one neuron layer.

    Attributes:
        framework: ``"spikingjelly"``, ``"snntorch"``, ..., or ``"unknown"`` where the neuron was
            found by its structure.
        class_name: the class of the module.
        kind: the family of models; ``"integrator"`` never spikes.
        exact: True where this record alone reproduces the forward pass (see :func:`simulate`);
            only then may a kernel replace the module.
        decay: factor on the membrane in one step (1 for integrate-and-fire).
        gain: factor on the drive (``1/tau`` where the input decays as well).
        rest: potential the membrane leaks towards.
        bias: constant current.
        synapse: the synaptic filter, if the model has one.
        threshold: firing threshold.
        strict: True where a spike needs ``h > threshold``; False for ``>=``.
        reset: what a spike does to the membrane.
        reset_value: the value of a ``"hard"`` reset.
        reset_timing: ``"now"``, in the step of the spike; ``"next"``, in the one after;
            ``"corrected"``, see the module's head.
        reset_amount: what a ``"subtract"`` reset takes off; None for the threshold.
        floor: the membrane is raised to it after the reset; None where it may fall without end.
        detach_reset: True where no gradient flows through the reset.
        surrogate: derivative used in training.
        output: the values it emits: ``"spike"`` {0,1}, ``"integer"`` levels, spikes times a
            known number ``"scaled"``, ``"analog"``.
        state: attributes of the module that hold its state, the membrane first; empty where the
            caller carries the state.
        initial: membrane before the first step.
        time_axis: axis of the input along which the module itself steps through time; None where
            one call is one step.
        folded_time: True where time and batch share axis 0 (sinabs' Squeeze layers); the outer one
            of both is time where ``time_axis`` is 0, and the batch where that is 1.
        folded_batch: how many samples share that axis, where the module says so.
        folded_steps: how many time steps do, where it says that instead.
        step_mode: ``"single"`` (one step a call) or ``"multi"``.
        returns_state: True where it returns ``(spikes, state, ...)`` instead of the spikes alone.
        reset_call: name of the method that forgets the state, or None.
        learned: names of the parameters among these values: read the spec again after a step.
    """

    framework: str
    class_name: str
    kind: NeuronKind = "other"
    exact: bool = False
    decay: Scalar = 1.0
    gain: Scalar = 1.0
    rest: Scalar = 0.0
    bias: Scalar = 0.0
    synapse: Synapse | None = None
    threshold: Scalar = 1.0
    strict: bool = False
    reset: Reset = "hard"
    reset_value: Scalar = 0.0
    reset_timing: ResetTiming = "now"
    reset_amount: Scalar | None = None
    floor: float | None = None
    detach_reset: bool = False
    surrogate: Surrogate | None = None
    output: Output = "spike"
    state: tuple[str, ...] = ("v",)
    initial: Scalar = 0.0
    time_axis: int | None = None
    folded_time: bool = False
    folded_batch: int | None = None
    folded_steps: int | None = None
    step_mode: Literal["single", "multi"] = "single"
    returns_state: bool = False
    reset_call: str | None = "reset"
    learned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Membrane and synaptic current between two steps of :func:`simulate`."""

    v: Tensor
    i: Tensor


def simulate(spec: NeuronSpec, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Run the rule of an exact ``spec`` in plain torch: the oracle for kernels and adapters.

    Args:
        spec: a spec with ``exact=True``.
        inputs: ``[T, N, *]``, time first whatever the framework's own layout.
        state: state to go on from; the initial one by default.

    Returns:
        The spikes ``[T, N, *]`` (the membrane for an integrator) and the state after step T.

    Raises:
        ValueError: if the spec is not exact.
    """
    state = state or _start(spec, inputs)
    outputs = []
    for x in inputs:
        out, state = _step(spec, x, state)
        outputs.append(out)
    return torch.stack(outputs), state


def membranes(spec: NeuronSpec, inputs: Tensor, state: State | None = None) -> Tensor:
    """The potential h of every step, before the spike and its reset, by the rule of ``spec``.

    Args:
        spec: a spec with ``exact=True``.
        inputs: ``[T, N, *]``, time first.
        state: as in :func:`simulate`.

    Returns:
        ``[T, N, *]``: what is compared with the threshold.

    Raises:
        ValueError: if the spec is not exact.
    """
    state = state or _start(spec, inputs)
    potentials = []
    for x in inputs:
        h, i, late = _charge(spec, x, state)
        potentials.append(h)
        state = _discharge(spec, h, i, late)[1]
    return torch.stack(potentials)


def _start(spec: NeuronSpec, inputs: Tensor) -> State:
    if not spec.exact:
        raise ValueError(
            f"{spec.framework} {spec.class_name}: its spec does not tell the whole update rule "
            "(exact=False); run the module itself"
        )
    zero = torch.zeros_like(inputs[0])
    return State(zero + spec.initial, zero)


def _step(spec: NeuronSpec, x: Tensor, state: State) -> tuple[Tensor, State]:
    return _discharge(spec, *_charge(spec, x, state))


def _charge(spec: NeuronSpec, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
    """The potential h, the synaptic current, and the spikes whose reset was still due."""
    drive, i = _drive(spec.synapse, x, state.i)
    late = None if spec.reset_timing == "now" else _fires(spec, state.v)
    v = state.v
    if late is not None and spec.reset == "hard":
        v = _reset(spec, v, late)
    h = spec.decay * (v - spec.rest) + spec.rest + spec.gain * drive + spec.bias
    if late is not None and spec.reset == "subtract":
        h = _reset(spec, h, late)
    return h, i, late


def _discharge(spec: NeuronSpec, h: Tensor, i: Tensor, late: Tensor | None) -> tuple[Tensor, State]:
    if spec.kind == "integrator":
        return h, State(_raised(spec, h), i)
    spikes = _fires(spec, h)
    if late is None:
        h = _reset(spec, h, spikes)
    elif spec.reset_timing == "corrected":
        h = _reset(spec, h, spikes - late)
    return spikes, State(_raised(spec, h), i)


def _raised(spec: NeuronSpec, h: Tensor) -> Tensor:
    return h if spec.floor is None else torch.relu(h - spec.floor) + spec.floor  # as sinabs rounds


def _drive(synapse: Synapse | None, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    if synapse is None:
        return x, i
    new = synapse.decay * i + synapse.gain * x
    return (new if synapse.drives == "new" else i + x), new


def _fires(spec: NeuronSpec, h: Tensor) -> Tensor:
    if spec.output == "integer":
        return torch.div(h, spec.threshold, rounding_mode="trunc").clamp_min(0.0)
    above = h > spec.threshold if spec.strict else h >= spec.threshold
    return above.to(h.dtype)


def _amount(spec: NeuronSpec) -> Scalar:
    return spec.threshold if spec.reset_amount is None else spec.reset_amount


def _reset(spec: NeuronSpec, h: Tensor, spikes: Tensor) -> Tensor:
    if spec.reset == "hard":
        return (1.0 - spikes) * h + spikes * spec.reset_value
    return h - spikes * _amount(spec) if spec.reset == "subtract" else h
