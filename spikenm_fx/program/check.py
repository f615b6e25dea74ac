# SPDX-License-Identifier: Apache-2.0
"""A program against its model, neuron by neuron on the model's own spikes.

The criterion is that of :mod:`spikenm_fx.pack.check`: every neuron must receive the same but for
rounding and emit the same but for ties.  The library shows what each operation gives, and takes the
model's spikes in its place, so that one tie does not hide or cause another.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_flatten
from spikenm_fx.native.library import kernels
from spikenm_fx.pack.check.agreement import Agreement
from spikenm_fx.pack.check.difference import NeuronDifference, difference, first_margin
from spikenm_fx.program.code import Code
from spikenm_fx.program.engine import Engine
from spikenm_fx.program.lower import Lowered, Probe
from spikenm_fx.program.order import loops_of
from spikenm_fx.state import as_given, preserved

__all__ = ["CALLS", "FORGETS", "compared", "forgetting", "same_unobserved"]

FORGETS = {Code.NEURON: 5, Code.RECALL: 1}  # among the settings of what has a state

SMALL = 2**22
"""Bytes of parameters: to copy them takes less time than to look at each operation of a forward."""

CALLS = 3
"""Calls in a row that are compared where neurons keep their state from call to call."""


@dataclass(slots=True)
class _Seen:
    """What a neuron of the model took and gave in one forward, one entry per call."""

    received: list[Tensor]
    emitted: list[Tensor]


def forgetting(lowered: Lowered, forgets: bool) -> list[bool]:
    """Let every neuron start each forward at rest, or go on from where it was.

    Args:
        lowered: changed in place.
        forgets: whether they start at rest.

    Returns:
        Of each neuron, and of all else that a step leaves to the next one, what it did before.
    """
    held = [op for op in lowered.program.ops if op.code in FORGETS]
    before = [bool(op.settings[FORGETS[op.code]]) for op in held]
    for op in held:
        at = FORGETS[op.code]
        op.settings = (*op.settings[:at], int(forgets), *op.settings[at + 1 :])
    return before


def compared(
    model: nn.Module, engine: Engine, lowered: Lowered, x: Tensor | tuple[Tensor, ...]
) -> Agreement:
    """Run both on the examples, the engine on the model's spikes; both start from rest.

    Args:
        model: in eval mode and at rest; it is left so.
        engine: of the program; it is left at rest.
        lowered: the program.
        x: of the example's shape, or with another batch or number of steps; all inputs, if several.

    Raises:
        Exception: whatever the model's forward raises on such an input.
    """
    args = x if isinstance(x, tuple) else (x,)
    sizes = _sizes(engine, lowered, args)
    last: dict[str, Tensor] = {}  # spikes of recurrent neurons
    found = {number: NeuronDifference(p.name) for number, p in lowered.probes.items()}
    worst = 0.0
    with torch.no_grad(), preserved(model, at_once=SMALL):
        for _ in range(CALLS):  # also where it seems to keep no state
            wanted, seen = _recorded(model, lowered, args)
            _add_feedback(lowered, seen, last)
            observer = _Observer(lowered, seen, found, sizes)
            engine._net.observe(observer)
            try:
                given = engine(*args)
            finally:
                engine._net.observe(None)
            if observer.error is not None:
                raise observer.error
            worst = max(worst, _relative(given, wanted))
    engine.reset()
    return Agreement(worst, worst, tuple(n for n in found.values() if n.spikes))


def same_unobserved(engine: Engine, args: tuple[Tensor, ...]) -> bool:
    """Whether an engine gives the same bits where nobody sees its operations.

    Then a neuron takes the sums of its layer, which are not written; :func:`compared` sees both.

    Args:
        engine: any; it is left at rest.
        args: of the example's shapes.
    """
    outputs = []
    try:
        for observer in (lambda *_: None, None):
            engine._net.observe(observer)
            engine.reset()
            with torch.no_grad():
                outputs.append([y for y in tree_flatten(engine(*args))[0] if y is not None])
    finally:
        engine._net.observe(None)
        engine.reset()
    pairs = zip(*outputs, strict=True)
    return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs)


def _sizes(engine: Engine, lowered: Lowered, args: tuple[Tensor, ...]) -> tuple[int, int | None]:
    """Time steps of a whole forward, and the first axis of its batch."""
    steps, batch = max(1, lowered.program.fixed_steps), None
    for at, which in enumerate(lowered.taken):
        _, time, free = engine._net.input(at)
        shape = engine.unfolded(args[which]).shape
        steps = shape[time] if time >= 0 else steps
        batch = next((n for i, n in enumerate(shape) if free[i] and i != time), None)
    return steps, batch


def _recorded(
    model: nn.Module, lowered: Lowered, args: tuple[Tensor, ...]
) -> tuple[Any, dict[str, _Seen]]:
    seen = {probe.name: _Seen([], []) for probe in lowered.probes.values()}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, out: Any) -> None:
            seen[name].received.append(args[0].clone())
            seen[name].emitted.append((out[0] if isinstance(out, tuple) else out).clone())

        return hook

    handles = [model.get_submodule(n).register_forward_hook(record(n)) for n in seen]
    try:
        return model(*as_given(args)), seen
    finally:
        for handle in handles:
            handle.remove()


def _add_feedback(lowered: Lowered, seen: dict[str, _Seen], last: dict[str, Tensor]) -> None:
    """Let recurrent neurons have received what drives them, their own spikes included."""
    for number, probe in lowered.probes.items():
        if probe.recurrence is None:
            continue
        each, time = seen[probe.name], probe.spec.time_axis
        if lowered.program.ops[number].settings[FORGETS[Code.NEURON]]:
            last.pop(probe.name, None)
        for call, (x, spikes) in enumerate(zip(each.received, each.emitted, strict=True)):
            steps = [spikes] if time is None else list(spikes.unbind(time))
            before = last.get(probe.name, torch.zeros_like(steps[0]))
            last[probe.name] = steps[-1]
            earlier = before if time is None else torch.stack([before, *steps[:-1]], time)
            driven = probe.recurrence.drive(x, earlier)
            if probe.recurrence.starts_empty and time is not None:
                driven.select(time, 0).copy_(x.select(time, 0))
            each.received[call] = driven


class _Observer:
    """Compares what neurons take and give, and puts the model's spikes in place of theirs."""

    def __init__(
        self,
        lowered: Lowered,
        seen: dict[str, _Seen],
        found: dict[int, NeuronDifference],
        sizes: tuple[int, int | None],
    ) -> None:
        self.lowered, self.seen, self.found, self.sizes = lowered, seen, found, sizes
        loops = loops_of(lowered.program.ops)
        # those that run step by step, with the steps that they have come to
        self.steps = {n: 0 for n in lowered.probes if any(n in loop for loop in loops)}
        self.error: BaseException | None = None

    def __call__(self, number: int, given: int, out: int) -> None:
        probe = self.lowered.probes.get(number)
        if probe is None or self.error is not None:
            return
        try:
            self._neuron(number, probe, given, out)
        except BaseException as error:  # a callback cannot raise through C
            self.error = error

    def _neuron(self, number: int, probe: Probe, given: int, out: int) -> None:
        op = self.lowered.program.ops[number]
        values = self.lowered.program.values
        source, target = values[op.inputs[0]], values[op.outputs[0]]
        size = target.height * target.width * target.channels
        seen, each = self.seen[probe.name], self.found[number]
        wanted = torch.cat([probe.tokens(x, size, *self.sizes) for x in seen.received])
        spikes = torch.cat([probe.tokens(x, size, *self.sizes) for x in seen.emitted])
        if number in self.steps:
            at = self.steps[number]
            self.steps[number] += 1
            before = wanted[:at], spikes[:at]
            wanted, spikes = wanted[at : at + 1], spikes[at : at + 1]
        else:
            before = wanted[:0], spikes[:0]
        steps = wanted.shape[0] if source.timed else 1
        received = _floats(given, (steps, wanted.shape[1]), size)
        each.received = max(each.received, difference(received, wanted[:steps]))
        each.spikes += spikes.numel()
        each.steps += spikes.shape[0]
        if not target.bits:
            own = _floats(out, tuple(spikes.shape[:2]), size)
            each.inner = max(each.inner, difference(own, spikes))
            own.copy_(spikes)
            return
        native = kernels()
        assert native is not None
        bits = _bits(out, spikes.shape[0] * spikes.shape[1], size)
        own = torch.empty(spikes.shape)
        rows = spikes.shape[0] * spikes.shape[1]
        native.unpack_rows(bits.data_ptr(), rows, 1, size, own.data_ptr(), 1)
        differs = own != spikes
        if bool(differs.any()):
            each.others += int(differs.sum())
            rule = replace(probe.spec, time_axis=None, folded_time=False)
            unlike = torch.cat([torch.zeros_like(before[1], dtype=torch.bool), differs])
            all_x, all_s = torch.cat([before[0], wanted]), torch.cat([before[1], spikes])
            # only from rest on is the membrane that of the rule
            margin = (
                None
                if each.steps > all_s.shape[0]
                else first_margin(rule, list(all_x), list(all_s), list(unlike))
            )
            if margin is not None:
                each.margin = max(each.margin or 0.0, margin)
        forced = spikes.contiguous()
        native.pack_rows(forced.data_ptr(), rows, 1, size, bits.data_ptr(), 1)


def _floats(address: int, lead: tuple[int, ...], size: int) -> Tensor:
    """Tokens of floats inside the library, as ``(steps, batch, numbers)``; shares their memory."""
    stride = -(-size // 64) * 64 + 64
    count = lead[0] * lead[1] * stride
    held = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(held, dtype=torch.float32).view(*lead, stride)[..., :size]


def _bits(address: int, tokens: int, size: int) -> Tensor:
    """Tokens of bits inside the library, as int64 words; shares their memory."""
    count = tokens * -(-size // 64)
    held = (ctypes.c_int64 * count).from_address(address)
    return torch.frombuffer(held, dtype=torch.int64)


def _relative(given: Any, wanted: Any) -> float:
    many = (v if isinstance(v, tuple | list) else (v,) for v in (given, wanted))
    worst = 0.0
    for found, right in zip(*many, strict=True):
        if found is None:  # a state, which the engine keeps
            continue
        if found.shape != right.shape:
            return float("inf")
        off = float((found - right).norm() / right.norm().clamp_min(1e-12))
        worst = max(worst, off if off == off else float("inf"))
    return worst
