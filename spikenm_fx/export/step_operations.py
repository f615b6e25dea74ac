# SPDX-License-Identifier: Apache-2.0
"""What operations between modules do to a flow: pick a step, stack, add, move and split axes.

``sizes`` are those of the axes ``"T"``, ``"N"`` and their foldings; what an operation shows of them
is written into it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from spikenm_fx.export.parts import Flow, Lead, OtherLayout, State, Unreadable, Zero

__all__ = [
    "added",
    "cannot",
    "flat",
    "flow_of",
    "moved",
    "new_lead",
    "over_time",
    "picked",
    "stacked",
    "whole_shape",
]

Sizes = dict[str, int]


def picked(name: str, args: list[Any], kwargs: Any, sizes: Sizes, label: str) -> Any:
    """``getitem``, ``select`` and ``unbind``: of a tuple, or of the time axis.

    Raises:
        Unreadable: where something else is picked.
    """
    value = args[0]
    if isinstance(value, tuple | list):
        return value[args[1]]
    if isinstance(value, State | Zero):
        return value
    if name == "unbind":
        axis = int(kwargs.get("dim", args[1] if len(args) > 1 else 0))
        count = sizes.get(value.lead[axis] if axis < len(value.lead) else "", 0)
        return tuple(_at(value, axis, step, sizes, label) for step in range(count))
    if name == "select":
        return _at(value, int(args[1]), int(args[2]), sizes, label)
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    places = [i for i, part in enumerate(index) if isinstance(part, int)]
    rest = [p for p in index if not isinstance(p, int) and p != slice(None) and p is not ...]
    if len(places) != 1 or rest or (... in index and index[0] is ...):
        raise Unreadable(f"{label} with {args[1]}: only single time steps may be picked")
    return _at(value, places[0], int(index[places[0]]), sizes, label)


def _at(flow: Flow, axis: int, step: int, sizes: Sizes, label: str) -> Flow:
    if axis >= len(flow.lead) or flow.lead[axis] != "T":
        raise OtherLayout(f"{label} picks from axis {axis}, which is not time")
    step %= sizes["T"]
    lead = flow.lead[:axis] + flow.lead[axis + 1 :]
    return Flow(tuple((p, step) for p, _ in flow.terms), lead, flow.shape)


def stacked(name: str, args: list[Any], kwargs: Any, sizes: Sizes, label: str) -> Any:
    """``stack`` and ``cat`` of what one part emits in all steps, in their order.

    Raises:
        Unreadable: for anything else.
    """
    given = list(args[0])
    if given and all(isinstance(v, State) for v in given):
        return given[0]
    flows = [flow_of(v, label) for v in given]
    axis = int(kwargs.get("dim", args[1] if len(args) > 1 else 0))
    steps = [(p, s) for flow in flows for p, s in flow.terms]
    parts = {p for p, _ in steps}
    if name == "cat" and axis == 0 and all(f.lead == ("T", "N") for f in flows):
        name = "stack"  # of pieces that were given a time axis of one before
    in_order = [s for _, s in steps] in ([None] * len(steps), list(range(len(steps))))
    if name != "stack" or len(parts) != 1 or not in_order or any(f.over_time for f in flows):
        raise Unreadable(cannot(label, name))
    first = flows[0]
    lead = tuple(axis_ for axis_ in first.lead if axis_ != "T")
    sizes.setdefault("T", len(flows))
    return Flow(((steps[0][0], None),), (*lead[:axis], "T", *lead[axis:]), first.shape)


def over_time(name: str, args: list[Any], kwargs: Any, sizes: Sizes, label: str) -> Flow:
    """``sum`` and ``mean`` over the time axis, which a caller is left to do.

    Raises:
        Unreadable: over any other axis.
    """
    flow = flow_of(args[0], label)
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = list(dims) if isinstance(dims, tuple | list) else [dims]
    rank = len(whole_shape(flow, sizes))
    axes = [None if d is None else d % rank for d in dims]
    if any(a is None or a >= len(flow.lead) or flow.lead[a] != "T" for a in axes):
        raise Unreadable(cannot(f"{label} over axes {dims}", name))
    lead = tuple(axis for axis in flow.lead if axis != "T")
    return Flow(flow.terms, lead, flow.shape, f"{name} over all steps")


def added(name: str, args: list[Any], kwargs: Any, label: str) -> Any:
    """``add`` of flows; ``mul`` and ``div`` of what was taken over time already.

    Raises:
        Unreadable: for constants, doubled branches and products of signals.
    """
    others = [a for a in args[:2] if not isinstance(a, Flow | Zero)]
    flows = [a for a in args[:2] if isinstance(a, Flow)]
    if name in ("mul", "div"):
        if len(flows) == 1 and flows[0].over_time and isinstance(args[0], Flow):
            return replace(flows[0], over_time=f"{flows[0].over_time}, scaled")
        raise Unreadable(cannot(label, name))
    if kwargs.get("alpha", 1) != 1:
        raise Unreadable(f"{label} with alpha={kwargs['alpha']}: NIR adds without factors")
    for other in others:
        if not (isinstance(other, int | float) and other == 0):
            raise Unreadable(
                f"{label}: a constant ({_short(other)}) is added, which NIR cannot say and "
                "its readers would lose; move it into the bias of a layer"
            )
    if not flows:
        return Zero()
    return flows[0] if len(flows) == 1 else _joined(flows, label)


def _joined(flows: Sequence[Flow], label: str) -> Flow:
    terms = tuple(itertools.chain.from_iterable(flow.terms for flow in flows))
    parts = [p for p, _ in terms]
    lead = max((flow.lead for flow in flows), key=len)
    shape = max((flow.shape for flow in flows), key=len)
    over = [flow.over_time for flow in flows if flow.over_time]
    steps = [s for _, s in terms]
    if len(set(parts)) == 1 and (over or len(set(steps)) == len(steps)) and None not in steps:
        count = sum(max(flow.summed, 1) for flow in flows)
        return Flow((terms[-1],), lead, shape, f"sum over {count} steps", count)
    if over:
        raise Unreadable(f"{label}: sums over time are added to something else")
    if len(set(parts)) < len(parts):
        twice = next(p for p in parts if parts.count(p) > 1)
        raise Unreadable(
            f"{label}: the output of {twice} is added to itself, a doubled branch that NIR "
            "keeps once; double the weights of the layer behind it instead"
        )
    return Flow(terms, lead, shape)


def new_lead(lead: Lead, shape: tuple[int, ...], sizes: Sizes, name: str) -> Lead | None:
    """What the leading axes of a reshaped tensor run over; None where that cannot be told.

    Args:
        lead: before.
        shape: of the leading axes afterwards.
        sizes: of the axes.
        name: of the operation.
    """
    steps, batch = sizes.get("T"), sizes.get("N")
    given_time = name in ("unsqueeze", "repeat", "expand", "view", "reshape")
    if lead == ("N",) and given_time and len(shape) == 2 and shape[1] == batch:
        sizes["T"] = shape[0]
        return ("T", "N")
    if lead == ("T", "N") and name in ("expand", "repeat") and len(shape) == 2:
        sizes["T"] = shape[0]
        return lead
    if lead in (("TN",), ("NT",)) and len(shape) == 2:
        names = tuple(lead[0])
        sizes |= dict(zip(names, shape, strict=True))
        return names
    if len(lead) == 2 and steps and batch and shape == (steps * batch,):
        sizes["".join(lead)] = shape[0]
        return ("".join(lead),)
    if tuple(sizes.get(axis, -1) for axis in lead) == shape:
        return lead
    if lead == ("T", "N") and shape == (batch,) and name == "squeeze":
        return ("N",)
    return None


def moved(flow: Flow, rank: int, name: str, args: Any, label: str) -> Flow:
    """``transpose`` and ``permute`` of time and batch.

    Raises:
        Unreadable: where channels move.
    """
    given = [a for a in flat(args[1:]) if isinstance(a, int)]
    if name == "transpose" and len(given) == 2:
        order = list(range(rank))
        a, b = (axis % rank for axis in given)
        order[a], order[b] = b, a
    elif name == "permute" and len(given) == rank:
        order = [axis % rank for axis in given]
    else:
        raise Unreadable(cannot(label, name))
    count = len(flow.lead)
    if order[count:] != list(range(count, rank)):
        raise Unreadable(f"{label} moves the channels, which NIR cannot say")
    return Flow(flow.terms, tuple(flow.lead[i] for i in order[:count]), flow.shape)


def cannot(label: str, name: str) -> str:
    """What is said of an operation that NIR has no node for."""
    known = {
        "max_pool2d": "a maximum has no NIR node; train with average pooling",
        "cat": "NIR adds what meets and cannot concatenate",
        "mul": "NIR has no product of signals that its readers know; scale weights instead",
        "div": "NIR has no quotient that its readers know; scale weights instead",
        "relu": "NIR has no ReLU",
    }
    return f"{label}: " + known.get(name, f"NIR has no node for {name!r}")


def _short(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def whole_shape(flow: Flow, sizes: Sizes) -> tuple[int, ...]:
    """Shape of the whole tensor; -1 for an axis whose size is not known."""
    return (*(sizes.get(axis, -1) for axis in flow.lead), *flow.shape)


def flow_of(value: Any, label: str) -> Flow:
    """``value``, where it is something that a part may be fed with.

    Raises:
        Unreadable: for a neuron's state, and for what does not come from the input.
    """
    if isinstance(value, Flow) and not value.over_time:
        return value
    if isinstance(value, Flow):
        raise Unreadable(f"{label} is given a {value.over_time}: later steps would change it")
    if isinstance(value, State):
        raise Unreadable(
            f"{label} is given the membrane of {value.neuron}; NIR's neurons hand on spikes only"
        )
    raise Unreadable(f"{label} is given a value that was not computed from the input")


def flat(values: Any) -> list[Any]:
    """What lies in tuples, lists and dicts, in order."""
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, tuple | list):
        return [inner for value in values for inner in flat(value)]
    return [values]
