# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML page that says how somebody else's model becomes N:M sparse.

The schema is pydantic's, strict and closed: an unknown key is an error.  :func:`load_recipe`
reports every mistake of a file at once, each with its line, its path, the value and the near miss.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from spikenm_fx.errors import RecipeError
from spikenm_fx.pattern import NM
from spikenm_fx.plan.rules import Rule
from spikenm_fx.recipe.entry_point import FRAMEWORKS, EntryPoint
from spikenm_fx.recipe.method_spec import Closed, MethodSpec
from spikenm_fx.recipe.mistakes import Mistake, explain, listing
from spikenm_fx.recipe.yaml_strict import MAX_BYTES, load_strict_yaml

__all__ = [
    "Channels",
    "Expected",
    "Inputs",
    "MethodSpec",
    "Recipe",
    "RuleSpec",
    "Target",
    "load_recipe",
    "parse_recipe",
    "recipe_json_schema",
]


def _pattern(value: Any) -> Any:
    return value if isinstance(value, NM) else NM.parse(value)


def _entry_point(value: str) -> str:
    EntryPoint.parse(value)
    return value


def _package(value: str) -> str:
    if not value.isidentifier() or value in FRAMEWORKS:
        raise ValueError(f"{value!r} must be the name of a package that is no framework")
    return value


def _framework_path(value: str) -> str:
    if value.partition(".")[0] not in FRAMEWORKS or not value.replace(".", "_").isidentifier():
        known = ", ".join(sorted(FRAMEWORKS))
        raise ValueError(f"{value!r} must be a module path of one of {known}")
    return value


def _inner_path(value: str) -> str:
    if Path(value).is_absolute() or ".." in Path(value).parts or "\0" in value:
        raise ValueError(f"{value!r} must be a folder inside the checkout")
    return value


def _regex(value: str) -> str:
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
    return value


_JSON_PATTERN = {
    "type": "string",
    "pattern": r"^\s*\d{1,4}\s*:\s*\d{1,4}\s*$",
    "description": "keep at most n of m consecutive input channels; always quoted",
    "examples": ["2:4", "1:4", "4:8"],
}
PatternField = Annotated[
    NM, BeforeValidator(_pattern), PlainSerializer(str), WithJsonSchema(_JSON_PATTERN)
]
PackageField = Annotated[str, AfterValidator(_package)]
FrameworkField = Annotated[str, AfterValidator(_framework_path)]
EntryField = Annotated[str, AfterValidator(_entry_point)]


class Target(Closed):
    """Whose model, and how it is built."""

    repo: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$",
        description="owner/name of the repository the model comes from; local/NAME for code of "
        "one's own that is in none",
    )
    commit: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{7,40}$", description="the commit this recipe was tried at"
    )
    package: str | None = Field(
        default=None, description="the installed distribution, where the model comes with a package"
    )
    path: Annotated[str, AfterValidator(_inner_path)] = Field(
        default=".", description="folder of the checkout that its modules are imported from"
    )
    build: EntryField = Field(description="module:Name of the class or function that builds it")
    args: list[Any] = Field(
        default_factory=list, description="positional arguments; see kwargs for objects"
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments; {ref: 'module:Name'} is an object, "
        "{call: 'module:Name', kwargs: {}} the result of a call, {partial: ...} a partial",
    )
    requires: list[str] = Field(
        default_factory=list, description="packages it needs, e.g. spikingjelly==0.0.0.0.12"
    )

    stand_ins: list[PackageField] = Field(
        default_factory=list,
        description="packages that its files import but that building and running never use; "
        "inert while importing, where they are not installed",
    )
    aliases: dict[FrameworkField, FrameworkField] = Field(
        default_factory=dict,
        description="module paths of an older framework and where they are now",
    )
    attributes: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="attributes set after building on each module that has them, "
        "e.g. backend: torch where the constructors ask for CuPy",
    )
    without: list[Literal["extensions", "torchscript"]] = Field(
        default_factory=list,
        description="what is off while its files are imported: 'extensions' that they compile "
        "then, 'torchscript' classes, which hide their layers",
    )
    replacements: dict[EntryField, EntryField] = Field(
        default_factory=dict,
        description="functions of the checkout, e.g. of a CUDA extension, and those that stand in "
        "for them: 'module:name' to 'module:name'",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Target:
        if (self.repo is None) == (self.package is None):
            raise ValueError(
                "give either 'repo' (a checkout) or 'package' (an installed distribution)"
            )
        if self.repo is not None and self.commit is None and not self.is_local:
            raise ValueError("a 'repo' needs the 'commit' that the recipe was tried at")
        return self

    @property
    def is_local(self) -> bool:
        """Whether it is code of the user's own: nothing that could be cloned."""
        return self.repo is not None and self.repo.startswith("local/")


class Inputs(Closed):
    """What one batch looks like and where time is."""

    shape: list[Annotated[int, Field(gt=0)]] = Field(
        min_length=1, description="shape of one forward's input, batch (and time) included"
    )
    time: Literal["inside", "leading", "second", "loop", "none"] = Field(
        description="inside: the model repeats the input itself; leading: [T, B, ...]; "
        "second: [B, T, ...]; loop: the user calls the model once per step; none: no time"
    )
    steps: int | None = Field(
        default=None, gt=0, description="forwards per sample, where time is 'loop'"
    )
    kind: Literal["normal", "uniform", "spikes", "tokens"] = Field(
        default="normal",
        description="what random input stands in for data when the recipe is checked",
    )
    high: int | None = Field(
        default=None, gt=0, description="number of tokens, where kind is 'tokens'"
    )
    output: str | None = Field(
        default=None,
        description="the module whose output counts, where the model itself returns a loss or "
        "nothing without targets",
    )

    @model_validator(mode="after")
    def _complete(self) -> Inputs:
        if (self.time == "loop") != (self.steps is not None):
            raise ValueError("'steps' belongs to time: loop, and is needed there")
        if (self.kind == "tokens") != (self.high is not None):
            raise ValueError("'high' belongs to kind: tokens, and is needed there")
        return self


class RuleSpec(Closed):
    """One decision: which layers, what is done, and why."""

    match: Annotated[str, AfterValidator(_regex)] = Field(
        min_length=1,
        description="a layer's name (of a raw parameter, its own: see 'raw'), 're:' and a regular "
        "expression for the whole name, or 'class:' and the name of the layer's class or of one of "
        "its bases",
    )
    nm: PatternField | None = Field(default=None, description="the pattern, quoted")
    action: Literal["sparsify", "keep_dense", "ignore"] | None = Field(
        default=None,
        description="sparsify where 'nm' is given; 'ignore' wins over every other rule",
    )
    remainder: Literal["skip", "pad", "error"] | None = Field(
        default=None, description="for these layers; the recipe's own where it is missing"
    )
    reason: str = Field(default="", description="one sentence for the plan")

    @model_validator(mode="after")
    def _decides(self) -> RuleSpec:
        if self.nm is None and self.action is None:
            raise ValueError("a rule needs 'nm' (a quoted pattern) or an 'action'")
        if self.nm is not None and self.action not in (None, "sparsify"):
            raise ValueError(f"'nm' and action: {self.action} contradict each other: keep one")
        return self


class Channels(Closed):
    """What is done with coupled channels; all but ``keep`` change no output beyond rounding."""

    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="before all else: the share of each group's channels that stays, in (0, 1], "
        "those that are most active on the input; the rest is cut",
    )
    permute: bool = Field(
        default=False,
        description="before the masks: put channels in the order in which N:M keeps most",
    )
    remove_dead: bool = Field(
        default=False, description="after folding: take out those that nothing depends on"
    )


class Expected(Closed):
    """What the plan came to when the recipe was tried; ``recipe check`` compares."""

    layers: int = Field(gt=0, description="weight layers of the model")
    sparse: int = Field(gt=0, description="how many of them become sparse")


class Recipe(Closed):
    """How one model becomes N:M sparse."""

    version: Literal[1] = Field(description="of this schema")
    name: str = Field(default="", description="what people call the model")
    target: Target
    inputs: Inputs
    reset: str | None = Field(
        default=None,
        description="called with the model between batches ('module:function'), a method of it "
        "('.reset'), or null where the model keeps no state",
    )
    nm: PatternField = Field(
        default=NM(2, 4), description="the pattern of every layer no rule names"
    )
    remainder: Literal["skip", "pad", "error"] = Field(
        default="skip",
        description="what to do where the pattern does not divide the input channels",
    )
    method: MethodSpec = Field(default_factory=MethodSpec)
    channels: Channels = Field(default_factory=Channels)
    raw: bool = Field(
        default=False,
        description="also plan raw parameters, as in F.linear(x, self.w): one run on the input "
        "shows them, and rules may name them, by the parameter's own name",
    )
    rules: list[RuleSpec] = Field(default_factory=list, description="ordered; the first match wins")
    expected: Expected | None = None
    notes: str = Field(default="", description="what a user of this recipe should know")

    @field_validator("reset", mode="after")
    @classmethod
    def _reset(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\.[A-Za-z]\w*(\.[A-Za-z]\w*)*", value):
            EntryPoint.parse(value)
        return value

    def __str__(self) -> str:
        target, inputs = self.target, self.inputs
        at = f" at {target.commit}" if target.commit else ""
        rules = [
            f"  {rule.match}  ->  {rule.nm or rule.action}"
            + (f"  ({rule.reason})" if rule.reason else "")
            for rule in self.rules
        ]
        kept = self.channels.keep
        steps = [f"keep {kept:g}"] if kept is not None else []
        steps += [name.replace("_", " ") for name, asked in self.channels if asked is True]
        lines = [
            self.name or target.build,
            "origin   " + (f"{target.repo}{at}" if target.repo else f"package {target.package}"),
            f"build    {target.build}",
            f"needs    {', '.join(target.requires) or 'nothing further'}",
            f"input    {inputs.kind} {inputs.shape}, time {inputs.time}"
            + (f" x {inputs.steps}" if inputs.steps else ""),
            f"reset    {self.reset or 'none'}",
            f"pattern  {self.nm.describe()}, remainder: {self.remainder}"
            + (", raw parameters too" if self.raw else ""),
            f"method   {self.method.name}"
            + "".join(f", {option}: {value}" for option, value in self.method.options.items()),
            *([f"channels {', '.join(steps)}"] if steps else []),
            *(["rules    ordered, the first match wins", *rules] if rules else []),
            *([f"notes    {self.notes}"] if self.notes else []),
        ]
        return "\n".join(lines)

    @property
    def block(self) -> int:
        """Least number of channels that every pattern of the recipe divides."""
        named = [rule.nm.of for rule in self.rules if rule.nm is not None]
        return math.lcm(self.nm.of, *named)

    def plan_options(self) -> dict[str, Any]:
        """Keyword arguments for :func:`spikenm_fx.plan`: ``plan(model, **recipe.plan_options())``.

        Rules keep their order; rules of the recipe that match nothing are errors there.  Where the
        recipe plans raw parameters (``raw``), it also needs ``example_inputs``.
        """
        return {
            "nm": self.nm,
            "remainder": self.remainder,
            "rules": tuple(
                Rule(rule.match, rule.nm, rule.action or "sparsify", rule.remainder, rule.reason)
                for rule in self.rules
            ),
        }

    def sparsify_options(self) -> dict[str, Any]:
        """Keyword arguments for :func:`spikenm_fx.sparsify`.

        Where the recipe permutes channels or plans raw parameters, it also needs
        ``example_inputs``; a share of channels to keep is not among them: see
        :func:`spikenm_fx.remove_channels`.
        """
        return {
            **self.plan_options(),
            "permute": self.channels.permute,
            "method": self.method.made(),
            "total_steps": self.method.total_steps,
            "seed": self.method.seed,
        }


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe file.

    Raises:
        RecipeError: listing every mistake of the file at once.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"{path}: is larger than {MAX_BYTES // 1024} KiB; a recipe is a page of YAML. "
            "Is it a checkpoint?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); is it YAML?") from error
    return parse_recipe(text, source=str(path))


def parse_recipe(text: str, *, source: str = "<recipe>") -> Recipe:
    """Validate the text of a recipe; ``source`` names it in errors.

    Raises:
        RecipeError: listing every mistake at once.
    """
    document = load_strict_yaml(text)
    mistakes = list(document.mistakes)
    if document.data is None and not mistakes:
        mistakes.append(Mistake((), "the file is empty"))
    elif document.data is not None and not isinstance(document.data, dict):
        kind = type(document.data).__name__
        mistakes.append(Mistake((), f"a recipe is a mapping of keys, this is a {kind}"))
    elif document.data is not None:
        try:
            recipe = Recipe.model_validate(document.data)
        except ValidationError as error:
            known = {mistake.path for mistake in mistakes}
            found = explain(error, Recipe, document.lines)
            mistakes += [mistake for mistake in found if mistake.path not in known]
        else:
            if not mistakes:
                return recipe
    raise RecipeError(listing(source, mistakes))


def recipe_json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors that check and complete YAML."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "spikenm_fx recipe",
        **{key: value for key, value in schema.items() if key != "title"},
    }
