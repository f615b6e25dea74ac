# SPDX-License-Identifier: Apache-2.0
"""From a recipe to the running thing: the model, a batch of random input, a reset, one forward."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import RecipeError
from spikenm_fx.recipe.entry_point import FRAMEWORKS, EntryPoint, Root
from spikenm_fx.recipe.schema import Inputs, Recipe

__all__ = [
    "build_model",
    "example_input",
    "find_checkout",
    "forward",
    "missing_requirements",
    "provided",
    "reset_function",
    "root_of",
    "to_entry",
]

_OBJECT_KEYS = ("ref", "call", "partial")


def find_checkout(repo: str, folder: Path) -> Path | None:
    """The checkout of ``owner/name`` in a folder of checkouts.

    Looked for as ``owner+name``, ``owner/name``, ``owner_name``, ``owner-name`` and ``name``.
    """
    owner, _, name = repo.partition("/")
    names = (f"{owner}+{name}", f"{owner}/{name}", f"{owner}_{name}", f"{owner}-{name}", name)
    return next((folder / entry for entry in names if (folder / entry).is_dir()), None)


def root_of(recipe: Recipe, folder: Path | None = None) -> Root:
    """Where the recipe's entry points may come from.

    Args:
        recipe: the recipe.
        folder: the checkout itself, or a folder of checkouts; the current folder by default where
            the code is the user's own (``local/NAME``); for packages that are no framework, where
            they are installed.

    Raises:
        RecipeError: if the recipe needs a checkout and none is there.
    """
    target = recipe.target
    imports = Root(
        stand_ins=frozenset(target.stand_ins),
        aliases=tuple(target.aliases.items()),
        without=frozenset(target.without),
    )
    module = EntryPoint.parse(target.build).package
    if target.repo is None:
        # An installed package that is no framework is allowed by pointing at where it is.
        return imports if module in FRAMEWORKS else dataclasses.replace(imports, folder=folder)
    if folder is None and target.is_local:
        folder = Path.cwd()
    if folder is None:
        raise RecipeError(
            f"{target.repo} is code that you bring: clone it (tried at commit {target.commit}) and "
            "give its folder, or the folder that holds your checkouts, with --root"
        )
    if not folder.is_dir():
        raise RecipeError(f"the root {folder} is not a folder")
    inner = folder / target.path
    here = (inner / module).is_dir() or (inner / f"{module}.py").is_file()
    # The folder may be the checkout itself; then the entry point's package is in it.
    checkout = folder if here and target.is_local else find_checkout(target.repo, folder)
    if checkout is None and here:
        checkout = folder
    if checkout is None:
        owner, _, name = target.repo.partition("/")
        raise RecipeError(
            f"no checkout of {target.repo} in {folder} (looked for {owner}+{name}, "
            f"{owner}/{name}, {name}, and for {module!r} in {inner}); give the folder that holds "
            "it with --root"
        )
    inner = (checkout / target.path).resolve()
    if not inner.is_relative_to(checkout.resolve()):
        raise RecipeError(f"target.path {target.path!r} leads outside the checkout {checkout}")
    if not inner.is_dir():
        raise RecipeError(f"target.path {target.path!r} is not a folder of {checkout}")
    return dataclasses.replace(imports, folder=inner)


def provided(recipe: Recipe, folder: Path | None) -> list[str]:
    """Folders of package versions that lie beside the checkouts for this recipe alone.

    ``pip install --no-deps --target ROOT/_site/NAME-VERSION NAME==VERSION`` provides one.
    """
    places = [
        Path(folder or ".") / "_site" / requirement.replace("==", "-")
        for requirement in (recipe.target.requires if folder is not None else [])
    ]
    return [str(place.resolve()) for place in places if place.is_dir()]


def missing_requirements(requires: Sequence[str]) -> list[str]:
    """Which of ``name`` or ``name==version`` are not installed, each with what is there instead."""
    lacking = []
    for requirement in requires:
        name, _, version = (part.strip() for part in requirement.partition("=="))
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(f"{requirement} (not installed)")
            continue
        if version and found != version:
            lacking.append(f"{requirement} ({found} is installed)")
    return lacking


def build_model(recipe: Recipe, root: Root) -> nn.Module:
    """Construct the model the recipe names; weights are the constructor's own.

    Raises:
        RecipeError: if an entry point is refused, a package is missing, an argument does not fit,
            or the result is not a module.
    """
    target = recipe.target
    try:
        factory = root.resolve(target.build)
        for old, new in target.replacements.items():
            root.replace(old, new)
        args = [_objects(value, root) for value in target.args]
        kwargs = {key: _objects(value, root) for key, value in target.kwargs.items()}
    except RecipeError as error:
        lacking = missing_requirements(target.requires)
        raise RecipeError(f"{error}{_install_hint(lacking)}") from error
    try:
        # Constructors of research code may import lazily from their own folder.
        with root.importing():
            model = factory(*args, **kwargs)
    except Exception as error:
        raise RecipeError(
            f"{target.build}({_call_text(args, kwargs)}) raised {type(error).__name__}: {error}"
            f"{_signature_hint(factory)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"{target.build} returned a {type(model).__name__}; it must build an nn.Module"
        )
    _set_attributes(model, target.attributes)
    return model


def _install_hint(lacking: Sequence[str]) -> str:
    if not lacking:
        return ""
    exact = lacking[0].partition(" ")[0]
    place = exact.replace("==", "-")
    return (
        f"\n  the recipe was tried with: {'; '.join(lacking)}; what differs can lie beside the "
        f"checkouts:\n  pip install --no-deps --target ROOT/_site/{place} {exact}"
    )


def _set_attributes(model: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        owners = [module for module in model.modules() if hasattr(module, name)]
        if not owners:
            raise RecipeError(
                f"target.attributes: no module of {type(model).__name__} has {name!r}"
            )
        for module in owners:
            setattr(module, name, value)


def example_input(inputs: Inputs, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random input of the recipe's shape and kind; the same for the same seed.

    Raises:
        RecipeError: if it does not fit into memory.
    """
    try:
        return _random(inputs, torch.Generator().manual_seed(seed), dtype)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise RecipeError(
            f"no input of shape {tuple(inputs.shape)} can be made: {str(error).splitlines()[0]}"
        ) from error


def _random(inputs: Inputs, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    shape = tuple(inputs.shape)
    match inputs.kind:
        case "tokens":
            return torch.randint(inputs.high or 1, shape, generator=generator)
        case "spikes":
            return (torch.rand(shape, generator=generator) < 0.3).to(dtype)
        case "uniform":
            return torch.rand(shape, generator=generator).to(dtype)
        case _:
            return torch.randn(shape, generator=generator).to(dtype)


def reset_function(recipe: Recipe, root: Root) -> Callable[[nn.Module], None]:
    """What brings a model back to rest between batches.

    Raises:
        RecipeError: if the entry point is refused or missing.
    """
    if recipe.reset is None:
        return lambda model: None
    if recipe.reset.startswith("."):
        return functools.partial(_call_method, recipe.reset[1:])
    found = root.resolve(recipe.reset)

    def reset(model: nn.Module) -> None:
        found(model)

    return reset


def forward(model: nn.Module, batch: Tensor, inputs: Inputs) -> Tensor:
    """The model's output for one batch, as one tensor: the mean over steps where time is a loop.

    Args:
        model: what the recipe builds.
        batch: of the shape that ``inputs`` says.
        inputs: how the recipe calls the model.

    Raises:
        RecipeError: if the model cannot run the input, or returns no floating-point tensor.
    """
    steps = inputs.steps or 1
    outputs = [_first_tensor(_call(model, batch, inputs.output)) for _ in range(steps)]
    return outputs[0] if steps == 1 else torch.stack(outputs).mean(0)


def to_entry(target: Callable[..., Any]) -> str:
    """``module:Name`` of a class or function."""
    return f"{target.__module__}:{target.__qualname__}"


def _call(model: nn.Module, batch: Tensor, output: str | None) -> Any:
    kept: list[Any] = []
    try:
        with contextlib.ExitStack() as stack:
            if output is not None:
                module = model.get_submodule(output)
                stack.callback(
                    module.register_forward_hook(lambda *found: kept.append(found[2])).remove
                )
            # Some models reshape their input in place.
            returned = model(batch.clone())
        return kept[-1] if output is not None else returned
    except Exception as error:
        raise RecipeError(
            f"{type(model).__name__} cannot run an input of shape {tuple(batch.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor) and output.is_floating_point():
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        for item in output:
            try:
                return _first_tensor(item)
            except RecipeError:
                continue
    raise RecipeError(f"the model returns a {type(output).__name__} without a float tensor")


def _call_method(name: str, model: nn.Module) -> None:
    method: Any = model
    for part in name.split("."):
        if not hasattr(method, part):
            raise RecipeError(f"reset: {type(model).__name__} has no method {name!r}")
        method = getattr(method, part)
    method()


def _objects(value: Any, root: Root) -> Any:
    """Replace ``{ref: ...}``, ``{call: ..., kwargs: ...}`` and ``{partial: ...}`` in arguments."""
    if isinstance(value, list):
        return [_objects(item, root) for item in value]
    if not isinstance(value, dict):
        return value
    keys = [key for key in _OBJECT_KEYS if key in value]
    if not keys:
        return {key: _objects(item, root) for key, item in value.items()}
    extra = set(value) - {*keys, "args", "kwargs"}
    if len(keys) > 1 or extra or (keys == ["ref"] and len(value) > 1):
        raise RecipeError(
            f"argument {value!r}: give one of ref, call, partial; "
            "call and partial take args and kwargs"
        )
    found = root.resolve(str(value[keys[0]]))
    if keys == ["ref"]:
        return found
    args = [_objects(item, root) for item in value.get("args", [])]
    kwargs = {key: _objects(item, root) for key, item in value.get("kwargs", {}).items()}
    return found(*args, **kwargs) if keys == ["call"] else functools.partial(found, *args, **kwargs)


def _call_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
    return re.sub(r"\s+", " ", ", ".join(parts))[:200]


def _signature_hint(factory: Callable[..., Any]) -> str:
    try:
        return f"\n  its parameters: {inspect.signature(factory)}"
    except (TypeError, ValueError):
        return ""
