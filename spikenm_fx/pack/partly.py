# SPDX-License-Identifier: Apache-2.0
"""Networks of which only parts have a program: the largest such parts run as programs.

A part is a module that the forward calls once, with one tensor, or several modules in a row of an
``nn.Sequential``.  From the whole model down, what has a program takes the place of its modules in
the engine (:class:`~spikenm_fx.program.part.ProgramPart`), if it is right and faster there; what
has none is looked into.  All else runs as in any engine.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pack.programs import made_program
from spikenm_fx.pack.summary import GAINS, PackReport, PartReport, WholeForward
from spikenm_fx.pack.turns import take_turns
from spikenm_fx.pattern import NM, is_weight_layer
from spikenm_fx.program.draft import NotLowered
from spikenm_fx.program.engine import Engine
from spikenm_fx.program.held import Memory
from spikenm_fx.program.part import ProgramPart
from spikenm_fx.state import as_given, preserved
from spikenm_fx.trace import NeuronSpec, find_neurons

__all__ = ["run_parts_as_programs"]

FORWARDS = 5
NOISE = 1.1  # times measured one after the other differ by so much though nothing else does
REACHED = ("reset", "n_reset")
"""Names of resets that a framework calls on whatever module has them."""


_PLACE = re.compile(r"(?:^| in )(\d+)")
"""Where in a sequence something has no program, in words as :class:`NotLowered` has them."""


class _Slower(NotLowered):
    """A part whose program gains nothing."""


@dataclass(slots=True)
class _Seen:
    """Calls of one module in a forward."""

    calls: int = 0
    given: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Modules in a row, by the qualified names of the first and of all, and their program."""

    names: tuple[str, ...]
    engine: Engine
    gain: float


class _Parts:
    """Finds the parts of a model that have a program.

    Args:
        reference: a copy of the model, at rest.
        engine: its engine, whose modules have the same names.
        args: of one forward.
        dtype: of stored weights, or None.
        nm: what layers must be that are not dense, or None.
        check: compare each part with its modules.
        memory: whether weights stay packed in memory.
    """

    def __init__(
        self,
        reference: nn.Module,
        engine: nn.Module,
        args: tuple[Any, ...],
        dtype: torch.dtype | None,
        nm: NM | None,
        *,
        check: bool,
        memory: Memory,
    ) -> None:
        self.reference, self.engine, self.args = reference, engine, args
        self.dtype, self.nm, self.check, self.memory = dtype, nm, check, memory
        self.neurons = find_neurons(reference)
        self.seen = _calls(reference, args)
        self.parts: list[_Part] = []
        self.reasons: dict[str, str] = {}

    def find(self, name: str = "") -> None:
        """Look for parts inside one module."""
        module = self.reference.get_submodule(name)
        inside = tuple(f"{name}.{key}".lstrip(".") for key, _ in module.named_children())
        if type(module).forward is nn.Sequential.forward:
            self._sequence(inside)
        else:
            for child in inside:
                self._sequence((child,))

    def _sequence(self, names: tuple[str, ...]) -> None:
        """Modules in a row: as one part, or cut where one of them has no program."""
        if not self._worthwhile(names):
            return
        try:
            self.parts.append(self._made(names))
        except _Slower as error:
            self.reasons[names[0]] = error.why
        except NotLowered as error:
            stranger = _PLACE.search(error.where) if len(names) > 1 else None
            if stranger is not None:
                place = int(stranger[1])
                for some in (names[:place], names[place : place + 1], names[place + 1 :]):
                    self._sequence(some)
            elif len(names) > 1:
                for name in names:
                    self._sequence((name,))
            else:
                self.reasons[names[0]] = _reason(names[0], error)
                self.find(names[0])

    def _worthwhile(self, names: tuple[str, ...]) -> bool:
        """A single layer or neuron gains nothing by being a program."""
        modules = [m for n in names for m in self.reference.get_submodule(n).modules()]
        layers = sum(is_weight_layer(m) for m in modules)
        return layers > 0 and (layers > 1 or bool(self._specs(names)))

    def _specs(self, names: tuple[str, ...]) -> list[NeuronSpec]:
        prefixes = tuple(f"{name}." for name in names)
        return [s for n, s in self.neurons.items() if n in names or n.startswith(prefixes)]

    def _made(self, names: tuple[str, ...]) -> _Part:
        seen = [self.seen.get(name, _Seen()) for name in names]
        if any(each.calls != 1 for each in seen):
            raise NotLowered("", "one forward does not call it once")
        if seen[0].given is None:
            raise NotLowered("", "it is given something else than one float tensor")
        for spec in self._specs(names):
            if not spec.returns_state and spec.reset_call not in (*REACHED, None):
                raise NotLowered("", f"the reset of {spec.framework} does not reach a program")
        modules = [self.reference.get_submodule(name) for name in names]
        part = modules[0] if len(names) == 1 else nn.Sequential(*modules).eval()
        program = made_program(
            *(part, (seen[0].given,), self.dtype, self.nm), check=self.check, memory=self.memory
        )
        here = [self.engine.get_submodule(name) for name in names]
        now = here[0] if len(names) == 1 else nn.Sequential(*here).eval()
        with torch.no_grad(), preserved(now, guarded=False):
            seconds = take_turns({"now": now, "program": program}, (seen[0].given,))
        program.reset()
        gain = seconds["now"] / seconds["program"]
        if gain < GAINS:
            raise _Slower("", f"its program is no faster ({gain:.2f}x)")
        return _Part(names, program, gain)


def run_parts_as_programs(
    reference: nn.Module,
    engine: nn.Module,
    report: PackReport,
    args: tuple[Any, ...],
    why: str,
    *,
    dtype: torch.dtype | None,
    nm: NM | None,
    check: bool,
    memory: Memory,
) -> PackReport:
    """Put programs in the place of the parts of an engine that have one.

    Args:
        reference: a copy of the model, at rest.
        engine: changed in place.
        report: of the engine.
        args: of one forward.
        why: there is no program of the whole.
        dtype: of stored weights, or None.
        nm: what layers must be that are not dense, or None.
        check: compare each part with its modules.
        memory: whether weights stay packed in memory.

    Returns:
        The report with its parts.
    """
    parts = _Parts(reference, engine, args, dtype, nm, check=check, memory=memory)
    parts.find()
    before = {n: engine.get_submodule(n) for part in parts.parts for n in part.names}
    for part in parts.parts:
        _set(engine, part.names[0], ProgramPart(part.engine, part.names))
        for name in part.names[1:]:
            _set(engine, name, nn.Identity())
    whole = report.whole
    if parts.parts and whole is not None:
        with torch.no_grad(), preserved(reference, guarded=False), preserved(engine, guarded=False):
            seconds = take_turns({"model": reference, "engine": engine}, args)
        least = max(1.0, whole.gain / NOISE)
        whole = WholeForward(1e3 * seconds["model"], 1e3 * seconds["engine"], "parts")
        if whole.gain < least:
            why = f"{why} The whole gains nothing by the programs of its parts ({whole.gain:.2f}x)."
            whole = report.whole
            for name, module in before.items():
                _set(engine, name, module)
            parts.parts.clear()
    rest = {"": why, **{n: w for n, w in parts.reasons.items() if _stands(engine, n)}}
    firsts = {part.names[0]: part for part in parts.parts}
    milliseconds = _milliseconds(engine, [*rest, *firsts], args)
    rows = [
        PartReport(part.names, "", milliseconds[first], part.gain) for first, part in firsts.items()
    ]
    rows += [PartReport((name,), reason, milliseconds[name]) for name, reason in rest.items()]
    for part in parts.parts:
        part.engine.reset()
    return replace(report, whole=whole, parts=tuple(rows))


def _reason(name: str, error: NotLowered) -> str:
    """Why a module has no program, with names as the whole model has them."""
    if not error.where:
        return error.why
    what, inside, scope = error.where.rpartition(" in ")
    if scope == "the forward":
        return f"{what} in the forward of {name}: {error.why}"
    return f"{what}{inside}{name}.{scope}: {error.why}"


def _stands(engine: nn.Module, name: str) -> bool:
    """Whether a module is still where it was: it may lie inside a part."""
    try:
        return not isinstance(engine.get_submodule(name), nn.Identity)
    except AttributeError:
        return False


def _set(engine: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    engine.get_submodule(parent)._modules[key] = new


def _calls(model: nn.Module, args: tuple[Any, ...]) -> dict[str, _Seen]:
    """How often one forward calls each module, and what it gives it."""
    seen: dict[str, _Seen] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, given: Any, kwargs: Any) -> None:
            each = seen.setdefault(name, _Seen())
            each.calls += 1
            one = len(given) == 1 and isinstance(given[0], Tensor) and not kwargs
            each.given = given[0].clone() if one and given[0].dtype == torch.float32 else None

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), preserved(model):
            model(*as_given(args))
    except Exception as error:  # the model's own forward may raise anything
        raise PackError(f"the model does not run on the examples: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _milliseconds(engine: nn.Module, names: list[str], args: tuple[Any, ...]) -> dict[str, float]:
    """Of each module in one forward, without the time of those of the list inside it."""
    spent: dict[str, list[float]] = {name: [] for name in names}
    running: list[list[float]] = []  # start, and the time of inner ones

    def before(_module: nn.Module, _args: Any) -> None:
        running.append([time.perf_counter(), 0.0])

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, _out: Any) -> None:
            start, inner = running.pop()
            whole = time.perf_counter() - start
            spent[name][-1] += whole - inner
            if running:
                running[-1][1] += whole

        return hook

    handles: list[Any] = []
    try:
        for name in names:
            module = engine.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after(name)))
        with torch.no_grad(), preserved(engine, guarded=False):
            for _ in range(FORWARDS):
                for each in spent.values():
                    each.append(0.0)
                engine(*as_given(args))
    finally:
        for handle in handles:
            handle.remove()
    return {name: 1e3 * statistics.median(runs) for name, runs in spent.items()}
