# SPDX-License-Identifier: Apache-2.0
"""The last reading of a model, kept for the next verb: ``plan`` reads what ``trace`` has read.

It is handed on only where everything that the forward can reach plainly is as it was: the model's
modules, tensors and attributes, the classes' methods and the plain globals that these name, and the
example.  Where something cannot be told at a glance, nothing is kept and the model is read anew.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["Seen", "keep", "kept", "look_at"]

_MOST = 20_000
"""Objects that are looked at; a model that reaches more is read anew each time."""

_DEPTH = 100
"""From the model to an object: attribute, container, function, global, ... at most so many."""

_VALUES = (
    *(int, float, complex, str, bytes, range, enum.Enum, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)

_OF_C = (
    *(types.ModuleType, types.BuiltinFunctionType, types.BuiltinMethodType),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
)
"""What has a name and nothing inside that somebody would change."""

_lock = threading.Lock()


class _Unclear(Exception):
    """Whether something has changed cannot be told."""


class _Same:
    """Equal to another look at the very same object, which it does not keep alive."""

    __slots__ = ("ref",)

    def __init__(self, value: Any) -> None:
        try:
            self.ref = weakref.ref(value)
        except TypeError as error:
            raise _Unclear from error

    def __eq__(self, other: object) -> bool:
        mine = self.ref()
        return isinstance(other, _Same) and mine is not None and mine is other.ref()

    __hash__ = None  # type: ignore[assignment]


Seen = tuple[Any, ...]
"""What was seen of a model and an example: equal where a forward would do the same."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """One reading: of which model, what was seen then, and the graph."""

    model: weakref.ref[nn.Module]
    seen: Seen
    graph: SpikingGraph


_last: list[_Kept] = []


def look_at(model: nn.Module, args: Any, kwargs: Mapping[str, Any], *further: Any) -> Seen | None:
    """What the forward of ``model`` can depend on; None where that cannot be told.

    Args:
        model: the model.
        args: positional arguments of the forward.
        kwargs: its keyword arguments.
        *further: what else the reading depends on.
    """
    try:
        seen = _Look().all_of((model, args, dict(kwargs), torch.get_default_dtype(), *further), 0)
    except (_Unclear, RuntimeError):  # of tensors that have no version, or memory, to ask for
        return None
    return (*seen, _sums(model))


def kept(model: nn.Module, seen: Seen | None) -> SpikingGraph | None:
    """The graph of the last reading, where it was one of ``model`` as it is now."""
    with _lock:
        last = _last[0] if _last else None
    if last is None or seen is None or last.model() is not model:
        return None
    return last.graph if last.seen == seen else None


def keep(model: nn.Module, seen: Seen | None, graph: SpikingGraph) -> None:
    """Keep the reading until the next one, or until nobody holds ``model`` any more."""
    with _lock:
        _last.clear()
        operations = graph.operations
        if seen is None or operations is None:
            return
        if any(node.meta.get("module") is model for node in operations.nodes):
            return  # it would never be let go
        _last.append(_Kept(weakref.ref(model, _forget), seen, graph))


def _forget(_: object) -> None:
    _last.clear()


@torch.no_grad()
def _sums(model: nn.Module) -> list[float]:
    """Sums of all parameters: writing through ``.data`` leaves no other trace."""
    tensors = [p for p in nn.Module.parameters(model) if p.device.type == "cpu"]
    return [float(p.detach().sum()) for p in tensors if not p.is_complex()]


class _Look:
    """Takes apart what a forward can reach."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}  # number and object, by id

    def all_of(self, values: Iterable[Any], depth: int) -> tuple[Any, ...]:
        """What is seen of each."""
        return tuple([self.one(value, depth + 1) for value in values])

    def one(self, value: Any, depth: int) -> Any:
        """What is seen of one value.

        Raises:
            _Unclear: where another look could not tell whether it has changed.
        """
        if isinstance(value, _VALUES):
            return (type(value), str(value) if isinstance(value, float) else value)
        if id(value) in self._known:
            return ("again", self._known[id(value)][0])
        if depth > _DEPTH or len(self._known) > _MOST:
            raise _Unclear
        self._known[id(value)] = (len(self._known), value)
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, list | tuple):
            return (type(value), self.all_of(value, depth))
        if isinstance(value, dict):
            keys = self.all_of(value, depth)
            return (type(value), keys, self.all_of(value.values(), depth))
        if isinstance(value, set | frozenset):
            return (type(value), self.all_of(sorted(value, key=repr), depth))
        if isinstance(value, slice):
            return (slice, self.all_of((value.start, value.stop, value.step), depth))
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if isinstance(value, _OF_C):
            return ("by name", getattr(value, "__qualname__", value.__name__))
        if isinstance(value, type):
            return (_Same(value), self._class(value, depth))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return (self.one(value.__func__, depth + 1), self.one(value.__self__, depth + 1))
        return self._object(value, depth)

    def _module(self, module: nn.Module, depth: int) -> Any:
        held = {k: v for k, v in vars(module).items() if k != "training"}
        return (_Same(module), self.one(type(module), depth + 1), self.one(held, depth + 1))

    def _object(self, value: Any, depth: int) -> Any:
        held = getattr(value, "__dict__", None)
        if held is None or type(value).__module__ in ("numpy", "_thread", "random"):
            raise _Unclear
        return (self.one(type(value), depth + 1), self.one(dict(held), depth + 1))

    def _class(self, cls: type, depth: int) -> Any:
        if _is_foreign(cls.__module__):
            return None
        members = {k: v for k, v in vars(cls).items() if not k.startswith("__") or callable(v)}
        plain = {
            k: v.__func__ if isinstance(v, staticmethod | classmethod) else v
            for k, v in members.items()
            if isinstance(v, (types.FunctionType, staticmethod, classmethod, *_VALUES))
        }
        bases = [base for base in cls.__bases__ if not _is_foreign(base.__module__)]
        return (self.one(plain, depth + 1), self.all_of(bases, depth))

    def _function(self, function: types.FunctionType, depth: int) -> Any:
        if _is_foreign(function.__module__):
            return _Same(function)
        cells = [_content(cell) for cell in function.__closure__ or ()]
        names, named_globals = _names_in(function.__code__)
        known = function.__globals__
        named = {n: known[n] for n in sorted(named_globals) if n in known}
        read = {n: v for n, v in named.items() if not isinstance(v, types.ModuleType)}
        for name, module in named.items():
            if isinstance(module, types.ModuleType) and not _is_foreign(module.__name__):
                inside = {k: v for k, v in vars(module).items() if k in names}
                read |= {f"{name}.{k}": v for k, v in inside.items()}
        parts = (cells, function.__defaults__, function.__kwdefaults__, read)
        return (_Same(function), _Same(function.__code__), self.all_of(parts, depth))


_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "einops"}


def _is_foreign(module: str | None) -> bool:
    """Whether nobody changes what the package does between two readings."""
    return module is None or module.partition(".")[0] in _FOREIGN


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """All names in the code, and those of them that are globals."""
    read = {
        i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    every = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner, inner_read = _names_in(const)
            every, read = every | inner, read | inner_read
    return frozenset(every), frozenset(read)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _tensor(value: Tensor) -> Any:
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout is not torch.strided:
        raise _Unclear
    where = (value.data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
    return (_Same(value), value._version, where, value.dtype, value.device)
