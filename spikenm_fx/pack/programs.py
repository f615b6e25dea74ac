# SPDX-License-Identifier: Apache-2.0
"""A model as a program: lowered, compared with the model, and measured beside it."""

from __future__ import annotations

import inspect
import math
import time
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
from spikenm_fx.program.check import compared, forgetting
from spikenm_fx.program.code import INPUTS
from spikenm_fx.program.draft import NotLowered
from spikenm_fx.program.engine import Engine
from spikenm_fx.program.held import Memory
from spikenm_fx.program.image import image_of
from spikenm_fx.program.lower import Lowered, lower
from spikenm_fx.state import preserved
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
        graph = trace(model, args)
    except TraceError as error:
        raise PackError(f"the model does not run on the examples: {error}") from error
    lowered = lower(model, graph, dtype=dtype, nm=nm)
    lowered.names = _names(model, len(args))
    result = _result(model, args, lowered)
    engine = Engine(image_of(lowered, result, memory))
    proof = None
    if check and dtype is None:  # rounded weights would differ from the model's
        start = time.perf_counter()
        _prove(model, engine, lowered, args, result)
        proof = Proof(1, time.perf_counter() - start)
        engine = Engine(image_of(lowered, result, memory))
    return engine, lowered, proof


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
        out = model(*args)
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
    if wrong:
        if all(forgetting(lowered, forgets=True)):
            raise NotLowered("", f"it differs from the model: {wrong}; please report that")
        engine = Engine(image_of(lowered, result))
        if compared(model, engine, lowered, args).disagreement:
            raise NotLowered("", f"it differs from the model: {wrong}; please report that")
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


def _folded(lowered: Lowered, whole: Tensor) -> Tensor:
    """An input as the model takes it, of one with axes of their own for samples and steps."""
    return whole if lowered.folded is None else whole.flatten(0, 1)


def _differs(
    model: nn.Module, engine: Engine, lowered: Lowered, args: tuple[Tensor, ...]
) -> bool:
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
