# SPDX-License-Identifier: Apache-2.0
"""A commented first recipe for a user's own model, from its plan."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from torch import nn

from spikenm_fx.cli.common import Loaded
from spikenm_fx.errors import RecipeError, SpikeNMError
from spikenm_fx.plan.plan import Plan
from spikenm_fx.recipe.entry_point import FRAMEWORKS, EntryPoint
from spikenm_fx.recipe.schema import Inputs, Recipe, parse_recipe
from spikenm_fx.recipe.target import example_input, forward

__all__ = ["draft_recipe"]

RESETS = (
    ("spikingjelly.activation_based", "spikingjelly.activation_based.functional:reset_net"),
    ("spikingjelly.clock_driven", "spikingjelly.clock_driven.functional:reset_net"),
    ("snntorch", "snntorch.utils:reset"),
)
"""Package of a module in the model, and the reset its framework gives."""


def draft_recipe(target: str, *, shape: str | None, root: Path | None, nm: str) -> str:
    """The text of a valid recipe with every layer's decision as a comment.

    Raises:
        RecipeError: if the model cannot be built, or the shape does not run through it.
    """
    folder = root or Path.cwd()
    loaded = Loaded.named(target, root=folder, nm=nm, shape=shape)
    if shape is None:
        inputs, ran = Inputs(shape=[4, 3, 32, 32], time="inside"), "no --input was given: check it"
    else:
        inputs, ran = loaded.recipe.inputs, _runs(loaded.model, loaded.recipe)
    text = _text(target, folder, inputs, ran, nm, loaded.model, loaded.plan())
    parse_recipe(text, source="draft")
    return text


def _runs(model: nn.Module, recipe: Recipe) -> str:
    from spikenm_fx.state import preserved_in_eval

    try:
        with preserved_in_eval(model):
            output = forward(model, example_input(recipe.inputs), recipe.inputs)
    except SpikeNMError as error:
        raise RecipeError(f"the input does not run: {error}") from error
    return f"runs; the output's shape is {list(output.shape)}"


def _text(
    target: str,
    folder: Path,
    inputs: Inputs,
    ran: str,
    nm: str,
    model: nn.Module,
    decided: Plan,
) -> str:
    entry = EntryPoint.parse(target)
    dense = [layer for layer in decided.layers if layer.nm is None]
    reset = _reset(model)
    lines = [
        "# How one model becomes N:M sparse. Try: spikenm-fx recipe check THIS_FILE --root FOLDER",
        "version: 1",
        f"name: {json.dumps(type(model).__name__)}",
        "target:",
        *_origin(entry, folder),
        f"  build: {json.dumps(target)}",
        "  kwargs: {}                  # arguments of the constructor",
        "inputs:",
        f"  shape: {inputs.shape}    # {ran}",
        "  # inside: the model repeats the input itself; leading: [T, B, ...]; second: [B, T, ...]",
        "  # loop: you call the model once per step (then give steps: T); none: no time. Guessed:",
        f"  time: {inputs.time}",
        "# called with the model between batches; null where it keeps no state",
        f"reset: {json.dumps(reset)}",
        "# keep at most n of m consecutive input channels; always in quotes",
        f"nm: {json.dumps(nm)}",
        "remainder: skip               # or pad, error: where m does not divide the input channels",
        "method:",
        "  name: spikenm",
        "  # total_steps: 48000        # optimizer steps of your training",
        "# Ordered, the first match decides, 'ignore' wins. match is a layer's name, 're:' and a",
        "# regular expression for the whole name, or 'class:' and a class name, bases included.",
        "rules:",
        *(f"  - {{match: {json.dumps(layer.name)}, action: keep_dense, "
          f"reason: {json.dumps(layer.reason)}}}" for layer in dense),
        *([] if dense else ["  []"]),
        "# The plan with these rules:",
        *(f"#   {line}" for line in str(decided).splitlines()),
        f"expected: {{layers: {len(decided.layers)}, sparse: {len(decided.sparse)}}}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _origin(entry: EntryPoint, folder: Path) -> list[str]:
    if entry.package in FRAMEWORKS:
        return [f"  package: {entry.package}"]
    commit = _git(folder, "rev-parse", "HEAD")
    remote = _git(folder, "remote", "get-url", "origin")
    found = re.search(r"[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", remote or "")
    repo = found[1] if found else f"local/{re.sub(r'[^A-Za-z0-9.-]', '-', folder.resolve().name)}"
    return [
        f"  repo: {json.dumps(repo)}",
        f"  commit: {json.dumps(commit or '0000000')}"
        + ("" if commit else "        # fill in where there is one"),
    ]


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _reset(model: nn.Module) -> str | None:
    packages = [type(module).__module__ for module in model.modules()]
    for package, reset in RESETS:
        if any(name == package or name.startswith(package + ".") for name in packages):
            return reset
    return ".reset" if callable(getattr(model, "reset", None)) else None
