# SPDX-License-Identifier: Apache-2.0
"""See every ``autograd.Function.apply`` of this thread, also those bound long before.

While at least one trace runs, ``autograd.Function`` has another attribute ``apply``, which asks
this thread's watchers; other threads and calls that no watcher wants go straight to torch's own.
What a model bound before (``self.act = ZIF.apply``) no attribute can reach:
:mod:`~spikenm_fx.trace.execution.bound` finds it.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

__all__ = ["BoundApply", "Watcher", "function_of_apply", "watch_applies"]

Watcher: TypeAlias = Callable[[type, tuple[Any, ...], dict[str, Any]], Any]
"""Called with ``(Function, args, kwargs)``; returns a result, or NotImplemented to let it run."""

_lock = threading.Lock()
_local = threading.local()
_depth = 0
_inherited = False  # whether torch's own ``apply`` came from a base of Function
_original: Any = None


def _dispatch(function: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    watchers: list[Watcher] = getattr(_local, "watchers", [])
    if watchers:  # of traces within traces the innermost: what it runs is no business of the others
        result = watchers[-1](function, args, kwargs)
        if result is not NotImplemented:
            return result
    # whoever bound the replacement during a trace may call it long after
    return _original.__get__(None, function)(*args, **kwargs)


@classmethod  # type: ignore[misc]
def _replacement(cls: type, *args: Any, **kwargs: Any) -> Any:
    return _dispatch(cls, args, kwargs)


@contextlib.contextmanager
def watch_applies(watcher: Watcher) -> Iterator[None]:
    """Show ``watcher`` every ``Function.apply`` that this thread makes inside the block."""
    watchers: list[Watcher] = _local.__dict__.setdefault("watchers", [])
    _enter()
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)
        _leave()


def _enter() -> None:
    global _depth, _inherited, _original
    function = torch.autograd.Function
    with _lock:
        _depth += 1
        if _depth == 1:
            _original = inspect.getattr_static(function, "apply")
            _inherited = "apply" not in vars(function)
            function.apply = _replacement  # type: ignore[method-assign]


def _leave() -> None:
    global _depth
    function = torch.autograd.Function
    with _lock:
        _depth -= 1
        if _depth == 0:
            if _inherited:
                del function.apply
            else:
                function.apply = _original  # type: ignore[method-assign]


class BoundApply:
    """Stands for a ``Function.apply`` that was bound before the trace began.

    Like what it stands for it does not become a method where it is an attribute of a class.
    """

    __name__ = "apply"

    def __init__(self, function: type) -> None:
        self.__self__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, past this thread's watchers."""
        return _dispatch(self.__self__, args, kwargs)


def function_of_apply(value: object) -> type | None:
    """The ``autograd.Function`` whose ``apply`` is ``value``; None for anything else.

    Depending on torch's version that is a bound method or a builtin.
    """
    if not isinstance(value, types.MethodType | types.BuiltinMethodType | BoundApply):
        return None
    owner = value.__self__
    if value.__name__ != "apply" or not isinstance(owner, type):
        return None
    return owner if issubclass(owner, torch.autograd.Function) else None
