# SPDX-License-Identifier: Apache-2.0
"""Find each ``Function.apply`` that a model bound before a trace, and stand in for it meanwhile.

``self.act = ZIF.apply`` and ``act = ZIF.apply`` at the top of a file hold what torch's class gave
them then: replacing the class's attribute comes too late.  So what the code of a model can reach is
searched: attributes of its modules, nested in containers and plain objects; closures, defaults and
named globals of its functions, and of the functions that these name.  Where one is hidden better,
its operations are recorded one by one instead.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spikenm_fx.trace.execution.intercept import BoundApply, function_of_apply

__all__ = ["standing_in_for_bound_applies"]

_STEPS = 8
"""From a module to an apply: attribute, container, function, global, ... at most so many."""

_MOST = 20_000
"""Objects that are looked at, however large what a model holds is."""

_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "einops", "networkx"}
"""Packages whose code binds no Function of a model."""

_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = str | bytes | int | float | complex | Tensor | torch.dtype | torch.device | torch.Size

Change: TypeAlias = tuple[Callable[[Any], object], Any, Any]
"""What puts a value into its place, the value that was there, and the one that goes there."""


@contextlib.contextmanager
def standing_in_for_bound_applies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block what the code of ``modules`` bound early passes this thread's watchers.

    Args:
        modules: those whose forward is followed; submodules are not added.
    """
    changes = _Search().changes(modules)
    done: list[Change] = []
    try:
        for change in changes:
            put, _, new = change
            with contextlib.suppress(AttributeError, TypeError):  # a class that lets nobody write
                put(new)
                done.append(change)
        yield
    finally:
        for put, old, _ in reversed(done):
            put(old)


class _Search:
    """Breadth first from modules to everything that their code may call."""

    def __init__(self) -> None:
        self._found: list[Change] = []
        self._known: dict[int, tuple[Any, Any]] = {}  # value and what stands for it, by id
        self._queue: deque[tuple[Any, int]] = deque()

    def changes(self, modules: Iterable[nn.Module]) -> list[Change]:
        for module in modules:
            self._see(module, 0)
        while self._queue and len(self._known) < _MOST:
            value, steps = self._queue.popleft()
            if steps < _STEPS:
                self._open(value, steps + 1)
        return self._found

    def _see(self, value: Any, steps: int) -> Any:
        """What stands for ``value``: itself, unless it is an early apply or made of one."""
        if value is None or isinstance(value, _PLAIN):
            return value
        if id(value) not in self._known:
            self._known[id(value)] = (value, value)  # kept: ids stay unique
            self._known[id(value)] = (value, self._stand_in(value, steps))
        return self._known[id(value)][1]

    def _stand_in(self, value: Any, steps: int) -> Any:
        function = function_of_apply(value)
        if function is not None:
            return value if isinstance(value, BoundApply) else BoundApply(function)
        if isinstance(value, tuple):
            items = [self._see(item, steps) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return value._make(items) if hasattr(value, "_make") else tuple(items)
        if isinstance(value, functools.partial):
            given = (value.func, *value.args)
            named = {name: self._see(part, steps) for name, part in value.keywords.items()}
            same = all(named[name] is part for name, part in value.keywords.items())
            new = self._see(given, steps)
            return value if same and new is given else functools.partial(*new, **named)
        if isinstance(value, staticmethod):
            inner = self._see(value.__func__, steps)
            return value if inner is value.__func__ else staticmethod(inner)
        self._queue.append((value, steps))
        return value

    def _place(self, old: Any, put: Callable[[Any], object], steps: int) -> None:
        new = self._see(old, steps)
        if new is not old:
            self._found.append((put, old, new))

    def _items(self, holder: dict[Any, Any], names: Iterable[Any], steps: int) -> None:
        for name in names:
            self._place(holder[name], functools.partial(holder.__setitem__, name), steps)

    def _open(self, value: Any, steps: int) -> None:
        """Look at what ``value`` holds."""
        if isinstance(value, dict):
            self._items(value, list(value), steps)
        elif isinstance(value, list | deque):
            for index, item in enumerate(list(value)):
                self._place(item, functools.partial(value.__setitem__, index), steps)
        elif isinstance(value, types.FunctionType):
            self._open_function(value, steps)
        elif isinstance(value, types.MethodType):
            for part in (value.__func__, value.__self__):
                self._see(part, steps)
        elif isinstance(value, property | classmethod | functools.cached_property):
            names = ("fget", "__func__", "func")
            self._see(next(getattr(value, n) for n in names if hasattr(value, n)), steps)
        elif isinstance(value, type):
            self._open_class(value, steps)
        elif not isinstance(value, types.ModuleType) and not _is_foreign(type(value)):
            self._open_object(value, steps)

    def _open_object(self, value: Any, steps: int) -> None:
        held = getattr(value, "__dict__", None)
        if isinstance(held, dict):
            of_any = _OF_ANY_MODULE if isinstance(value, nn.Module) else ()
            self._items(held, [name for name in held if name not in of_any], steps)
        for cls in type(value).__mro__:
            if not _is_foreign(cls):
                self._see(cls, steps)

    def _open_class(self, cls: type, steps: int) -> None:
        if _is_foreign(cls) or issubclass(cls, torch.autograd.Function):
            return  # what happens inside of an apply is not recorded
        for name, member in list(vars(cls).items()):
            if not name.startswith("__") or name == "__call__":
                self._place(member, functools.partial(setattr, cls, name), steps)

    def _open_function(self, function: types.FunctionType, steps: int) -> None:
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                self._place(cell.cell_contents, functools.partial(_fill, cell), steps)
        put = functools.partial(setattr, function, "__defaults__")
        self._place(function.__defaults__, put, steps)
        if function.__kwdefaults__:
            self._items(function.__kwdefaults__, list(function.__kwdefaults__), steps)
        if vars(function):
            self._items(vars(function), list(vars(function)), steps)
        if not _is_foreign(function):
            self._open_named(function.__globals__, _names_in(function.__code__), steps)

    def _open_named(self, holder: dict[str, Any], names: Iterable[str], steps: int) -> None:
        """Globals that a function names, and through a module (``surrogates.act``) its own."""
        present = [name for name in names if name in holder]
        self._items(holder, present, steps)
        for name in present:
            module = holder[name]
            if isinstance(module, types.ModuleType) and not _is_foreign_name(module.__name__):
                inside = vars(module)
                self._items(inside, [n for n in names if n in inside], steps)


def _fill(cell: types.CellType, value: object) -> None:
    cell.cell_contents = value


def _names_in(code: types.CodeType) -> set[str]:
    nested = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*(_names_in(const) for const in nested))


def _is_foreign(value: Any) -> bool:
    return _is_foreign_name(getattr(value, "__module__", None))


def _is_foreign_name(name: object) -> bool:
    return not isinstance(name, str) or name.partition(".")[0] in _FOREIGN
