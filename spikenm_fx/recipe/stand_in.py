# SPDX-License-Identifier: Apache-2.0
"""Import research code whose imports are not all here, without pretending for longer than that.

Model files import loggers, data loaders and GPU back ends at their top that building the model
never uses; others name a module by a path of an older release.  Within :func:`standing_in` the
former are inert and the latter lead to today's path; what is installed stays real.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

__all__ = ["stand_in", "standing_in", "switched_off"]


Feature = Literal["extensions", "torchscript"]
"""What of torch can be off while importing; see :func:`switched_off`."""


class _InertType(type):
    """Enumerations, e.g. ``InterpolationMode.NEAREST``."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()


class _Inert(metaclass=_InertType):
    """Takes any call, attribute or subclass and does nothing, also as a decorator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Inert()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()


class _InertModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _InertType(name, (_Inert,), {}) if name[:1].isupper() else _Inert()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def switched_off(features: Iterable[Feature]) -> Iterator[None]:
    """Within it, files import without some of torch's import-time machinery.

    Args:
        features: ``"extensions"``: kernels that files compile while they are imported
            (``torch.utils.cpp_extension.load``) are inert; ``"torchscript"``: ``ScriptModule`` is
            ``nn.Module`` and ``script_method`` leaves methods as they are.
    """
    with contextlib.ExitStack() as stack:
        for feature in features:
            for owner, name, value in _SWITCHES[feature]():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
        yield


Switch = tuple[Any, str, Any]  # owner, attribute, what it is while the feature is off


def _extensions() -> tuple[Switch, ...]:
    # It brings setuptools, which changes sys.path: imported only where somebody asks.
    from torch.utils import cpp_extension

    return (cpp_extension, "load", _Inert()), (cpp_extension, "load_inline", _Inert())


def _torchscript() -> tuple[Switch, ...]:
    import torch

    def plain(method: Any) -> Any:
        return method

    return (torch.jit, "ScriptModule", torch.nn.Module), (torch.jit, "script_method", plain)


_SWITCHES: dict[Feature, Callable[[], tuple[Switch, ...]]] = {
    "extensions": _extensions,
    "torchscript": _torchscript,
}


@contextlib.contextmanager
def standing_in(packages: Iterable[str], aliases: Mapping[str, str]) -> Iterator[None]:
    """Within it, missing ``packages`` import as inert modules and ``aliases`` lead elsewhere.

    Args:
        packages: top-level packages; those that are installed stay what they are.
        aliases: old module path to the present one, e.g. ``spikingjelly.cext.neuron`` to
            ``spikingjelly.clock_driven.neuron``; an old path that can be imported stays what it is.
    """
    missing = frozenset(name for name in packages if not _exists(name))
    before = set(sys.modules)
    finder = _Finder(missing)
    sys.meta_path.append(finder)
    added: set[str] = set()
    try:
        for old, new in aliases.items():
            if not _imports(old):
                added |= _alias(old, new)
        yield
    finally:
        sys.meta_path.remove(finder)
        inert = {n for n in set(sys.modules) - before if n.partition(".")[0] in missing}
        for name in inert | added:
            sys.modules.pop(name, None)


def stand_in(*packages: str) -> None:
    """Let missing ``packages`` import as inert modules for the rest of the process.

    Args:
        packages: top-level packages; those that are installed stay what they are.
    """
    missing = frozenset(name for name in packages if not _exists(name))
    if missing:
        sys.meta_path.append(_Finder(missing))


def _alias(old: str, new: str) -> set[str]:
    parent, _, name = old.rpartition(".")
    added = {old}
    if parent and not _exists(parent):
        sys.modules[parent] = _InertModule(parent)
        added.add(parent)
    sys.modules[old] = importlib.import_module(new)
    if parent in added:
        setattr(sys.modules[parent], name, sys.modules[old])
    return added


def _imports(name: str) -> bool:
    """Whether ``name`` imports: the old path may exist and need an extension nobody built."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _exists(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
