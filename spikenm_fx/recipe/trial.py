# SPDX-License-Identifier: Apache-2.0
"""Apply a recipe to the real code: build, plan, sparsify, train a step, fold, verify, pack.

Each stage that fails stops the rest and says why.  Nothing is mocked; only the data is random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from spikenm_fx.channels import permute, remove_channels, remove_dead_channels
from spikenm_fx.errors import PlanError, RecipeError, SpikeNMError, VerificationError
from spikenm_fx.fold import fold
from spikenm_fx.masks.sparsify import param_groups, sparsify
from spikenm_fx.pack import native_status, pack
from spikenm_fx.pack.check.agreement import Agreement, agreement
from spikenm_fx.pack.copying import copy_at_rest, unregister
from spikenm_fx.pack.programs import proved_program
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.plan.plan import Plan, plan
from spikenm_fx.plan.weights import RAW
from spikenm_fx.program.draft import NotLowered
from spikenm_fx.recipe.resting import state_that_stays, what_to_reset
from spikenm_fx.recipe.schema import Recipe
from spikenm_fx.recipe.target import (
    build_model,
    example_input,
    forward,
    missing_requirements,
    reset_function,
    root_of,
)
from spikenm_fx.recipe.waking import firing_rates, rouse, wake
from spikenm_fx.verify import verify

__all__ = ["STAGES", "CheckResult", "PackedAgreement", "check_recipe", "origin"]

STAGES = ("build", "plan", "sparsify", "train", "fold", "verify", "pack")

Run = Callable[..., Tensor]  # of a module and a batch
Rest = Callable[[nn.Module], None]

_PACK_BATCHES = 4
_SEED = 0


@dataclass(slots=True)
class PackedAgreement:
    """How packed engines agree with the folded model, over all batches and backends tried.

    Attributes:
        neurons: neuron layers that were compared; with none, only outputs were.
        difference: of the output relative to its norm, on the same spikes; the largest.
        spikes: how many were compared, zeros included.
        ties: how many of them differ, although their neurons received the same.
        share: the largest share of such spikes in the first neuron layer that had any.
        jump: of the output relative to its norm, as ties change what follows; the largest.
    """

    neurons: int = 0
    difference: float = 0.0
    spikes: int = 0
    ties: int = 0
    share: float = 0.0
    jump: float = 0.0

    def add(self, found: Agreement) -> None:
        """Count one batch in."""
        self.neurons = len(found.neurons)
        self.difference = max(self.difference, found.forced)
        self.spikes += sum(neuron.spikes for neuron in found.neurons)
        self.ties += found.ties
        if found.first is not None:
            self.share = max(self.share, found.first.share)
            self.jump = max(self.jump, found.output)


@dataclass(slots=True)
class CheckResult:
    """What became of each stage.

    Attributes:
        recipe: file name without suffix.
        title: what people call the model.
        origin: repository at commit, or the installed package.
        stages: ``"ok"``, ``"skipped: ..."`` or ``"failed: ..."`` by stage, in order.
        layers: weight layers of the model.
        sparse: how many became N:M.
        firing: neuron layers that fired, of how many; None where none was seen.
        packed: how the packed engines agree with the folded model; None untried.
        program: why the network is no native program, ``"ok"`` if it is one that agrees with the
            model; "" untried.
        seconds: time taken.
        environment: versions that matter.
    """

    recipe: str
    title: str
    origin: str
    stages: dict[str, str] = field(default_factory=dict)
    layers: int = 0
    sparse: int = 0
    firing: tuple[int, int] | None = None
    packed: PackedAgreement | None = None
    program: str = ""
    seconds: float = 0.0
    environment: str = ""

    @property
    def ok(self) -> bool:
        """No stage failed, and none but packing was skipped."""
        return all(
            text == "ok" or (stage == "pack" and text.startswith("skipped"))
            for stage, text in self.stages.items()
        )

    @property
    def skipped(self) -> bool:
        """The code is not here: nothing was tried."""
        return self.stages.get("build", "").startswith("skipped")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ok": self.ok, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` gave, also after it was JSON."""
        kept = {field.name: data[field.name] for field in fields(cls)}
        firing, packed = kept["firing"], kept["packed"]
        kept["firing"] = None if firing is None else tuple(firing)
        kept["packed"] = None if packed is None else PackedAgreement(**packed)
        return cls(**kept)


def check_recipe(recipe: Recipe, name: str, folder: Path | None, *, seed: int = 0) -> CheckResult:
    """Really apply ``recipe``; failures are recorded, not raised.

    Args:
        recipe: what to apply.
        name: of its file.
        folder: of checkouts.
        seed: of weights and data.
    """
    result = CheckResult(name, recipe.name or name, origin(recipe))
    result.environment = f"torch {torch.__version__.partition('+')[0]}"
    started = time.perf_counter()
    torch.manual_seed(seed)
    stage = "build"
    try:
        for stage, message in _stages(recipe, folder, result):
            result.stages[stage] = message
    except _Absent as absent:
        result.stages[absent.stage] = f"skipped: {absent}"
    except Exception as error:
        following = STAGES[len(result.stages)]
        expected = isinstance(error, SpikeNMError)
        words = str(error) if expected else f"{type(error).__name__}: {error}"
        result.stages[following] = f"failed: {words}"
    result.seconds = round(time.perf_counter() - started, 1)
    return result


class _Absent(Exception):
    """Something the check needs is not on this machine."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


def origin(recipe: Recipe) -> str:
    """Where a recipe's code is from: ``owner/name@commit``, or the package's name."""
    target = recipe.target
    if target.repo is not None:
        return target.repo + (f"@{target.commit[:7]}" if target.commit else "")
    return target.package or ""


def _stages(recipe: Recipe, folder: Path | None, result: CheckResult) -> Iterator[tuple[str, str]]:
    model, run, rest = _built(recipe, folder)
    batch = example_input(recipe.inputs)
    yield "build", "ok"

    # raw parameters show when the model runs
    shown = batch if recipe.raw else None
    decided = plan(model, example_inputs=shown, **recipe.plan_options())
    result.layers, result.sparse = len(decided.layers), len(decided.sparse)
    _check_plan(model, decided, recipe)
    yield "plan", "ok"

    wake(model, lambda model: run(model, batch), rest)

    def rates() -> dict[str, float]:
        return firing_rates(model, lambda model: run(model, batch.clone()), rest)

    rouse(model, batch, rates)
    if recipe.channels.keep is not None:
        remove_channels(model, batch, recipe.channels.keep, multiple_of=recipe.block)
        decided = plan(model, example_inputs=shown, **recipe.plan_options())
    if recipe.channels.permute:
        permute(model, batch, decided)
    options = {**recipe.sparsify_options(), "permute": False}
    sparsify(model, example_inputs=shown, **options)
    verify(model, decided).raise_if_invalid()
    yield "sparsify", "ok"

    wake(model, lambda model: run(model, batch), rest)
    _train_one_step(model, lambda model: run(model, batch), rest, decided)
    yield "train", "ok"

    model.eval()
    _check_folded(model, partial(run, batch=batch), rest)
    yield "fold", "ok"

    verify(model, decided).raise_if_invalid()
    if recipe.channels.remove_dead:
        remove_dead_channels(model, batch, nm=decided)
        verify(model, decided).raise_if_invalid()
    yield "verify", "ok"

    # Half of its weights may drive a neuron no more; enlarged ones are as much N:M as before.
    rouse(model, batch, rates)
    fired = list(rates().values())
    result.firing = (sum(rate > 0 for rate in fired), len(fired)) if fired else None
    _check_packed(model, recipe, run, rest, result)
    if native_status().available:
        result.program = _program(model, recipe)
    yield "pack", "ok"


def _check_folded(model: nn.Module, run: Run, rest: Rest) -> None:
    """Folding must leave the output as it is, bit by bit."""
    with torch.no_grad():
        rest(model)
        before = run(model).clone()
        fold(model)
        rest(model)
        after = run(model).clone()
        rest(model)
        if torch.equal(before, after):
            return
        stays = state_that_stays(model, run, rest)
        again = run(model)
        rest(model)
    if not torch.equal(after, again):
        raise VerificationError(
            "two forwards of the folded model from rest differ, so that fold cannot be judged: "
            + what_to_reset(model, stays)
        )
    worst = float((before - after).abs().max())
    raise VerificationError(f"folding changed the output by {worst:g}")


def _check_packed(
    model: nn.Module, recipe: Recipe, run: Run, rest: Rest, result: CheckResult
) -> None:
    """The packed engine must compute the folded model's output, but for spikes on a threshold."""
    result.packed = PackedAgreement()
    for backend in ("dense", "fma") if native_status().available else ("dense",):
        engine = pack(model, example_input(recipe.inputs), backend=backend, check=False)
        for seed in range(_PACK_BATCHES):
            batch = example_input(recipe.inputs, seed=seed)
            found = agreement(model, engine, partial(run, batch=batch), rest)
            result.packed.add(found)
            if found.disagreement:
                raise VerificationError(f"packed as {backend}, batch {seed}: {found.disagreement}")


def _program(model: nn.Module, recipe: Recipe) -> str:
    """Lower the folded model, and compare the program with it on the same spikes."""
    copied = copy_at_rest(model)
    try:
        proved_program(copied, (example_input(recipe.inputs),), None, None, check=True)
    except NotLowered as error:
        return str(error)
    finally:
        unregister(copied)
    return "ok"


def _built(recipe: Recipe, folder: Path | None) -> tuple[nn.Module, Run, Rest]:
    try:
        root = root_of(recipe, folder)
    except RecipeError as error:
        raise _Absent("build", str(error)) from error
    try:
        model = build_model(recipe, root)
    except RecipeError as error:
        lacking = missing_requirements(recipe.target.requires)
        package = recipe.target.package
        if any("not installed" in text for text in lacking) or (
            package is not None and missing_requirements([package])
        ):
            raise _Absent("build", str(error)) from error
        raise
    rest = reset_function(recipe, root)

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        torch.manual_seed(_SEED)  # models that draw initial states at random draw alike
        return forward(model, batch, recipe.inputs)

    return model, run, rest


def _check_plan(model: nn.Module, decided: Plan, recipe: Recipe) -> None:
    """Every weight layer exactly once, and as many as when the recipe was written."""
    names = [name for name, module in model.named_modules() if is_weight_layer(module)]
    listed = [layer.name for layer in decided.layers if layer.kind != RAW]
    if sorted(names) != sorted(listed):
        raise PlanError(f"the plan lists {len(listed)} layers, the model has {len(names)}")
    expected = recipe.expected
    found = (len(decided.layers), len(decided.sparse))
    if expected is not None and found != (expected.layers, expected.sparse):
        raise PlanError(
            f"{found[1]} of {found[0]} layers become sparse; the recipe was written for "
            f"{expected.sparse} of {expected.layers}: is this another commit or version?"
        )


def _train_one_step(
    model: nn.Module, run: Callable[[nn.Module], Tensor], rest: Rest, decided: Plan
) -> None:
    """An ordinary step; weights must move, and stay N:M."""
    model.train()
    rest(model)
    optimizer = torch.optim.SGD(param_groups(model, 0.01))
    loss = (run(model).float() - 1.0).square().mean()
    optimizer.zero_grad()
    loss.backward()
    reached = sum(_has_gradient(layer.holder(model)[0]) for layer in decided.sparse)
    if not reached:
        raise VerificationError("no gradient reached any sparse layer: is the model silent?")
    optimizer.step()
    model.zero_grad()  # sets them to None: as large as weights and logits
    rest(model)
    verify(model, decided).raise_if_invalid()


def _has_gradient(layer: nn.Module) -> bool:
    return any(
        p.grad is not None and bool(torch.isfinite(p.grad).all()) and bool((p.grad != 0).any())
        for p in layer.parameters(recurse=False)
    )
