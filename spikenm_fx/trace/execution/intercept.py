# SPDX-License-Identifier: Apache-2.0
"""See every ``autograd.Function.apply`` of this thread, also those bound long before.

Models keep ``self.act = ZIF.apply``: a bound method that no patched attribute can reach.  All of
these methods share one function object, so its code is what is exchanged, for as long as at least
one trace runs; other threads and un-watched calls go straight to the original.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch

__all__ = ["Watcher", "watch_applies"]

Watcher: TypeAlias = Callable[[type, tuple[Any, ...], dict[str, Any]], Any]
"""Called with ``(Function, args, kwargs)``; returns a result, or NotImplemented to let it run."""

_shared: Any = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
_original: Any = types.FunctionType(
    _shared.__code__, _shared.__globals__, "apply", _shared.__defaults__, _shared.__closure__
)
_lock = threading.Lock()
_local = threading.local()
_depth = 0


class _Replacement(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Run with the globals of torch's own module, hence the import and no name of ours."""
        from spikenm_fx.trace.execution.intercept import _dispatch

        # Naming __class__ gives this code the one free variable that the original's super() has:
        # a code object only fits a function with as many.
        __class__  # type: ignore[name-defined]  # noqa: B018
        return _dispatch(cls, args, kwargs)


def _dispatch(function: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for watcher in reversed(getattr(_local, "watchers", ())):
        result = watcher(function, args, kwargs)
        if result is not NotImplemented:
            return result
    return _original(function, *args, **kwargs)


@contextlib.contextmanager
def watch_applies(watcher: Watcher) -> Iterator[None]:
    """Show ``watcher`` every ``Function.apply`` that this thread makes inside the block."""
    global _depth
    watchers: list[Watcher] = _local.__dict__.setdefault("watchers", [])
    watchers.append(watcher)
    with _lock:
        _depth += 1
        if _depth == 1:
            _shared.__code__ = _Replacement.apply.__func__.__code__  # type: ignore[attr-defined]
    try:
        yield
    finally:
        watchers.remove(watcher)
        with _lock:
            _depth -= 1
            if _depth == 0:
                _shared.__code__ = _original.__code__
