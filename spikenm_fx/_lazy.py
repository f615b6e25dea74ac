# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

__all__ = ["attach"]


def attach(package: str, homes: Mapping[str, str]) -> None:
    """Let ``package`` have the names of ``homes``, each imported from its module at first use.

    A name may be that of the module it lives in (``fold`` of ``fold``): it is the function, also
    after somebody imported the module, which Python would else put in its place.  Modules of the
    package that are no such names are imported when they are asked for, too.

    Args:
        package: ``__name__`` of the package, from its own ``__init__``.
        homes: absolute module by name.
    """

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in homes:
                inner = f"{package}.{name}"
                if name.startswith("_") or importlib.util.find_spec(inner) is None:
                    raise AttributeError(f"module {package!r} has no attribute {name!r}")
                return importlib.import_module(inner)
            found = getattr(importlib.import_module(homes[name]), name)
            super().__setattr__(name, found)
            return found

        def __setattr__(self, name: str, value: object) -> None:
            if not (name in homes and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *homes})

    sys.modules[package].__class__ = Lazy
