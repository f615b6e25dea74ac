# SPDX-License-Identifier: Apache-2.0
"""A model as a program: lowered, compared with the model, and measured beside it."""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_flatten
from spikenm_fx.errors import PackError, TraceError
from spikenm_fx.pack.summary import (
    PackedLayerReport,
    PackedNeuronReport,
    PackReport,
    Proof,
    WholeForward,
)
from spikenm_fx.pack.turns import take_turns
from spikenm_fx.pack.weights.format import PackedWeight
from spikenm_fx.pattern import NM
from spikenm_fx.program.check import FORGETS, compared, forgetting, same_unobserved
from spikenm_fx.program.code import INPUTS, Code
from spikenm_fx.program.draft import NotLowered
from spikenm_fx.program.engine import Engine
from spikenm_fx.program.held import Memory
from spikenm_fx.program.image import image_of
from spikenm_fx.program.lower import Lowered
from spikenm_fx.program.ways import WAYS, Given, Way
from spikenm_fx.state import as_given, preserved
from spikenm_fx.trace import trace

__all__ = ["made_program", "proved_program"]

OTHERWISE = "the model returns something else than tensors, and its states, in a tuple or list"


def made_program(
    model: nn.Module,
    args: tuple[Any, ...],
    dtype: torch.dtype | None,
    nm: NM | None,
    *,
    check: bool,
    memory: Memory = "fast",
) -> Engine:
    """The engine of a model with its report.

    Args:
        model: folded, on the CPU, at rest; it is left so.
        args: the example inputs.
        dtype: of the stored weights, or None.
        nm: what each layer must be that is not dense, or None.
        check: compare the program with the model.
        memory: whether weights stay packed in memory.

    Raises:
        NotLowered: where there is none, and why.
        PackError: for weights that cannot be packed.
    """
    engine, lowered, proof = proved_program(model, args, dtype, nm, check=check, memory=memory)
    whole = _measured(model, engine, args)
    engine.__dict__["_spikenm_packing"] = _report(engine, lowered, whole, proof)
    return engine


def proved_program(
    model: nn.Module,
    args: tuple[Any, ...],
    dtype: torch.dtype | None,
    nm: NM | None,
    *,
    check: bool,
    memory: Memory = "fast",
) -> tuple[Engine, Lowered, Proof | None]:
    """The engine of a model without its times, the program that it is, and what its proof took.

    Args:
        model: folded, on the CPU, at rest; it is left so.
        args: the example inputs.
        dtype: of the stored weights, or None.
        nm: what each layer must be that is not dense, or None.
        check: compare the program with the model.
        memory: whether weights stay packed in memory.

    Raises:
        NotLowered: where there is none, and why.
        PackError: for weights that cannot be packed.
    """
    if not args or not all(isinstance(x, Tensor) for x in args) or len(args) > INPUTS:
        raise NotLowered(
            "", f"the model takes something else than tensors; a program takes 1 to {INPUTS}"
        )
    try:
        given = Given(model, args, trace(model, args), nm)
    except TraceError as error:
        raise PackError(f"the model does not run on the examples: {error}") from error
    try:
        return _first_way(given, dtype, check=check, memory=memory)
    except NotLowered as error:
        if not error.rule:
            raise
        inside = replace(given, graph=trace(model, args, inside=True), inside=True)
        try:
            return _first_way(inside, dtype, check=check, memory=memory)
        except (NotLowered, TraceError) as other:
            why = f"{error.why}; nor is there a program of what its code does ({other})"
            raise NotLowered(error.where, why) from other


def _first_way(
    given: Given, dtype: torch.dtype | None, *, check: bool, memory: Memory
) -> tuple[Engine, Lowered, Proof | None]:
    """The first of the ways to read a model that gives a program equal to it."""
    first: NotLowered | None = None
    for way in WAYS:
        try:
            found = _proved(given, way, dtype, check=check, memory=memory)
        except NotLowered as error:
            first = first or error
            if not first.carries:
                break
            continue
        except TraceError:
            continue
        if found is not None:
            return found
    assert first is not None
    raise first


def _proved(
    given: Given, way: Way, dtype: torch.dtype | None, *, check: bool, memory: Memory
) -> tuple[Engine, Lowered, Proof | None] | None:
    """A program that was read in one of the ways; None where that one does not apply."""
    lowered = way(given, dtype)
    if lowered is None:
        return None
    lowered.names = _names(given.model, len(given.args))
    result = _result(given.model, given.args, lowered)
    engine = Engine(image_of(lowered, result, memory))
    exact = lowered
    carries = any(op.code in (Code.COMPARE, Code.RECALL) for op in lowered.program.ops)
    if dtype is not None and carries:  # rounded weights would differ from the model's
        whole = way(given, None)
        assert whole is not None
        exact = whole
        exact.names = lowered.names
    if (not check or dtype is not None) and not carries:
        return engine, lowered, None
    start = time.perf_counter()
    shown = engine if exact is lowered else Engine(image_of(exact, result, memory))
    _prove(given.model, shown, exact, given.args, result)
    for op, other in zip(lowered.program.ops, exact.program.ops, strict=True):
        if op.code in FORGETS:
            op.settings = other.settings
    lowered.program.only_steps = exact.program.only_steps
    lowered.program.only_images = exact.program.only_images
    proof = Proof(1, time.perf_counter() - start) if dtype is None else None
    return Engine(image_of(lowered, result, memory)), lowered, proof


def _names(model: nn.Module, count: int) -> tuple[str, ...]:
    """What the model's forward calls its inputs."""
    found = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return tuple([*found, *(f"input_{at}" for at in range(len(found), count))][:count])


def _result(model: nn.Module, args: tuple[Tensor, ...], lowered: Lowered) -> str:
    """How the model returns its outputs."""
    with torch.no_grad(), preserved(model):
        out = model(*as_given(args))
    if isinstance(out, Tensor):
        return "tensor"
    if not isinstance(out, tuple | list) or hasattr(out, "_fields"):
        raise NotLowered("", OTHERWISE)
    left, places = list(lowered.returns), []
    for each in out:
        tensors = [leaf for leaf in tree_flatten(each)[0] if isinstance(leaf, Tensor)]
        kept, left = left[: len(tensors)], left[len(tensors) :]
        if any(kept) and not isinstance(each, Tensor):
            raise NotLowered("", OTHERWISE)
        places.append("output" if any(kept) else "state")
    if left or places.count("output") != len(lowered.program.outputs):
        raise NotLowered("", OTHERWISE)
    return f"{'list' if isinstance(out, list) else 'tuple'} {' '.join(places)}"


def _prove(
    model: nn.Module, engine: Engine, lowered: Lowered, args: tuple[Tensor, ...], result: str
) -> None:
    """Compare both on the examples, and on other sizes; sizes that differ are ruled out.

    A number in the model's code may be one of the sizes, and an axis of size 1 may be any.  Several
    calls in a row tell whether a forward starts by resetting the model.
    """
    wrong = compared(model, engine, lowered, args).disagreement
    for change in (_keep_carried, _forget_all):
        if not wrong:
            break
        if not change(lowered):
            continue
        engine = Engine(image_of(lowered, result))
        again = compared(model, engine, lowered, args).disagreement
        wrong = wrong if again else ""
    if wrong:
        raise NotLowered(
            "", f"it differs from the model: {wrong}; please report that", carries=True
        )
    if not same_unobserved(engine, args):
        raise NotLowered("", "it gives something else where nobody looks on; please report that")
    more, longer = list(args), list(args)
    images = steps = 0
    for at, which in enumerate(lowered.taken):
        shape, time_axis, free = engine._net.input(at)
        batch = [i for i, is_free in enumerate(free) if is_free and i != time_axis]
        whole = engine.unfolded(args[which])
        if batch:
            more[which] = _folded(lowered, torch.cat([whole, whole], dim=batch[0]))
        images = math.prod(shape[i] for i in batch) if batch else 0
        if time_axis >= 0:
            last = whole.narrow(time_axis, shape[time_axis] - 1, 1)
            longer[which] = _folded(lowered, torch.cat([whole, last], dim=time_axis))
            steps = shape[time_axis]
    fixed = "" if lowered.folded is None else lowered.folded[0]
    if fixed == "batch" or (images and _differs(model, engine, lowered, tuple(more))):
        lowered.program.only_images = images
    if steps and (fixed == "steps" or _differs(model, engine, lowered, tuple(longer))):
        lowered.program.only_steps = steps


def _keep_carried(lowered: Lowered) -> bool:
    """Let what a loop carries go on from call to call; False where that changes nothing."""
    held = [op for op in lowered.program.ops if op.code is Code.RECALL]
    changed = any(op.settings[1] for op in held)
    for op in held:
        op.settings = (op.settings[0], 0)
    return changed


def _forget_all(lowered: Lowered) -> bool:
    """Let each forward start at rest; False where it does already."""
    return not all(forgetting(lowered, forgets=True))


def _folded(lowered: Lowered, whole: Tensor) -> Tensor:
    """An input as the model takes it, of one with axes of their own for samples and steps."""
    return whole if lowered.folded is None else whole.flatten(0, 1)


def _differs(model: nn.Module, engine: Engine, lowered: Lowered, args: tuple[Tensor, ...]) -> bool:
    try:
        return bool(compared(model, engine, lowered, args).disagreement)
    except Exception:  # a model of one size: its forward may raise anything on others
        engine.reset()
        return True


def _measured(model: nn.Module, engine: Engine, args: tuple[Tensor, ...]) -> WholeForward:
    with torch.no_grad(), preserved(model, guarded=False):
        seconds = take_turns({"model": model, "program": engine}, args)
    engine.reset()
    return WholeForward(1e3 * seconds["model"], 1e3 * seconds["program"], "program")


def _report(
    engine: Engine, lowered: Lowered, whole: WholeForward, proof: Proof | None
) -> PackReport:
    ops = lowered.program.ops
    held = engine.layer_bytes
    resident: dict[str, int] = {}
    for op, size in zip(ops, held, strict=True):
        resident[op.name] = resident.get(op.name, 0) + size
    readers = {op.inputs[0]: op.name for op in ops if op.code.name == "NEURON"}
    driven = {op.name: readers.get(op.outputs[0], "") for op in ops if op.code.name == "LAYER"}
    layers = tuple(
        _row(name, packed, driven.get(name, ""), resident.get(name, 0), small=engine.small)
        for name, packed in lowered.packed.items()
    )
    neurons = tuple(
        PackedNeuronReport(p.name, next((n for n, d in driven.items() if d == p.name), ""))
        for p in lowered.probes.values()
    )
    return PackReport(layers, neurons, whole, proof)


def _row(
    name: str, packed: PackedWeight, neuron: str, layout: int, *, small: bool
) -> PackedLayerReport:
    dense = math.prod(packed.shape) * 4
    return PackedLayerReport(
        name,
        packed.shape,
        str(packed.nm),
        "program",
        neuron=neuron,
        dense_bytes=dense,
        packed_bytes=packed.nbytes,
        resident_bytes=layout + (0 if small else packed.nbytes),
    )
