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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ["Watched", "watching"]

_EXPORTS = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)


class Watched:
    """A parameter or gradient, kept by sharing its memory until that is written into."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.storage = _storage(tensor)
        self._alias = tensor.detach()
        self._copy: Tensor | None = None

    def save(self) -> None:
        """Copy the values, once, before the first write."""
        if self._copy is None:
            self._copy = self._alias.clone()

    def restore(self) -> None:
        """Give the tensor its own memory back, and that its values."""
        now, then = self.tensor, self._alias
        moved = now.data_ptr() != then.data_ptr() or _storage(now) != self.storage
        if moved or (now.shape, now.stride(), now.dtype) != (then.shape, then.stride(), then.dtype):
            now.data = then
        if self._copy is not None and not torch.equal(now, self._copy):
            now.data.copy_(self._copy)


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


class _BeforeWrites(TorchDispatchMode):
    def __init__(self, watched: dict[int, list[Watched]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for index, name in _written(func):
            _save(self.watched, args[index] if index < len(args) else kwargs.get(name))
        with torch._C.DisableTorchFunction():  # no second telling of it to the tracer
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
            for parameter in watched.get(_storage(tensor), ()):
                parameter.save()


@functools.lru_cache(maxsize=2048)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that ``func`` writes into."""
    # batch norms write their running statistics without saying so
    silent = "batch_norm" in func._schema.name
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if silent or (argument.alias_info is not None and argument.alias_info.is_write)
    )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
