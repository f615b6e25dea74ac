# SPDX-License-Identifier: Apache-2.0
"""Copy a parameter only when somebody is about to write into it.

A copy of every parameter would cost as much memory as the model, and a forward rarely writes into
one.  So each operation that reaches the dispatcher is looked at before it runs: where its schema
says that it writes into a watched storage, that is copied first.  Handing the memory out (to numpy)
counts as a write.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spikenm_fx._torch import (
    DisableTorchFunction,
    DispatchMode,
    storage_id,
    tree_flatten,
    written_arguments,
)

__all__ = ["Watched", "watching"]

_written = functools.lru_cache(maxsize=2048)(written_arguments)
_EXPORTS = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)


class Watched:
    """A parameter or gradient, kept by sharing its memory until that is written into."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.storage = storage_id(tensor)
        self._alias = tensor.detach()
        self._copy: Tensor | None = None

    @property
    def written(self) -> bool:
        """Whether anything was about to write into it."""
        return self._copy is not None

    def save(self) -> None:
        """Copy the values, once, before the first write."""
        if self._copy is None:
            self._copy = self._alias.clone()

    def restore(self) -> None:
        """Give the tensor its own memory back, and that its values."""
        now, then = self.tensor, self._alias
        moved = now.data_ptr() != then.data_ptr() or storage_id(now) != self.storage
        if moved or (now.shape, now.stride(), now.dtype) != (then.shape, then.stride(), then.dtype):
            now.data = then
        if self._copy is not None and not _alike(now, self._copy):
            now.data.copy_(self._copy)


def _alike(now: Tensor, then: Tensor) -> bool:
    """Equal, NaN included: what nobody wrote into keeps its version."""
    if torch.equal(now, then) or not now.is_floating_point():
        return torch.equal(now, then)
    return bool(((now == then) | (now.isnan() & then.isnan())).all())


@contextlib.contextmanager
def watching(parameters: Iterable[Watched]) -> Iterator[None]:
    """Save each of ``parameters`` before anything this thread does inside writes into it."""
    by_storage: dict[int, list[Watched]] = {}
    for watched in parameters:
        by_storage.setdefault(watched.storage, []).append(watched)
    if not by_storage:
        yield
        return
    with _BeforeWrites(by_storage), _BeforeExports(by_storage):
        yield


class _BeforeWrites(DispatchMode):
    def __init__(self, watched: dict[int, list[Watched]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = _written(func)
        if places is None:
            _save(self.watched, (args, kwargs))
        for index, name in places or ():
            _save(self.watched, args[index] if index < len(args) else kwargs.get(name))
        with DisableTorchFunction():  # no second telling of it to the tracer
            return func(*args, **kwargs)


class _BeforeExports(TorchFunctionMode):
    def __init__(self, watched: dict[int, list[Watched]]) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _EXPORTS:
            _save(self.watched, args[0])
        return func(*args, **(kwargs or {}))


def _save(watched: dict[int, list[Watched]], argument: Any) -> None:
    for tensor in tree_flatten(argument)[0]:
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            for parameter in watched.get(storage_id(tensor), ()):
                parameter.save()
