# SPDX-License-Identifier: Apache-2.0
"""The ways to read a model as a program, the plainest first.

As it was traced; where its loop over time is so long that the trace records some of its steps only,
on fewer steps; and where one call is one step, over several calls in a row, which show what the
model keeps between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_flatten
from spikenm_fx.pattern import NM
from spikenm_fx.program.code import Code, Port, Program, Role
from spikenm_fx.program.draft import NotLowered
from spikenm_fx.program.lower import Lowered, lower
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["WAYS", "Given", "Way"]

CALLS = 4
"""Calls in a row that are read as one loop: one more than what a loop carries shows in."""

STEPS = 6
"""Steps of a long loop that are read: fewer than the trace records one by one."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a program is made of.

    Attributes:
        model: in eval mode, folded, at rest.
        args: the example inputs.
        graph: its trace on these.
        nm: what each layer must be that is not entirely dense, or None.
        inside: neurons whose rule is not known are read by their own code.
    """

    model: nn.Module
    args: tuple[Tensor, ...]
    graph: SpikingGraph
    nm: NM | None
    inside: bool = False

    @property
    def records_some_steps(self) -> bool:
        """Whether steps of a loop stand for others."""
        nodes: Any = [] if self.graph.operations is None else self.graph.operations.nodes
        return any(node.meta.get("repeats") for node in nodes)


Way = Callable[[Given, Any], Lowered | None]


def _as_traced(given: Given, dtype: Any) -> Lowered:
    return lower(given.model, given.graph, dtype=dtype, nm=given.nm)


def _fewer_steps(given: Given, dtype: Any) -> Lowered | None:
    if not given.records_some_steps:
        return None
    last: NotLowered | None = None
    for axis in (0, 1):
        size = given.args[0].shape[axis] if given.args[0].dim() > axis else 0
        if size <= STEPS:
            continue
        alike = [x.dim() > axis and x.shape[axis] == size for x in given.args]
        short = tuple(
            x.narrow(axis, 0, STEPS) if cut else x for x, cut in zip(given.args, alike, strict=True)
        )
        try:
            graph = trace(given.model, short, inside=given.inside)
            found = lower(given.model, graph, dtype=dtype, nm=given.nm)
        except NotLowered as error:
            last = error
            continue
        if _times(found.program) == {STEPS}:
            _resize(found.program, size)
            return found
    if last is not None:
        raise last
    return None


def _times(program: Program) -> set[int]:
    ports = program.inputs
    return {axis.size for port in ports for axis in port.axes if axis.role is Role.TIME}


def _resize(program: Program, steps: int) -> None:
    def longer(port: Port) -> Port:
        axes = (replace(a, size=steps) if a.role is Role.TIME else a for a in port.axes)
        return replace(port, axes=tuple(axes))

    program.inputs = tuple(map(longer, program.inputs))
    program.outputs = tuple(map(longer, program.outputs))


def _several_calls(given: Given, dtype: Any) -> Lowered | None:
    model = given.model
    if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        return None
    states: list[int] = []
    several = _in_a_row(model, states)
    args = tuple(torch.stack([x] * CALLS) for x in given.args)
    graph = trace(several, args, inside=given.inside)
    lowered = lower(several, graph, dtype=dtype, nm=given.nm)
    program = lowered.program
    if _times(program) != {CALLS}:
        raise NotLowered("", "its calls are no steps in time")
    if any(op.code is Code.REDUCE for op in program.ops):
        raise NotLowered("", "its calls are no steps in time")
    lowered.returns = (True, *[False] * (states[-1] if states else 0))
    program.values = [replace(value, timed=False) for value in program.values]
    program.inputs = tuple(map(_untimed, program.inputs))
    program.outputs = tuple(map(_untimed, program.outputs))
    return lowered


def _untimed(port: Port) -> Port:
    axes = [axis for axis in port.axes if axis.role is not Role.TIME]
    if any(axis.joined for axis in port.axes if axis.role is Role.TIME):
        raise NotLowered("", "its calls are no steps in time")
    return replace(port, axes=tuple(axes))


def _in_a_row(model: nn.Module, states: list[int]) -> nn.Module:
    """The same module, tensors and states included, whose forward is several calls of its own.

    Args:
        model: shares all that it has with the result.
        states: gets how many tensors the state is that its calls hand on.
    """
    cls = type(model)
    names = list(inspect.signature(model.forward).parameters)

    def forward(self: Any, *steps: Tensor) -> Any:
        outputs, state = [], None
        hands_on = len(steps) == 1 and names[1:2] in (["state"], ["hidden_state"])
        for step in zip(*(x.unbind(0) for x in steps), strict=True):
            found = cls.forward(self, *step, *((state,) if hands_on and state is not None else ()))
            if hands_on and isinstance(found, tuple) and len(found) == 2:
                found, state = found
            outputs.append(found)
        if not all(isinstance(found, Tensor) for found in outputs):
            raise NotLowered("", "one call returns something else than a tensor and its states")
        if state is not None:
            states.append(sum(leaf is not None for leaf in tree_flatten(state)[0]))
        return torch.stack(outputs)

    several: nn.Module = object.__new__(type(cls.__name__, (cls,), {"forward": forward}))
    several.__dict__ = model.__dict__
    return several


WAYS: tuple[Way, ...] = (_as_traced, _fewer_steps, _several_calls)
"""In order; each gives None where it does not apply."""
