# SPDX-License-Identifier: Apache-2.0
"""The one-liner: plan purely, check everything, then mask in one short mutation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from spikenm_fx._torch import fsdp_has_run
from spikenm_fx.channels import permute as permute_channels
from spikenm_fx.errors import PlanError, no_module
from spikenm_fx.masks.activity import check_activity, guide_by_activity
from spikenm_fx.masks.attach import attach, masked_weights, refuse_unmaskable
from spikenm_fx.masks.checkpoint import check_checkpoint
from spikenm_fx.masks.eid import EID, Guide
from spikenm_fx.masks.eid.connect import watch_calls, wire
from spikenm_fx.masks.eid.observed import Observed
from spikenm_fx.masks.eid.watch import Watch
from spikenm_fx.masks.hooks import install
from spikenm_fx.masks.layer import MaskedWeight
from spikenm_fx.masks.methods import Method, method_named
from spikenm_fx.masks.methods.activity import Activity
from spikenm_fx.masks.run import Run
from spikenm_fx.masks.schedule import Schedule
from spikenm_fx.masks.shard import is_sharded, shard_of, whole_of
from spikenm_fx.masks.start import initial_scores, start
from spikenm_fx.pattern import (
    NM,
    BlockView,
    PatternLike,
    Remainder,
    is_weight_layer,
    not_finite,
)
from spikenm_fx.plan import LayerPlan, Plan, Rule, plan
from spikenm_fx.plan.rules import ordered_rules
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["param_groups", "sparsify"]

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify(
    model: ModelT,
    nm: PatternLike | Plan = "2:4",
    *,
    example_inputs: Any = None,
    method: str | Method = "spikenm",
    rules: Iterable[Rule] = (),
    remainder: Remainder = "skip",
    total_steps: int | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
    permute: bool = False,
) -> ModelT:
    """Make ``model`` N:M sparse, in place, and let it learn which weights to keep.

    From now on the weight of every planned layer has at most n non-zeros in each block of m
    consecutive input channels, in evaluation always, in training but for the fade below.  Train as
    before, with an optimizer built before or afterwards: the logits move by a rule of their own at
    each of its steps (:func:`spikenm_fx.step` in loops without one); then :func:`fold`.

    How the one-liner ends well without a word on schedules: a prior that moves with the magnitudes
    of the weights joins the logits, their scale grows with each optimizer step, so that the
    sampling noise fades as 1/step whatever the length of the run, and evaluation always uses the N
    largest.

    With ``total_steps`` the scale rises to its final value within the run, and the masks freeze for
    the last 15 % so that weights and normalisation statistics adapt to them.  Layers that keep less
    than half of their weights (1:4, 1:8, not 2:4) then also start dense under ``"spikenm"``: what
    is not drawn fades out over the first half of the run.  Until then these weights are not N:M in
    training mode, those of evaluation mode and of checkpoints are; ``SpikeNM(fade=0.0)`` is N:M at
    every step.

    Args:
        model: any module; Linear and Conv layers of any framework are found by inheritance, raw
            parameters (``F.linear(x, self.w)``) where ``example_inputs`` show their use.
        nm: pattern, keep at most n of m; or a :class:`Plan` made of this model.
        example_inputs: see :func:`spikenm_fx.plan`; they also show which neuron each layer drives,
            which otherwise the first training forward does.
        method: ``"spikenm"`` (arXiv 2511.12097), a neighbour (``"cyclical"``, ``"regrow"``,
            ``"activity"``, ``"uticket"``), a baseline (``"magnitude"``, ``"srste"``,
            ``"maskllm"``, ``"random"``, ``"dense"``) or a configured instance of one.
        rules: see :func:`spikenm_fx.plan`.
        remainder: see :func:`spikenm_fx.plan`.
        total_steps: optimizer steps of the whole run, if known.
        schedule: instead of ``total_steps``, for full control.
        seed: of the sampling noise; torch's own generators are not touched.
        permute: first put coupled channels in the order in which N:M keeps most, see
            :func:`spikenm_fx.channels.permute`; needs ``example_inputs``.  For methods that prune
            at once, as ``"magnitude"``; learnt masks find their own way.

    Returns:
        ``model`` itself.

    Raises:
        PatternError: for a malformed pattern.
        PlanError: if nothing would become sparse, a rule matches nothing, the model is sparse
            already, or a weight holds NaN or infinity, has no values (meta device) or is sharded
            (FSDP).  The model is then as it was.
        TraceError: if the model cannot run on ``example_inputs``.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(no_module("sparsify", model))
    refuse_if_sparse(model)
    if schedule is not None and total_steps is not None:
        raise PlanError("give total_steps or schedule, not both: Schedule(total_steps=...) has it")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise PlanError(f"seed={seed!r}: give an integer of 64 bits, which checkpoints can store")
    chosen = method_named(method)
    eid = getattr(chosen, "eid", None)
    # one trace serves the decisions and the neurons that each layer drives
    driven = isinstance(chosen, Activity) or (isinstance(eid, EID) and eid.needs_neuron)
    wanted = driven or not isinstance(nm, Plan)
    if isinstance(chosen, Activity) and example_inputs is None:
        raise PlanError(
            "method='activity' needs example_inputs, which show whose neurons feed which layer: "
            "sparsify(model, nm, method='activity', example_inputs=x)"
        )
    ordered = ordered_rules(rules)
    graph = trace(model, example_inputs) if wanted and example_inputs is not None else None
    decided = _decide(model, nm, graph, ordered, remainder)
    _refuse_unusable(model, decided)
    if permute:
        _reorder(model, decided, example_inputs, seed)
    run = Run(seed)
    run.root = model
    if isinstance(chosen, Activity):
        weights = {entry.name: _parameter_of(model, entry.name) for entry in decided.sparse}
        assert graph is not None
        check_activity(chosen, graph, weights)
    _apply(model, decided, chosen, run, lambda nm: schedule or chosen.schedule(total_steps, nm))
    if isinstance(eid, EID):
        _guide(model, eid, graph if eid.needs_neuron else None)
    elif isinstance(chosen, Activity) and graph is not None:
        guide_by_activity(model, graph, example_inputs)
    install()
    return model


def param_groups(model: nn.Module, lr: float, **options: Any) -> list[dict[str, Any]]:
    """Optimizer groups: the model's own parameters, and those that belong to its masks.

    No optimizer needs the second one: logits move by a rule of their own, at each step of the
    weights' optimizer, and ``model.parameters()`` serves as well.  It is for code that wants to
    tell the two apart.

    Args:
        model: a sparsified model.
        lr: learning rate of the weights.
        **options: further options of the weights' group, e.g. ``weight_decay``.

    Raises:
        PlanError: if the model is not sparse, or for ``logits_lr``, which nothing reads any more.
    """
    if "logits_lr" in options:
        raise PlanError(
            "logits_lr: mask logits are not stepped by an optimizer; SpikeNM(rate=...) says how "
            "far a step moves them"
        )
    masks = [mask for _, _, mask in masked_weights(model)]
    if not masks:
        raise PlanError(
            f"{type(model).__name__} has no mask logits; call spikenm_fx.sparsify(model) first"
        )
    ours = {id(tensor) for mask in masks for tensor in (mask.scores, mask.prior)}
    parameters = list(nn.Module.parameters(model))  # rockpool's own is no iterator
    return [
        {"params": [p for p in parameters if id(p) not in ours], "lr": lr, **options},
        {"params": [p for p in parameters if id(p) in ours], "lr": lr, "weight_decay": 0.0},
    ]


def refuse_if_sparse(model: nn.Module) -> None:
    """Let through a model without masks.

    Raises:
        PlanError: if ``model`` is sparse already.
    """
    first = next(masked_weights(model), None)
    if first is not None:
        name, _, mask = first
        raise PlanError(
            f"{type(model).__name__} is sparse already ({name} is {mask.view.nm}); "
            "fold(model) first to start over, or continue training it as it is"
        )


def _decide(
    model: nn.Module,
    nm: PatternLike | Plan,
    graph: SpikingGraph | None,
    rules: tuple[Rule, ...],
    remainder: Remainder,
) -> Plan:
    if not isinstance(nm, Plan):
        return plan(model, nm, graph=graph, rules=rules, remainder=remainder)
    if rules or remainder != "skip":
        raise PlanError("a plan was given: give its rules and remainder to plan(), not here")
    for entry in nm.sparse:
        weight = entry.find(model)
        shape = None if weight is None else tuple(weight.shape)
        if shape != entry.shape:
            raise PlanError(
                f"the plan was made of another model: {entry.name} {entry.shape} there, "
                f"{shape or 'missing'} here; make it anew with plan(model, ...)"
            )
    return nm


def _reorder(model: nn.Module, decided: Plan, example_inputs: Any, seed: int) -> None:
    if example_inputs is None:
        raise PlanError(
            "permute=True needs example_inputs, which show which channels go together: "
            "sparsify(model, nm, example_inputs=x, permute=True)"
        )
    permute_channels(model, example_inputs, decided, seed=seed)


def _refuse_unusable(model: nn.Module, decided: Plan) -> None:
    for entry in decided.sparse:
        weight = entry.find(model)
        assert weight is not None
        if is_sharded(weight) and any(map(fsdp_has_run, nn.Module.modules(model))):
            raise PlanError(
                f"{entry.name} {entry.shape} was gathered by fully_shard before it is masked, "
                "which then gathers dense weights for good: call sparsify before the first forward "
                "of the sharded model"
            )
        if weight.is_meta:
            raise PlanError(
                f"{entry.name} {entry.shape} is on the meta device and has no values from which "
                "masks could start: give the model memory and values (to_empty, then load or "
                "initialise) before sparsify"
            )
        if not _is_finite(weight.detach()):
            raise PlanError(
                f"{entry.name} {entry.shape} holds NaN or infinity; masks cannot be learnt from "
                "it: load or initialise finite weights first"
            )


def _is_finite(weight: Tensor) -> bool:
    if is_sharded(weight):
        return bool(whole_of(torch.isfinite(weight).all()))
    return not_finite(weight) == 0


def _apply(
    model: nn.Module,
    decided: Plan,
    method: Method,
    run: Run,
    schedule_of: Callable[[NM], Schedule],
) -> None:
    sharing: dict[int, list[LayerPlan]] = defaultdict(list)
    for entry in decided.sparse:
        sharing[id(entry.find(model))].append(entry)
    ready = []
    for entries in sharing.values():
        first, holders = entries[0], [entry.holder(model) for entry in entries]
        assert first.nm is not None
        for entry, (module, _) in zip(entries, holders, strict=True):
            refuse_unmaskable(entry.name, module)
        view = BlockView(method.pattern(first.nm), first.shape, first.axis == 0, first.groups)
        schedule = schedule_of(view.nm)
        mask = MaskedWeight(*holders[0], first.name, view, method, run, schedule)
        mask.holders = holders
        ready.append((holders, mask, *_parameters_of(mask, first.find(model))))
    for holders, mask, scores, prior in ready:  # nothing that can fail comes after this line
        attach(holders, mask, scores, prior)
        start(mask)
    model.register_load_state_dict_pre_hook(check_checkpoint)


@torch.no_grad()
def _parameters_of(
    mask: MaskedWeight, weight: Tensor | None
) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Initial scores and prior of a mask; they are the method's own to move, not an optimizer's.

    Parameters all the same: averages, copies and vectors of parameters take them along.  Only where
    the user's loss asks for a gradient of the logits do they require one.
    """
    assert weight is not None
    method, device = mask.method, weight.device
    scalar = partial(torch.zeros, (), dtype=torch.float32, device=device)
    if is_sharded(weight):
        mask.shard = shard_of(mask, cast("DTensor", weight))
        mask.view = mask.shard.view
    mask.mask = torch.ones_like(mask.values, dtype=torch.bool)
    mask.faded, mask.spread = scalar(), scalar().view(1)
    scores = initial_scores(mask)
    if mask.shard is not None and scores is not None:
        scores = mask.shard.like_scores(scores)
    eid = getattr(method, "eid", None)
    asked = isinstance(eid, EID) and not eid.automatic
    return (
        None if scores is None else nn.Parameter(scores, requires_grad=asked),
        # of one dimension: FSDP knows no parameters of none
        nn.Parameter(scalar().view(1), requires_grad=False) if method.moving_prior else None,
    )


def _parameter_of(model: nn.Module, name: str) -> str:
    """The weight of a layer, or a raw parameter itself."""
    modules = dict(nn.Module.named_modules(model))
    return f"{name}.weight".lstrip(".") if name in modules else name


def _guide(model: nn.Module, eid: EID, graph: SpikingGraph | None) -> None:
    """Give each mask its credits, and the hooks that measure them."""
    _, _, first = next(masked_weights(model))
    watch = first.run.watch = Watch(
        first.run, first.schedule, eid
    )  # all schedules freeze at the same step
    holders: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    masks: dict[int, MaskedWeight] = {}
    layers = {name for name, module in nn.Module.named_modules(model) if is_weight_layer(module)}
    for name, layer, mask in masked_weights(model):
        masks[id(mask)] = mask
        if name in layers:
            holders[id(mask)].append((name, layer))
        else:
            watch.notes[name] = "a raw parameter, multiplied by a call that no hook sees: no EID"
    for key, mask in masks.items():
        watched = eid.needs_input and holders[key]
        mask.guide = Guide(eid, Observed(watch, holders[key]) if watched else None)
    if graph is not None:
        wire(watch, model, graph)
    if eid.needs_neuron:
        watch_calls(model, watch)
