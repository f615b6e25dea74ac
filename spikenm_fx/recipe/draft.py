# SPDX-License-Identifier: Apache-2.0
"""A commented first recipe for a user's own model, from its plan."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spikenm_fx._torch import ConvNd
from spikenm_fx.errors import PlanError, RecipeError, SpikeNMError
from spikenm_fx.pattern import NM, PatternLike, is_weight_layer
from spikenm_fx.plan.plan import Plan, plan
from spikenm_fx.plan.rules import Rule
from spikenm_fx.plan.weights import RAW
from spikenm_fx.recipe.entry_point import FRAMEWORKS, EntryPoint
from spikenm_fx.recipe.loaded import LoadedModel, load_model
from spikenm_fx.recipe.schema import Inputs, parse_recipe
from spikenm_fx.state import RESET_METHODS, preserved_in_eval

__all__ = ["draft_recipe"]

RESETS = (
    ("spikingjelly.activation_based", "spikingjelly.activation_based.functional:reset_net"),
    ("spikingjelly.clock_driven", "spikingjelly.clock_driven.functional:reset_net"),
    ("snntorch", "snntorch.utils:reset"),
)
"""Package of a module in the model, and the reset its framework gives."""

_SIDES = (32, 28, 16, 8, 64, 128, 224)
_STEPS, _SAMPLES = 4, 2


def draft_recipe(
    target: str,
    *,
    shape: Sequence[int] | None = None,
    root: Path | None = None,
    nm: PatternLike = "2:4",
) -> str:
    """The text of a recipe that :func:`spikenm_fx.recipe.check` accepts, with the plan in comments.

    Args:
        target: ``module:Class``, built without arguments.
        shape: of one forward's input, time and batch included; without it, usual shapes for the
            first layer are tried, and the first that runs is taken.
        root: folder of the code; the current one by default.
        nm: the pattern.

    Raises:
        RecipeError: if the model cannot be built, or no shape runs through it.
        PlanError: if nothing would become sparse.
    """
    folder = root or Path.cwd()
    loaded = load_model(target, root=folder, nm=nm, shape=shape)
    loaded, output = _guessed(loaded) if shape is None else (loaded, _runs(loaded))
    how = "guessed, it runs" if shape is None else "runs"
    ran = f"{how}; the output's shape is {list(output.shape)}"
    rules = _rules(loaded.model, loaded.plan(), NM.parse(nm))
    text = _text(target, folder, loaded, ran, rules)
    parse_recipe(text, source="draft")
    return text


def _runs(loaded: LoadedModel) -> Tensor:
    try:
        with preserved_in_eval(loaded.model), torch.no_grad():
            return loaded.run(loaded.model, loaded.batch())
    except SpikeNMError as error:
        raise RecipeError(f"the input does not run: {error}") from error


def _guessed(loaded: LoadedModel) -> tuple[LoadedModel, Tensor]:
    """With the first usual shape that runs, and its output."""
    tried = []
    for shape in _usual_shapes(loaded.model):
        inputs = Inputs(shape=shape, time="inside")
        attempt = replace(loaded, recipe=loaded.recipe.model_copy(update={"inputs": inputs}))
        try:
            output = _runs(attempt)
        except RecipeError:
            tried.append(",".join(map(str, shape)))
            continue
        attempt.find_time()
        return attempt, output
    raise RecipeError(
        f"the shape of the input of {type(loaded.model).__name__} is not known (tried "
        f"{'; '.join(tried) or 'none, it has no layer that tells'}): give it, e.g. "
        "--input 4,3,32,32"
    )


def _usual_shapes(model: nn.Module) -> Iterator[list[int]]:
    """What the first layer would take: a batch of samples, then one with time before it."""
    first = next((module for module in model.modules() if is_weight_layer(module)), None)
    samples: list[list[int]] = []
    if isinstance(first, nn.Linear):
        width = first.in_features
        samples = [[width], *([1, s, s] for s in _SIDES if s * s == width)]
        samples += [[3, s, s] for s in _SIDES if 3 * s * s == width]
    elif isinstance(first, ConvNd):
        axes = len(first.kernel_size)
        samples = [[first.in_channels, *[side] * axes] for side in _SIDES]
    for lead in ([_SAMPLES], [_STEPS, _SAMPLES]):
        yield from ([*lead, *sample] for sample in samples)


def _rules(model: nn.Module, decided: Plan, nm: NM) -> list[Rule]:
    """What repeats ``decided`` without its trace: checks plan from the module tree alone."""
    known = [entry for entry in decided.layers if entry.kind != RAW and entry.name]
    rules = [
        Rule(entry.name, action="keep_dense", reason=entry.reason)
        for entry in known
        if entry.nm is None
    ]
    try:
        blind = plan(model, nm, rules=rules)
        dense = {entry.name for entry in blind.layers if entry.nm is None}
    except PlanError:  # without the trace nothing at all would be sparse
        dense = {entry.name for entry in known}
    return rules + [
        Rule(entry.name, nm, reason=entry.reason)
        for entry in known
        if entry.nm is not None and entry.name in dense
    ]


def _text(target: str, folder: Path, loaded: LoadedModel, ran: str, rules: list[Rule]) -> str:
    model, inputs, nm = loaded.model, loaded.recipe.inputs, loaded.recipe.nm
    decided = plan(model, nm, rules=rules)  # as a check will see it, without a trace
    listed = plan(model, nm, rules=rules, graph=loaded.graph())
    lines = [
        "# How one model becomes N:M sparse. Try it: spikenm-fx recipe check THIS_FILE "
        f"--root {folder}",
        "version: 1",
        f"name: {json.dumps(type(model).__name__)}",
        "target:",
        *_origin(EntryPoint.parse(target), folder),
        f"  build: {json.dumps(target)}",
        "  kwargs: {}                  # arguments of the constructor",
        "inputs:",
        f"  shape: {inputs.shape}    # {ran}",
        "  # inside: the model repeats the input itself; leading: [T, B, ...]; second: [B, T, ...]",
        "  # loop: you call the model once per step (then give steps: T); none: no time. Guessed:",
        f"  time: {inputs.time}",
        "# called with the model between batches; null where it keeps no state",
        f"reset: {json.dumps(_reset(model))}",
        "# keep at most n of m consecutive input channels; always in quotes",
        f"nm: {json.dumps(str(nm))}",
        "remainder: skip               # or pad, error: where m does not divide the input channels",
        "method:",
        "  name: spikenm",
        "  # total_steps: 48000        # optimizer steps of your training",
        "# Ordered, the first match decides, 'ignore' wins. match is a layer's name, 're:' and a",
        "# regular expression for the whole name, or 'class:' and a class name, bases included.",
        "rules:",
        *(_rule_line(rule) for rule in rules),
        *([] if rules else ["  []"]),
        "# The plan with these rules:",
        *(f"#   {line}" for line in str(listed).splitlines()),
        f"expected: {{layers: {len(decided.layers)}, sparse: {len(decided.sparse)}}}",
    ]
    return "\n".join(lines) + "\n"


def _rule_line(rule: Rule) -> str:
    what = f"nm: {json.dumps(str(rule.nm))}" if rule.nm is not None else "action: keep_dense"
    return f"  - {{match: {json.dumps(rule.match)}, {what}, reason: {json.dumps(rule.reason)}}}"


def _origin(entry: EntryPoint, folder: Path) -> list[str]:
    if entry.package in FRAMEWORKS:
        return [f"  package: {entry.package}"]
    commit = _git(folder, "rev-parse", "HEAD")
    remote = _git(folder, "remote", "get-url", "origin")
    found = re.search(r"[:/]([\w.-]+/[\w.-]+?)(\.git)?/?$", remote or "")
    repo = found[1] if found else f"local/{re.sub(r'[^A-Za-z0-9.-]', '-', folder.resolve().name)}"
    return [
        f"  repo: {json.dumps(repo)}",
        *([f"  commit: {json.dumps(commit)}"] if commit else []),
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
    """The framework's reset, the model's own, or that of each module by its usual name."""
    packages = [type(module).__module__ for module in model.modules()]
    for package, reset in RESETS:
        if any(name == package or name.startswith(package + ".") for name in packages):
            # snnTorch's looks at the children of the model only
            children = [type(child).__module__ for child in model.children()]
            seen = package != "snntorch" or any(name.startswith(package) for name in children)
            return reset if seen else "spikenm_fx.state.rest:reset_to_rest"
    if callable(getattr(model, "reset", None)):
        return ".reset"
    own = any(callable(getattr(m, name, None)) for m in model.modules() for name in RESET_METHODS)
    return "spikenm_fx.state.rest:reset_to_rest" if own else None
