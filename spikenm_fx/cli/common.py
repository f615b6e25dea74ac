# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the screen, the options, and a model out of what the user names."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from spikenm_fx.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spikenm_fx.pattern import NM
    from spikenm_fx.plan.plan import Plan
    from spikenm_fx.recipe.entry_point import Root
    from spikenm_fx.recipe.schema import Recipe
    from spikenm_fx.trace import SpikingGraph

__all__ = [
    "EPILOG",
    "Checkpoint",
    "Exit",
    "Input",
    "Json",
    "Loaded",
    "Pattern",
    "RootOption",
    "Screen",
]


class Exit(IntEnum):
    """Exit codes; the help text lists them."""

    OK = 0
    NO = 1
    USAGE = 2
    INPUT = 3
    INTERNAL = 4
    INTERRUPTED = 130


EPILOG = (
    "Exit codes: 0 done; 1 the answer is no (weights are not N:M, a recipe failed, kernels cannot "
    "be tried); 2 wrong usage; 3 an input cannot be used (file, recipe, model, a shape that the "
    "model does not run on, recipes none of whose code is here); 4 internal error; "
    "130 interrupted."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Pattern = Annotated[
    str | None,
    typer.Option(
        "--nm",
        help="Keep at most n of m; replaces a recipe's pattern, also where its rules repeat it. "
        "'2:4' where nothing else says.",
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        help="Folder of the code or of checkouts. Recipes of repositories need it; for "
        "module:Class it is the current one by default.",
    ),
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", "-c", help="Weights: .safetensors or .pt.")
]
Input = Annotated[
    str | None, typer.Option("--input", "-i", help="Shape of one forward's input: 4,3,32,32.")
]


@dataclass(slots=True)
class Screen:
    """Where output goes: results to standard output, all else to standard error.

    Attributes:
        as_json: results are one JSON document.
    """

    as_json: bool = False
    out: Console = field(default_factory=lambda: Console(soft_wrap=True))
    err: Console = field(default_factory=lambda: Console(stderr=True))

    def say(self, text: str) -> None:
        """Something for people; silent where JSON is asked for."""
        if not self.as_json:
            self.out.print(text, markup=False, highlight=False)

    def json(self, data: Any) -> None:
        """One JSON document."""
        typer.echo(json.dumps(data, indent=2, default=str))

    def result(self, data: Any, text: str) -> None:
        """``data`` as JSON or ``text`` for people."""
        if self.as_json:
            self.json(data)
        else:
            self.say(text)

    @contextlib.contextmanager
    def working(self, words: str) -> Iterator[None]:
        """A spinner on a terminal, as long as the body runs.

        What somebody's model prints meanwhile goes to standard error: standard output is ours.
        """
        spinner = self.err.status(words) if self.err.is_terminal else contextlib.nullcontext()
        with spinner, contextlib.redirect_stdout(sys.stderr):
            yield


@dataclass(slots=True)
class Loaded:
    """A model that the user named, and what its recipe says about it.

    Attributes:
        model: built, with the checkpoint's weights where one was given.
        recipe: given or made up from the options.
        root: where its code may come from.
        trained: whether its weights are a checkpoint's.
        data: the user's batch, which then takes the place of random input.
    """

    model: nn.Module
    recipe: Recipe
    root: Root
    trained: bool = False
    data: Tensor | None = None
    _graph: SpikingGraph | None = None

    @classmethod
    def named(
        cls,
        target: str,
        *,
        root: Path | None = None,
        nm: str | None = None,
        shape: str | None = None,
        checkpoint: Path | None = None,
        data: Tensor | None = None,
    ) -> Loaded:
        """The model of a recipe file or of ``module:Class``.

        Raises:
            RecipeError: if it cannot be built, or ``data`` is not of the ``shape`` given with it.
            CheckpointError: if the checkpoint does not fit.
        """
        from spikenm_fx.checkpoint import load_into, load_state
        from spikenm_fx.recipe.target import build_model, provided, root_of

        asked = read_shape(shape) if shape is not None else None
        if data is not None and not data.numel():
            raise RecipeError(f"--data holds nothing: its shape is {list(data.shape)}")
        recipe = _recipe(target, nm, list(data.shape) if data is not None else asked)
        if _is_file(target):
            found = root_of(recipe, root)
            sys.path[:0] = [place for place in provided(recipe, root) if place not in sys.path]
        else:
            from spikenm_fx.recipe.entry_point import Root

            found = Root(root or Path.cwd())
        model = build_model(recipe, found)
        if checkpoint is not None:
            load_into(model, load_state(checkpoint), source=str(checkpoint))
        loaded = cls(model, recipe, found, checkpoint is not None, data)
        if not _is_file(target):
            loaded.learn_time()
        if data is not None and asked is not None:
            loaded.refuse_other_shape(asked)
        return loaded

    def refuse_other_shape(self, asked: list[int]) -> None:
        """Raise RecipeError where the data differs from ``asked`` in more than the samples."""
        assert self.data is not None
        batch = 1 if self.recipe.inputs.time == "leading" else 0
        found = list(self.data.shape)
        sizes = [[size for axis, size in enumerate(s) if axis != batch] for s in (asked, found)]
        if sizes[0] != sizes[1]:
            raise RecipeError(
                f"--input {','.join(map(str, asked))} does not fit --data, which is "
                f"{','.join(map(str, found))}: leave --input out, the data has a shape"
            )

    def learn_time(self) -> None:
        """Find out where time is in the input of a model without a recipe."""
        from spikenm_fx.cli.time_axis import time_of
        from spikenm_fx.errors import TraceError

        inputs = self.recipe.inputs
        try:
            time = time_of(self.graph(), inputs.shape)
        except TraceError:
            return  # whoever runs the model will say why it does not
        inputs = inputs.model_copy(update={"time": time})
        self.recipe = self.recipe.model_copy(update={"inputs": inputs})

    @property
    def knows_its_input(self) -> bool:
        """Whether a shape was given, by the recipe, by --input or by data."""
        return self.data is not None or self.recipe.inputs.shape != [1]

    def graph(self) -> SpikingGraph | None:
        """A trace on the input; None where no shape is known.

        Raises:
            TraceError: if the model cannot run it.
        """
        from spikenm_fx.trace import trace

        if self._graph is None and self.knows_its_input:
            self._graph = trace(self.model, self.batch())
        return self._graph

    def plan(self) -> Plan:
        """What becomes of each layer, by the recipe's rules and by what the trace tells.

        Raises:
            PlanError: if nothing becomes sparse, or a rule matches nothing.
            TraceError: if the model cannot run the input that was given.
        """
        import spikenm_fx

        return spikenm_fx.plan(self.model, graph=self.graph(), **self.recipe.plan_options())

    def sparsify(self, decided: Plan, method: str | None = None) -> None:
        """Apply ``decided``, by the recipe's method unless another is named."""
        import spikenm_fx

        own = self.recipe.method
        spikenm_fx.sparsify(
            self.model,
            decided,
            method=own.made() if method in (None, own.name) else method,
            total_steps=own.total_steps,
            seed=own.seed,
        )

    def batch(self, seed: int = 0) -> Tensor:
        """The user's data, else random input of the recipe's shape.

        Raises:
            RecipeError: if no shape is known.
        """
        from spikenm_fx.recipe.target import example_input

        if self.data is not None:
            return self.data
        if not self.knows_its_input:
            raise RecipeError("the input's shape is not known: give it, e.g. --input 4,3,32,32")
        return example_input(self.recipe.inputs, seed=seed)


def _is_file(target: str) -> bool:
    return target.endswith((".yaml", ".yml")) or Path(target).is_file()


def _recipe(target: str, nm: str | None, shape: list[int] | None) -> Recipe:
    from spikenm_fx.pattern import NM
    from spikenm_fx.recipe.schema import Inputs, Recipe, Target, load_recipe

    if _is_file(target):
        recipe = load_recipe(target)
        changes: dict[str, Any] = {}
        if nm is not None:
            changes = _with_pattern(recipe, NM.parse(nm))
        if shape is not None:
            inputs = {**recipe.inputs.model_dump(), "shape": shape}
            changes["inputs"] = Inputs(**inputs)
        return recipe.model_copy(update=changes)
    if ":" not in target:
        raise RecipeError(
            f"{target!r} is neither a recipe file nor 'module:Class'; "
            "name e.g. recipes/spikformer.yaml or models.net:Net"
        )
    from spikenm_fx.recipe.entry_point import EntryPoint

    return Recipe(
        version=1,
        target=Target(package=EntryPoint.parse(target).package, build=target),
        inputs=Inputs(shape=shape or [1], time="inside"),
        nm=NM.parse(nm or "2:4"),
    )


def _with_pattern(recipe: Recipe, nm: NM) -> dict[str, Any]:
    """What changes with the pattern: rules that only repeat the recipe's own follow it."""
    rules = [
        rule.model_copy(update={"nm": nm}) if rule.nm == recipe.nm else rule
        for rule in recipe.rules
    ]
    return {"nm": nm, "rules": rules}


def read_shape(text: str) -> list[int]:
    """``"4,3,32,32"`` or ``"4x3x32x32"`` as a list.

    Raises:
        RecipeError: for anything else.
    """
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"input shape {text!r} is not of the form 4,3,32,32")
    return [int(part) for part in parts]
