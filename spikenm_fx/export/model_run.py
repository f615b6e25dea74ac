# SPDX-License-Identifier: Apache-2.0
"""A model's own spikes, step by step, whatever its way to step through time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.export.parts import Lead
from spikenm_fx.state import reset_to_rest

__all__ = ["SINGLE_STEPS", "in_steps", "over_steps"]

SINGLE_STEPS = 8
"""Steps that a model is run which takes one step a call, its example given again each time."""


def in_steps(x: Tensor, lead: Lead, steps: int | None = None) -> Tensor:
    """The input of each step, ``[T, N, ...]``.

    Args:
        x: as the model takes it.
        lead: its leading axes; without time among them it is given in every step.
        steps: how many, where there is no time axis.
    """
    if lead == ("T", "N"):
        return x
    if lead == ("N", "T"):
        return x.transpose(0, 1)
    if lead == ("N",):
        return x.expand(steps or SINGLE_STEPS, *x.shape)
    count = steps or 1
    sizes = (-1, count) if lead == ("NT",) else (count, -1)
    whole: Tensor = x.unflatten(0, sizes)
    return whole.transpose(0, 1) if lead == ("NT",) else whole


def over_steps(
    model: nn.Module,
    x: Tensor,
    names: Iterable[str],
    leads: Mapping[str, Lead],
    sizes: Mapping[str, int],
    *,
    single: bool,
) -> dict[str, Tensor]:
    """What modules of ``model`` emit in each step.

    Args:
        model: a copy at rest, which this may run and leave in any state.
        x: as the model takes it.
        names: of the modules to listen to.
        leads: leading axes of what each emits.
        sizes: of these axes.
        single: one call is one step.

    Returns:
        ``[T, N, ...]`` by name.
    """
    heard: dict[str, list[Tensor]] = {name: [] for name in names}

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            heard[name].append((out[0] if isinstance(out, tuple) else out).detach().clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(listen(name)) for name in heard]
    try:
        reset_to_rest(model)
        with torch.no_grad():
            _run(model, x, SINGLE_STEPS if single else 1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _stacked(outs, leads[name], sizes) for name, outs in heard.items()}


def _run(model: nn.Module, x: Tensor, calls: int) -> None:
    """Call it; a model that takes and returns a ``state`` (Norse) gets it back."""
    carries = "state" in inspect.signature(model.forward).parameters
    state = None
    for _ in range(calls):
        if carries:
            _, state = model(x.clone(), state)
        else:
            model(x.clone())


def _stacked(outs: list[Tensor], lead: Lead, sizes: Mapping[str, int]) -> Tensor:
    if lead == ("N",):
        return torch.stack(outs)
    return in_steps(outs[0], lead, sizes.get("T"))
