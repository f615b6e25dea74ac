# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for packages that model files import at the top but never need to build a network."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

__all__ = ["stand_in"]


class _Anything:
    """Accepts every call, attribute and subclassing, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # used as a decorator (@register_model) it hands the function back
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _StandInClass(type):
    """Classes of a stand-in: enumerations such as ``InterpolationMode.NEAREST`` included."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _StandInModule(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - a package, so that its submodules can be imported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandInClass(name, (_Anything,), {}) if name[:1].isupper() else _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = set(roots)

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".", maxsplit=1)[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in(*packages: str) -> None:
    """Make each of ``packages`` importable where it is not installed; installed ones stay real."""
    missing = [
        name
        for name in packages
        if name not in sys.modules and importlib.util.find_spec(name) is None
    ]
    if missing:
        sys.meta_path.append(_Finder(missing))
