# SPDX-License-Identifier: Apache-2.0
"""Functions of each number by itself, thresholds and choices, and softmax along one axis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spikenm_fx.program.calls import Call, Function, Lowered
from spikenm_fx.program.code import POINTWISE, Code
from spikenm_fx.program.draft import Ref
from spikenm_fx.program.joins import joined, scaled
from spikenm_fx.program.products import per_number
from spikenm_fx.program.strided import distances
from spikenm_fx.program.tokens import outside

__all__ = ["POINTWISE_FUNCTIONS", "softmax"]


def _relu(call: Call) -> Ref:
    ref = call.ref()
    if ref.value.bits:
        return ref
    made = call.draft.apply(Code.RELU, ref.value.layout, ref)
    return replace(ref, value=made, step=call.draft.step_of(call.where, ref))


def _pointwise(name: str) -> Function:
    """An operation on each number by itself, in floats."""

    def lowered(call: Call) -> Ref:
        ref = call.ref()
        which = f"gelu_{call.kwargs['approximate']}" if call.kwargs.get("approximate") else name
        which = which.replace("gelu_none", "gelu")
        if which not in POINTWISE or ref.value.layout.channels is None:
            raise call.refuse("it comes before any layer, or is a form of it that has no operation")
        settings = (POINTWISE.index(which),)
        made = call.draft.apply(Code.POINTWISE, ref.value.layout, ref, settings=settings)
        return replace(ref, value=made, step=call.draft.step_of(call.where, ref))

    return lowered


def softmax(mode: int) -> Function:
    """Softmax, or its logarithm, along one axis of a token.

    Args:
        mode: 0, or 1 for the logarithm.
    """

    def lowered(call: Call) -> Ref:
        ref, at = call.ref(), call.get(1, "dim")
        if at is None:
            raise call.refuse("it does not say along which axis; give dim=")
        layout, group = ref.value.layout, ref.axes[at % len(ref.axes)]
        if layout.channels is None or any(atom not in layout.features for atom in group):
            inside = () if layout.channels is None else outside(call.draft, ref, group)
            raise call.refuse("it runs along time or batch, or before any layer", inside)
        near, apart, size = distances(layout), 0, 1
        for atom in reversed([atom for atom in group if atom.size > 1]):
            apart = apart or near[atom]
            if near[atom] != apart * size:
                raise call.refuse("it runs along several axes, which lie apart in memory")
            size *= atom.size
        settings = (mode, size, apart or 1)
        made = call.draft.apply(Code.SOFTMAX, layout, ref, settings=settings)
        return replace(ref, value=made, step=call.draft.step_of(call.where, ref))

    return lowered


COMPARED = {"gt": 0, "ge": 1, "lt": 2, "le": 3}
TURNED = {0: 2, 1: 3, 2: 0, 3: 1}  # the same with operands the other way round


def _compare(name: str) -> Function:
    """Spikes where one passes the other."""

    def lowered(call: Call) -> Ref:
        a, b, mode = call.args[0], call.args[1], COMPARED[name]
        if not isinstance(a, Ref):
            a, b, mode = b, a, TURNED[mode]
        if isinstance(b, Ref):
            call.args = (a, b)
            return _above(call, joined(call, 1), mode, torch.zeros(1))
        return _above(call, a, mode, torch.as_tensor(b))

    return lowered


def _above(call: Call, given: Any, mode: int, threshold: Tensor) -> Ref:
    if not isinstance(given, Ref) or given.value.layout.channels is None:
        raise call.refuse("it comes before any layer, so that its channels are not known")
    row = per_number(call, given, threshold)
    if row.numel() > 1:
        whole = math.prod(given.value.layout.size)
        row = row.repeat(whole // row.numel())
    stored = call.draft.keep("threshold", row.reshape(1, -1).contiguous())
    source, layout = call.draft.floats(given), given.value.layout
    made = call.draft.apply(
        Code.COMPARE, layout, source, settings=(mode,), tensors=(stored,), bits=True
    )
    return replace(given, value=made, step=call.draft.step_of(call.where, given))


def _surrogate(call: Call) -> Ref:
    """A step function of the user's own: which one, a few numbers tell."""
    probe = torch.tensor([-1.0, -1e-6, 0.0, 1e-6, 1.0])
    rest = call.args[1:]
    if not callable(call.node.target) or any(isinstance(leaf, Ref) for leaf in rest):
        raise call.refuse("its step function takes a threshold that is computed")
    with torch.no_grad():
        try:
            found = call.node.target(probe, *rest, **call.kwargs)
        except Exception as error:
            raise call.refuse(f"its step function does not run on five numbers: {error}") from None
    for mode, spikes in ((0, probe > 0), (1, probe >= 0)):
        if isinstance(found, Tensor) and torch.equal(found.float(), spikes.float()):
            return _above(call, call.args[0], mode, torch.zeros(1))
    raise call.refuse("its step function is none that fires from 0 on")


def _where(call: Call) -> Lowered:
    """One number or the other, as spikes say."""
    spikes, a, b = call.args[:3]
    if not isinstance(spikes, Ref) or not spikes.value.bits:
        raise call.refuse("it chooses by something else than spikes")
    parts = []
    for given, mode in ((a, 2), (b, 3)):
        if isinstance(given, Ref):
            call.args = (spikes, given)
            parts.append(joined(call, mode))
        elif isinstance(given, int | float):
            factor, shift = (given, 0.0) if mode == 2 else (-given, given)
            parts.append(scaled(call, spikes, float(factor), float(shift)))
        else:
            raise call.refuse("it chooses between tensors of the model")
    call.args = tuple(parts)
    return joined(call, 0)


POINTWISE_FUNCTIONS: dict[str, Function] = {
    "relu": _relu,
    **{name: _pointwise(name) for name in POINTWISE},
    **{name: _compare(name) for name in COMPARED},
    "surrogate": _surrogate,
    "where": _where,
    "softmax": softmax(0),
    "log_softmax": softmax(1),
}
"""What becomes of such an operation, by its name."""
