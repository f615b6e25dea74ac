# SPDX-License-Identifier: Apache-2.0
"""Coupled channels held against their definition: permute them, and the outputs stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spikenm_fx._torch import BatchNormBase, tree_flatten
from spikenm_fx.bench.zoo import Case
from spikenm_fx.trace import CoupledGroup, SpikingGraph, coupled_groups
from spikenm_fx.trace.channels.groups import permute_members

__all__ = ["count_groups", "in_double", "other_order", "outputs_of", "staying"]

PATIENCE = 900.0
"""Seconds for one model's negative controls, one forward each; what is left is counted."""


def count_groups(case: Case, graph: SpikingGraph) -> dict[str, int]:
    """Permute the unfrozen groups: outputs must stay; permuting producers alone must show.

    In float64 to 1e-8; frameworks that know only float32 are held to 1e-4 of the output's range.
    All groups are permuted at once, and halves of them where the outputs do not stay.  What does
    not show where neurons spike rarely is asked again where they spike more often.
    """
    groups = coupled_groups(graph)
    free = [group for group in groups if not group.frozen]
    with in_double(case) as (exactly, precise):
        wrong = _wrong(case.model, free, staying(exactly, precise))
        deadline = time.monotonic() + PATIENCE
        quiet, unasked = _quiet(case.model, free, staying(exactly, precise), deadline)
        if quiet:
            with _brighter(case.model):
                quiet, late = _quiet(case.model, quiet, staying(exactly, precise), deadline)
                unasked += late
    return {
        **{"exact": len(free) - len(wrong), "wrong": len(wrong)},
        **{"frozen": len(groups) - len(free), "quiet": len(quiet), "without control": unasked},
    }


def staying(case: Case, precise: bool) -> Callable[[], bool]:
    """Asks whether the outputs are still what they are now."""
    before = outputs_of(case)
    scale = max((float(t.abs().max()) for t in before), default=0.0) or 1.0
    tolerance = 1e-8 if precise else 1e-4 * scale
    return lambda: _difference(before, outputs_of(case)) <= tolerance


def _quiet(
    model: nn.Module, groups: Sequence[CoupledGroup], stays: Callable[[], bool], deadline: float
) -> tuple[list[CoupledGroup], int]:
    """Groups whose producers may be permuted alone unseen, and how many there was no time for."""
    quiet: list[CoupledGroup] = []
    for place, group in enumerate(groups):
        if time.monotonic() > deadline:
            return quiet, len(groups) - place
        with _permuted(model, [group], producers_only=True):
            quiet += [group] if stays() else []
    return quiet, 0


@contextmanager
def _brighter(model: nn.Module) -> Iterator[None]:
    """Norms that shift their channels up: neurons spike more often."""
    norms = [m for m in nn.Module.modules(model) if isinstance(m, BatchNormBase)]
    biases = [(norm.bias, norm.bias.detach().clone()) for norm in norms if norm.affine]
    with torch.no_grad():
        for bias, _ in biases:
            bias.add_(0.75)
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, old in biases:
                bias.copy_(old)


def _wrong(
    model: nn.Module, groups: Sequence[CoupledGroup], stays: Callable[[], bool]
) -> list[CoupledGroup]:
    """Those of ``groups`` that change the outputs, by bisection."""
    if not groups:
        return []
    with _permuted(model, groups):
        if stays():
            return []
    if len(groups) == 1:
        return list(groups)
    half = len(groups) // 2
    return [*_wrong(model, groups[:half], stays), *_wrong(model, groups[half:], stays)]


@contextmanager
def _permuted(
    model: nn.Module, groups: Sequence[CoupledGroup], *, producers_only: bool = False
) -> Iterator[None]:
    """Each group's channels in another order, or what its producers make only."""
    orders = [other_order(group.size) for group in groups]

    def reorder(group: CoupledGroup, order: Tensor) -> None:
        members = group.producers if producers_only else group.members
        permute_members(model, group, members, order)

    for group, order in zip(groups, orders, strict=True):
        reorder(group, order)
    try:
        yield
    finally:
        for group, order in zip(groups, orders, strict=True):
            reorder(group, torch.argsort(order))


def other_order(size: int) -> Tensor:
    """A permutation in which no channel keeps its place."""
    mixed = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    order = torch.empty_like(mixed)
    order[mixed] = mixed.roll(1)
    return order


@contextmanager
def in_double(case: Case) -> Iterator[tuple[Case, bool]]:
    """The same case in float64, and whether that works; else in float32 on a coarse grid."""
    before = torch.get_default_dtype()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs)
    double = Case(case.model, inputs, case.reset)
    try:
        torch.set_default_dtype(torch.float64)
        case.model.double()
        outputs_of(double)
    except RuntimeError:  # the framework makes float32 tensors of its own
        torch.set_default_dtype(before)
        case.model.float()
        case.reset(case.model)
        with _coarse(case.model):
            yield case, False
        return
    try:
        yield double, True
    finally:
        torch.set_default_dtype(before)
        case.model.float()


@contextmanager
def _coarse(model: nn.Module) -> Iterator[None]:
    """Weights on a grid of 1/64: sums of spikes are exact in float32, in whatever order."""
    tensors = [p for p in nn.Module.parameters(model) if p.dim() > 1]
    kept = [p.detach().clone() for p in tensors]
    with torch.no_grad():
        for parameter in tensors:
            parameter.copy_((parameter * 64).round() / 64)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(tensors, kept, strict=True):
                parameter.copy_(old)


def outputs_of(case: Case) -> list[Tensor]:
    """What the model returns from rest, its tensors in order."""
    case.reset(case.model)
    with torch.no_grad():
        outputs = [t for t in tree_flatten(case.run())[0] if isinstance(t, Tensor)]
    case.reset(case.model)
    return outputs


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
