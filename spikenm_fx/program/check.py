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

from spikenm_fx.native.library import kernels
from spikenm_fx.pack.check.agreement import Agreement
from spikenm_fx.pack.check.difference import NeuronDifference, difference, first_margin
from spikenm_fx.program.code import Code
from spikenm_fx.program.engine import Engine
from spikenm_fx.program.lower import Lowered, Probe
from spikenm_fx.state import preserved

__all__ = ["CALLS", "compared", "forgetting"]

FORGETS = 5  # among the settings of a neuron

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
        Of each neuron what it did before.
    """
    neurons = [op for op in lowered.program.ops if op.code is Code.NEURON]
    before = [bool(op.settings[FORGETS]) for op in neurons]
    for op in neurons:
        op.settings = (*op.settings[:FORGETS], int(forgets), *op.settings[FORGETS + 1 :])
    return before


def compared(model: nn.Module, engine: Engine, lowered: Lowered, x: Tensor) -> Agreement:
    """Run both on the examples, the engine on the model's spikes; both start from rest.

    Args:
        model: in eval mode and at rest; it is left so.
        engine: of the program; it is left at rest.
        lowered: the program.
        x: of the example's shape, or with another batch or number of steps.

    Raises:
        Exception: whatever the model's forward raises on such an input.
    """
    _, time, free = engine._net.input()
    shape = engine.unfolded(x).shape
    batch = next((n for i, n in enumerate(shape) if free[i] and i != time), None)
    sizes = shape[time] if time >= 0 else max(1, lowered.program.fixed_steps), batch
    calls = CALLS if lowered.probes else 1
    found = {number: NeuronDifference(p.name) for number, p in lowered.probes.items()}
    worst = 0.0
    with torch.no_grad(), preserved(model):
        for _ in range(calls):
            wanted, seen = _recorded(model, lowered, x)
            observer = _Observer(lowered, seen, found, sizes)
            engine._net.observe(observer)
            try:
                given = engine(x)
            finally:
                engine._net.observe(None)
            if observer.error is not None:
                raise observer.error
            worst = max(worst, _relative(given, wanted))
    engine.reset()
    return Agreement(worst, worst, tuple(n for n in found.values() if n.spikes))


def _recorded(model: nn.Module, lowered: Lowered, x: Tensor) -> tuple[Any, dict[str, _Seen]]:
    seen = {probe.name: _Seen([], []) for probe in lowered.probes.values()}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, out: Any) -> None:
            seen[name].received.append(args[0].clone())
            seen[name].emitted.append((out[0] if isinstance(out, tuple) else out).clone())

        return hook

    handles = [model.get_submodule(n).register_forward_hook(record(n)) for n in seen]
    try:
        return model(x), seen
    finally:
        for handle in handles:
            handle.remove()


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
            # only from rest on is the membrane that of the rule
            margin = (
                None
                if each.steps > spikes.shape[0]
                else first_margin(rule, list(wanted), list(spikes), list(differs))
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
