# SPDX-License-Identifier: Apache-2.0
"""``pack`` compares its engine with the model, and takes back what does not hold.

One forward of the model notes what every layer and every neuron gives.  In one forward of the
engine each of them is compared with that, and then hands on what the model's gave, so that all are
judged on the same input and one difference does not hide or cause another.  Layers that wait for a
fused neuron are judged with it (see :mod:`spikenm_fx.pack.check.forced`).  What differs beyond
rounding and ties is put back, and the rest is compared again; where nothing in particular can be
blamed, neurons are unfused first, and then every layer becomes torch's.
"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_flatten, tree_map
from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.pack.check.agreement import OUTPUT, Agreement
from spikenm_fx.pack.check.difference import ROUNDING, difference
from spikenm_fx.pack.check.forced import forced
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.summary import Proof
from spikenm_fx.state import as_given, preserved, uncompiled

if TYPE_CHECKING:
    from spikenm_fx.pack.builder import EngineBuilder

__all__ = ["ROUNDS", "prove"]

ROUNDS = 4
"""Comparisons at most; what still differs then is the model's own, all of it."""

ADVICE = "If the model is right without packing, please report it with this layer's class"


def prove(
    builder: EngineBuilder,
    reference: nn.Module,
    args: tuple[Any, ...],
    *,
    before: Proof | None = None,
) -> Proof:
    """Compare the builder's engine with the model on one forward; put back what differs.

    Args:
        builder: whose engine runs.
        reference: a copy of the model, at rest; it is left so.
        args: of the forward.
        before: an earlier comparison of the same engine, whose cost counts as well.
    """
    start, rounds = time.perf_counter(), 0
    put_back = list(before.put_back) if before is not None else []
    while rounds < ROUNDS and (builder.layers or builder.fused):
        rounds += 1
        found = _differences(builder, reference, args)
        if not found:
            break
        if "" in found:
            put_back += _give_up(builder, found[""], everything=rounds == ROUNDS - 1)
            continue
        if builder.dtype is not None:  # rounded weights: the reference has no others to go back to
            put_back += _give_up(builder, "; ".join(found.values()), everything=True)
            break
        for name, reason in found.items():
            _put_back(builder, name, reason)
            put_back.append(name)
    else:
        if builder.layers or builder.fused:
            put_back += _give_up(builder, "it still differs from the model", everything=True)
    spent = time.perf_counter() - start
    if before is not None:
        rounds, spent = rounds + before.rounds, spent + before.seconds
    return Proof(rounds, spent, tuple(put_back))


def _put_back(builder: EngineBuilder, name: str, reason: str) -> None:
    owner = next((layer for layer, d in builder.layers.items() if d.neuron == name), None)
    _warn(f"{name} differs from the model's: {reason}; it runs as in the model")
    if name in builder.layers:
        builder.put_back(name, f"It gave something else than the model: {reason}. {ADVICE}.")
    elif owner is not None:
        builder.put_back(owner, f"{name} behind it differed from the model: {reason}. {ADVICE}.")
    else:
        builder.unfuse(name, f"It gave something else than in the model: {reason}. {ADVICE}.")


def _give_up(builder: EngineBuilder, reason: str, *, everything: bool) -> list[str]:
    """Nobody in particular is to blame: first no neuron is fused, then no layer is packed."""
    back = list(builder.fused)
    for name in back:
        builder.unfuse(name, f"The engine differed from the model: {reason}. {ADVICE}.")
    if everything or not back:
        back += builder.layers
        for name in list(builder.layers):
            builder.put_back(name, f"The engine differed from the model: {reason}. {ADVICE}.")
    some = f"{back[0]} and {len(back) - 1} more" if len(back) > 1 else "".join(back)
    _warn(f"the engine differs from the model: {reason}; {some} run as in the model")
    return back


def _warn(message: str) -> None:
    warnings.warn(f"pack: {message}", SpikeNMWarning, stacklevel=6)


def _differences(
    builder: EngineBuilder, reference: nn.Module, args: tuple[Any, ...]
) -> dict[str, str]:
    """What differs by name, with the reason; "" where nothing in particular does."""
    recorded: dict[str, list[Any]] = {name: [] for name in builder.layers}
    counted = dict.fromkeys(recorded, 0)
    found: dict[str, str] = {}

    def record(name: str) -> Any:
        return lambda _module, _args, out: recorded[name].append(_copied(out))

    def compare(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
            counted[name] += 1
            if counted[name] > len(recorded[name]) or isinstance(out, LazyTensor):
                return None
            wanted = recorded[name][counted[name] - 1]
            worst = _worst(out, wanted)
            if not worst <= ROUNDING:
                found.setdefault(name, _off(worst))
            return wanted

        return hook

    def run(module: nn.Module) -> Any:
        with preserved(nn.Module()):  # the random generators: both draw alike
            handles = []
            for name, draft in builder.layers.items():
                at = draft.norm[0] if draft.norm is not None and module is reference else name
                hook = record(name) if module is reference else compare(name)
                handles.append(module.get_submodule(at).register_forward_hook(hook))
            try:
                return _copied(module(*as_given(args)))
            finally:
                for handle in handles:
                    handle.remove()

    try:
        # both are copies, and measuring writes into them as well: no guard for each operation
        left = preserved(reference, guarded=False)
        engine = preserved(builder.engine, guarded=False, leave=builder.fixed_tensors())
        with torch.no_grad(), left, engine, uncompiled():
            wanted, given, neurons = forced(reference, builder.engine, run)
    except Exception as error:  # the user's forward may raise anything where a layer is another
        return found or {"": f"its forward raises {type(error).__name__}: {error}"}
    for neuron in neurons:
        reason = Agreement(0.0, 0.0, (neuron,)).disagreement
        if reason and (neuron.name in builder.fused):
            found.setdefault(neuron.name, reason)
    miscounted = {
        name: (
            f"it runs {counted[name]} times in one forward, and {len(seen)} in the model; "
            "code that asks for its exact class (type(layer) is ...) should use isinstance"
        )
        for name, seen in recorded.items()
        if counted[name] != len(seen)
    }
    if miscounted:  # whatever follows them has another input
        return miscounted
    worst = _worst(given, wanted)
    if not found and not worst <= OUTPUT:
        found[""] = f"its output is {_off(worst)}"
    return found


def _off(worst: float) -> str:
    if worst == float("inf"):
        return "of another shape, or not finite"
    return f"off by {worst:.2g} of the largest value, where rounding explains {ROUNDING:g}"


def _copied(value: Any) -> Any:
    def copied(x: Any) -> Any:
        if isinstance(x, LazyTensor):
            return x.materialize().clone()
        return x.detach().clone() if isinstance(x, Tensor) else x

    return tree_map(copied, value)


def _worst(given: Any, wanted: Any) -> float:
    """Largest relative difference of all tensors; infinity where they are not alike."""
    here, there = (
        [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)] for value in (given, wanted)
    )
    if [x.shape for x in here] != [x.shape for x in there]:
        return float("inf")
    return max((difference(a, b) for a, b in zip(here, there, strict=True)), default=0.0)
