# SPDX-License-Identifier: Apache-2.0
"""A model by its name, a recipe file or ``module:Class``, with its input, weights and data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spikenm_fx.channels import load_smaller, remove_channels, save_smaller
from spikenm_fx.channels import permute as permute_channels
from spikenm_fx.channels.stored import is_smaller
from spikenm_fx.checkpoint import load_into, load_state, save_state
from spikenm_fx.errors import PlanError, RecipeError, TraceError, did_you_mean
from spikenm_fx.fold import fold
from spikenm_fx.masks.methods import method_named
from spikenm_fx.masks.sparsify import sparsify
from spikenm_fx.pack import is_packed, pack, unpacked_state
from spikenm_fx.pattern import NM, PatternLike
from spikenm_fx.plan.plan import Plan, plan
from spikenm_fx.recipe.entry_point import EntryPoint, Root
from spikenm_fx.recipe.schema import Inputs, Recipe, Target, load_recipe
from spikenm_fx.recipe.target import (
    build_model,
    example_input,
    forward,
    provided,
    reset_function,
    root_of,
)
from spikenm_fx.recipe.time_axis import time_of
from spikenm_fx.report.measure import report
from spikenm_fx.report.view import Report
from spikenm_fx.state import deepcopied
from spikenm_fx.trace.api import trace
from spikenm_fx.trace.graph import SpikingGraph
from spikenm_fx.verify import Verification, verify

__all__ = ["LoadedModel", "load_model"]

UNKNOWN = [1]
"""Shape in the recipe that is made up for ``module:Class``, where none was given."""


@dataclass(slots=True)
class LoadedModel:
    """A model that somebody named, and what its recipe says about it.

    Attributes:
        model: built, with the checkpoint's weights where one was given.
        recipe: given, or made up from the arguments.
        root: where its code may come from.
        trained: whether its weights are a checkpoint's.
        data: a batch of the user's, which then takes the place of random input.
        smaller: whether it lacks channels that the recipe's model is built with.
    """

    model: nn.Module
    recipe: Recipe
    root: Root
    trained: bool = False
    data: Tensor | None = None
    smaller: bool = False
    _graph: SpikingGraph | None = None

    @property
    def knows_its_input(self) -> bool:
        """Whether a shape was given, by the recipe, by the caller or by data."""
        return self.data is not None or self.recipe.inputs.shape != UNKNOWN

    @property
    def batch_dim(self) -> int:
        """The axis of the input that runs over samples."""
        return 1 if self.recipe.inputs.time == "leading" else 0

    def graph(self) -> SpikingGraph | None:
        """A trace on the input; None where no shape is known.

        Raises:
            TraceError: if the model cannot run it.
        """
        if self._graph is None and self.knows_its_input:
            self._graph = trace(self.model, self.batch())
        return self._graph

    def plan(self) -> Plan:
        """What becomes of each layer, by the recipe's rules and by what the trace tells.

        Raises:
            PlanError: if nothing becomes sparse, or a rule matches nothing.
            TraceError: if the model cannot run the input that was given.
        """
        return plan(self.model, graph=self.graph(), **self.recipe.plan_options())

    def keep_channels(self) -> None:
        """Cut the channels that the recipe does not keep; nothing where it keeps all.

        As many of each group stay as blocks of the recipe's patterns hold.

        Raises:
            RecipeError: if channels are to be cut and no input shape is known.
            TraceError: if the model cannot run its input.
        """
        keep = self.recipe.channels.keep
        if keep is None or self.smaller:
            return
        remove_channels(self.model, self.batch(), keep, multiple_of=self.recipe.block)
        self.smaller, self._graph = True, None

    def sparsify(self, decided: Plan, method: str | None = None, *, permute: bool = False) -> None:
        """Apply ``decided``, by the recipe's method unless another is named.

        Channels are permuted before that, if the recipe or ``permute`` asks for it.

        Raises:
            PlanError: if the method is unknown, or the model sparse already.
            RecipeError: if channels are to be permuted and no input shape is known.
        """
        own = self.recipe.method
        if permute or self.recipe.channels.permute:
            permute_channels(self.model, self.batch(), decided)
        chosen = own.made() if method in (None, own.name) else method_named(method)
        sparsify(
            self.model,
            decided,
            example_inputs=self.batch() if chosen.guided else None,
            method=chosen,
            total_steps=own.total_steps,
            seed=own.seed,
        )

    def verify(self, without: Sequence[str] = ()) -> Verification:
        """Count the blocks of the weights that the plan makes N:M.

        Args:
            without: layers of which nothing is required.

        Raises:
            PlanError: if ``without`` names no layer of the plan, or the plan is empty.
            TraceError: if the model cannot run the input that was given.
        """
        decided = self.plan()
        names = [entry.name for entry in decided.layers]
        for name in without:
            if name not in names:
                raise PlanError(f"no weight of the plan is {name!r}{did_you_mean(name, names)}")
        kept = tuple(entry for entry in decided.layers if entry.name not in without)
        return verify(self.model, replace(decided, layers=kept))

    def batch(self, seed: int = 0) -> Tensor:
        """The user's data, else random input of the recipe's shape ``[T, B, ...]`` or ``[B, ...]``.

        Raises:
            RecipeError: if no shape is known.
        """
        if self.data is not None:
            return self.data
        if not self.knows_its_input:
            raise RecipeError("the input's shape is not known: give it, e.g. --input 4,3,32,32")
        return example_input(self.recipe.inputs, seed=seed)

    def run(self, model: nn.Module, batch: Tensor) -> Tensor:
        """``model``, this one or a copy of it, on one batch, the way the recipe says.

        Args:
            model: built by the recipe.
            batch: of the shape of the recipe's inputs.

        Raises:
            RecipeError: if the model cannot run the batch.
        """
        return forward(model, batch, self.recipe.inputs)

    def reset(self) -> Callable[[nn.Module], None] | None:
        """The recipe's reset; None where it names none."""
        return reset_function(self.recipe, self.root) if self.recipe.reset else None

    def report(self, *, batches: int = 2, **options: Any) -> Report:
        """Measure the model over its data, or over random batches; the report says which.

        Args:
            batches: random ones, where there is no data.
            options: of :func:`spikenm_fx.report`.

        Raises:
            ReportError: if the model cannot run its input.
            RecipeError: if no shape is known.
        """
        found = report(
            self.model,
            [self.batch(seed) for seed in range(batches if self.data is None else 1)],
            forward=self.run,
            reset=self.reset(),
            batch_dim=self.batch_dim,
            **options,
        )
        return replace(found, notes=(*found.notes, *self._made_up()))

    def _made_up(self) -> list[str]:
        """What a reader of figures must know to be no measurement of a real task."""
        notes = []
        if self.data is None:
            notes.append(
                f"the input was random ({self.recipe.inputs.kind}), no data was given: firing "
                "rates, operations and energy are those of noise (--data FILE measures yours)"
            )
        if not self.trained:
            notes.append(
                "the weights are the constructor's, no checkpoint was given: an untrained network "
                "fires as it happens to (--checkpoint FILE measures yours)"
            )
        return notes

    def variants(self, dense: nn.Module | None = None) -> dict[str, nn.Module]:
        """What there is to time, by name: the model before, folded, and packed where it is N:M.

        Args:
            dense: the model as it was before :meth:`sparsify`, where it was called.

        Raises:
            PackError: if the model cannot be packed.
        """
        folded = deepcopied(self.model)
        if dense is not None:
            fold(folded)
        elif not verify(folded).valid:
            return {"dense": folded}
        before = {"dense": dense} if dense is not None else {}
        return {**before, "folded": folded, "packed": pack(folded, self.batch())}

    def save(self, file: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the state dict, so that :func:`load_model` reads it again.

        Args:
            file: ``.safetensors`` or ``.pt``; the first where the model lacks channels.
            metadata: of a safetensors file.

        Raises:
            CheckpointError: if the suffix does not do, or the disk refuses.
        """
        if self.smaller:
            save_smaller(file, self.model, metadata=metadata)
        else:
            save_state(file, self.model.state_dict(), metadata=metadata)

    def find_time(self) -> None:
        """Find out from a trace where time is in the input of a model without a recipe."""
        inputs = self.recipe.inputs
        try:
            time = time_of(self.graph(), inputs.shape)
        except TraceError:
            return  # whoever runs the model will say why it does not
        inputs = inputs.model_copy(update={"time": time})
        self.recipe = self.recipe.model_copy(update={"inputs": inputs})

    def _refuse_other_shape(self, asked: Sequence[int]) -> None:
        """Raise RecipeError where the data differs from ``asked`` in more than the samples."""
        assert self.data is not None
        found = list(self.data.shape)
        sizes = [[n for axis, n in enumerate(s) if axis != self.batch_dim] for s in (asked, found)]
        if sizes[0] != sizes[1]:
            raise RecipeError(
                f"--input {','.join(map(str, asked))} does not fit --data, which is "
                f"{','.join(map(str, found))}: leave --input out, the data has a shape"
            )


def load_model(
    target: str | Path,
    *,
    root: Path | None = None,
    nm: PatternLike | None = None,
    shape: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    data: Tensor | None = None,
    packed: bool = False,
) -> LoadedModel:
    """Build the model of a recipe file or of ``module:Class``.

    Args:
        target: the file, or the dotted name of a class or function that takes no arguments.
        root: the folder of its code or of checkouts; for ``module:Class``, and for recipes of code
            that is nobody's repository, the current folder by default.
        nm: the pattern; replaces a recipe's, also where its rules repeat it.
        shape: of one forward's input, time and batch included; replaces a recipe's.
        checkpoint: weights of the model, loaded strictly; of one whose channels were removed, the
            model is cut to fit them.
        data: a batch, which then stands in for random input.
        packed: whether the checkpoint may be a packed file, whose weights are then unpacked.

    Raises:
        RecipeError: if the model cannot be built, or ``data`` is not of the ``shape`` given too.
        CheckpointError: if the checkpoint does not fit.
        PatternError: for a malformed pattern.
    """
    if data is not None and not data.numel():
        raise RecipeError(f"--data holds nothing: its shape is {list(data.shape)}")
    file = _is_file(target)
    recipe = _recipe(target, nm, list(data.shape) if data is not None else shape)
    if file:
        found = root_of(recipe, root)
        sys.path[:0] = [place for place in provided(recipe, root) if place not in sys.path]
    else:
        found = Root(root or Path.cwd())
    model = build_model(recipe, found)
    smaller = False
    if checkpoint is not None:
        smaller = is_smaller(checkpoint)
        read = unpacked_state if packed and is_packed(checkpoint) else load_state
        if smaller:
            load_smaller(model, checkpoint, read=read)
        else:
            load_into(model, read(checkpoint), source=str(checkpoint))
    loaded = LoadedModel(model, recipe, found, checkpoint is not None, data, smaller)
    if not file:
        loaded.find_time()
    if data is not None and shape is not None:
        loaded._refuse_other_shape(shape)
    return loaded


def _is_file(target: str | Path) -> bool:
    return str(target).endswith((".yaml", ".yml")) or Path(target).is_file()


def _recipe(target: str | Path, nm: PatternLike | None, shape: Sequence[int] | None) -> Recipe:
    if _is_file(target):
        recipe = load_recipe(target)
        changes: dict[str, Any] = {}
        if nm is not None:
            changes = _with_pattern(recipe, NM.parse(nm))
        if shape is not None:
            changes["inputs"] = Inputs(**{**recipe.inputs.model_dump(), "shape": list(shape)})
        return recipe.model_copy(update=changes)
    name = str(target)
    if ":" not in name:
        raise RecipeError(
            f"{name!r} is neither a recipe file nor 'module:Class'; "
            "name e.g. recipes/spikformer.yaml or models.net:Net"
        )
    return Recipe(
        version=1,
        target=Target(package=EntryPoint.parse(name).package, build=name),
        inputs=Inputs(shape=list(shape or UNKNOWN), time="inside"),
        nm=NM.parse(nm or "2:4"),
    )


def _with_pattern(recipe: Recipe, nm: NM) -> dict[str, Any]:
    """What changes with the pattern: rules that only repeat the recipe's own follow it."""
    rules = [
        rule.model_copy(update={"nm": nm}) if rule.nm == recipe.nm else rule
        for rule in recipe.rules
    ]
    return {"nm": nm, "rules": rules}
