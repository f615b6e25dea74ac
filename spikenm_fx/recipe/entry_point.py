# SPDX-License-Identifier: Apache-2.0
"""``"module:name"`` to the object: importlib and getattr, inside what the user allowed.

A recipe is data from somebody else.  It may name code of the checkout that the user points at and
of known SNN packages, and nothing more: ``os:system`` is refused before anything is imported, and
so is reaching ``os`` through a module that happens to import it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from spikenm_fx.errors import RecipeError, near_misses
from spikenm_fx.recipe.stand_in import Feature, standing_in, switched_off

__all__ = ["FRAMEWORKS", "EntryPoint", "Root"]

FRAMEWORKS = frozenset(
    {
        "bindsnet",
        "braincog",
        "lava",
        "norse",
        "rockpool",
        "sinabs",
        "snntorch",
        "spikenm_fx",
        "spikingjelly",
        "torch",
    }
)
"""Installed packages that recipes may name: their model classes, neurons and reset functions."""

_FORM = re.compile(
    r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z]\w*(\.[A-Za-z]\w*)*)"
)

# Inside torch, only what builds networks: torch.hub, torch.load and torch.utils run other code.
_TORCH_PARTS = ("torch.nn",)


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """A dotted name ``module:name``, e.g. ``models.spikformer:Spikformer``."""

    module: str
    name: str

    @classmethod
    def parse(cls, text: str) -> EntryPoint:
        """Read ``"package.module:Name"``.

        Raises:
            RecipeError: for any other form; private names are refused.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise RecipeError(
                f"entry point {text!r} is not of the form 'package.module:Name' "
                "(dotted names only; no private names, calls or brackets)"
            )
        return cls(found["module"], found["name"])

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


@dataclass(frozen=True, slots=True)
class Root:
    """Where entry points may come from: a folder of code, and the known frameworks.

    Attributes:
        folder: the checkout the user points at (put on ``sys.path`` only while importing), or None.
        packages: further top-level packages that the user allows.
        stand_ins: packages that may be inert while importing, where they are not installed.
        aliases: pairs of a module path of an older release and the present one.
        without: what of torch is off while importing.
    """

    folder: Path | None = None
    packages: frozenset[str] = frozenset()
    stand_ins: frozenset[str] = frozenset()
    aliases: tuple[tuple[str, str], ...] = ()
    without: frozenset[Feature] = frozenset()

    def resolve(self, text: str) -> Any:
        """The object that ``text`` names.

        Raises:
            RecipeError: if it is outside the root, cannot be imported, or does not exist.
        """
        entry = EntryPoint.parse(text)
        with self.importing():
            self._check_allowed(entry)
            module = _import(entry)
        found = _attribute(module, entry)
        self._check_home(found, entry)
        return found

    def replace(self, text: str, other: str) -> None:
        """Let the checkout's function ``text`` be ``other`` from now on.

        Raises:
            RecipeError: if ``text`` is not a name of a module of the checkout, or ``other`` is
                refused.
        """
        entry = EntryPoint.parse(text)
        self.resolve(text)
        module = sys.modules[entry.module]
        if "." in entry.name or not self._contains(module.__file__ or ""):
            raise RecipeError(
                f"replacement of {entry}: only functions of the checkout's own modules can be"
            )
        setattr(module, entry.name, self.resolve(other))

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """Within it, the folder comes first on ``sys.path``; afterwards the path is as before."""
        names = standing_in(self.stand_ins, dict(self.aliases))
        with names, switched_off(self.without), self._on_path():
            yield

    @contextlib.contextmanager
    def _on_path(self) -> Iterator[None]:
        if self.folder is None:
            yield
            return
        entry = str(self.folder.resolve())
        sys.path.insert(0, entry)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(entry)

    def _check_allowed(self, entry: EntryPoint) -> None:
        """Decide before any code of ``entry`` runs: only the top-level package is looked up."""
        if entry.package in FRAMEWORKS | self.packages:
            if entry.package == "torch" and not _within(entry.module, _TORCH_PARTS):
                raise RecipeError(f"entry point {entry}: of torch, recipes may name torch.nn only")
            return
        loaded = sys.modules.get(entry.package)
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(entry.package)
        if spec is None:
            where = f" and in {self.folder}" if self.folder is not None else ""
            raise RecipeError(
                f"entry point {entry}: no module {entry.package!r} among the installed packages"
                f"{where}; give the checkout's folder (--root), or install the package"
            )
        places = [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
        if not any(self._contains(place) for place in places):
            raise RecipeError(
                f"entry point {entry} is outside the allowed root: {entry.package!r} is at "
                f"{places[0] if places else 'an unknown place'}, the root is "
                f"{self.folder if self.folder is not None else 'not given'}; "
                "recipes may name code of the checkout and of known SNN frameworks only"
                f"{_hint_of(entry, places)}"
            )

    def _check_home(self, found: Any, entry: EntryPoint) -> None:
        """The object's own module must be allowed too, not only the one that re-exports it."""
        home = getattr(found, "__module__", None)
        if isinstance(found, ModuleType) or not callable(found) or not isinstance(home, str):
            raise RecipeError(
                f"entry point {entry} is a {type(found).__name__}; "
                "it must be a class or function defined in allowed code"
            )
        package = home.partition(".")[0]
        if package == "torch":
            allowed = _within(home, (*_TORCH_PARTS, "torch.autograd"))
        elif package in FRAMEWORKS | self.packages:
            allowed = True
        else:
            file = getattr(sys.modules.get(home), "__file__", None)
            allowed = isinstance(file, str) and self._contains(file)
        if not allowed:
            raise RecipeError(
                f"entry point {entry} is defined in {home!r}, outside the allowed root "
                f"{self.folder if self.folder is not None else '(none given)'}"
            )

    def _contains(self, place: str) -> bool:
        if self.folder is None:
            return False
        return Path(place).resolve().is_relative_to(self.folder.resolve())


def _hint_of(entry: EntryPoint, places: list[str]) -> str:
    """How to allow an installed package; nothing for Python's own modules."""
    if not places or entry.package in sys.stdlib_module_names:
        return ""
    return f"; if you trust it, point at it: --root {Path(places[0]).parent}"


def _within(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def _import(entry: EntryPoint) -> ModuleType:
    try:
        return importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        missing = error.name or entry.module
        if missing == entry.module or entry.module.startswith(missing + "."):
            raise RecipeError(f"entry point {entry}: there is no module {missing!r}") from error
        raise RecipeError(
            f"entry point {entry}: importing it needs the "
            f"{'module' if '.' in missing else 'package'} {missing!r}, which is not installed"
        ) from error
    except Exception as error:
        raise RecipeError(
            f"entry point {entry}: importing {entry.module!r} raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _attribute(module: ModuleType, entry: EntryPoint) -> Any:
    found: Any = module
    for part in entry.name.split("."):
        if isinstance(found, ModuleType) and found is not module:
            raise RecipeError(f"entry point {entry} reaches through the module {found.__name__!r}")
        if not hasattr(found, part):
            public = [name for name in dir(found) if not name.startswith("_")]
            near = near_misses(part, public, count=3, cutoff=0.5)
            hint = f"; near: {near}" if near else ""
            raise RecipeError(f"entry point {entry}: {module.__name__!r} has no {part!r}{hint}")
        found = getattr(found, part)
    return found
