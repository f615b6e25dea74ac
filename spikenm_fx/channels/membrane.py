# SPDX-License-Identifier: Apache-2.0
"""Activity of channels by the membranes of their neurons: mean |V| over batch, time and space."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spikenm_fx.state import preserved_in_eval, reset_to_rest
from spikenm_fx.trace import NeuronSpec, membranes

if TYPE_CHECKING:
    from spikenm_fx.trace import CoupledGroup, SpikingGraph

__all__ = [
    "channel_axis",
    "mean_membrane",
    "membranes_on",
    "neurons_of",
    "norms_of",
    "producers_of",
    "unknown_rules",
]


@torch.no_grad()
def mean_membrane(spec: NeuronSpec, currents: Sequence[Tensor], axis: int) -> Tensor:
    """Mean |V| of each channel, V the potential before spike and reset; float64 ``[channels]``.

    Args:
        spec: of the neuron, exact.
        currents: what it received, one tensor for each call from rest on; with a time axis each is
            a whole sequence, else they are the steps of one.
        axis: of the channels, counted from the back, as of the layer that drives the neuron.
    """
    if spec.time_axis is not None:
        sequences = [current.movedim(spec.time_axis, 0) for current in currents]
    else:
        sequences = [torch.stack(list(currents))]
    sums, count = None, 0
    for sequence in sequences:
        values = membranes(spec, sequence.detach().float()).abs().double()
        rows = values.movedim(axis, -1).flatten(0, -2)
        sums = rows.sum(0) if sums is None else sums + rows.sum(0)
        count += len(rows)
    assert sums is not None
    return sums / max(count, 1)


def membranes_on(
    model: nn.Module, graph: SpikingGraph, arguments: tuple[Any, ...]
) -> dict[str, Tensor]:
    """Mean |V| of each channel, by neuron, float64 ``[channels]``; those whose rule is known.

    Args:
        model: run in eval mode from rest, and afterwards as before.
        graph: of it.
        arguments: of its call.
    """
    modules = dict(nn.Module.named_modules(model))
    names = [n for n in graph.neurons if n in modules and not unknown_rules(graph, [n])]
    currents: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        currents[name].append(given.detach())

    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_in_eval(model))
        reset_to_rest(model)
        for name in names:
            hook = modules[name].register_forward_pre_hook(
                lambda _, args, kwargs, name=name: keep(name, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        model(*arguments)
    return {
        name: mean_membrane(
            graph.neurons[name].spec, found, channel_axis(modules[graph.neurons[name].layers[0]])
        )
        for name, found in currents.items()
        if found and graph.neurons[name].layers and graph.neurons[name].layers[0] in modules
    }


def channel_axis(layer: nn.Module) -> int:
    """The axis of a Linear's or Conv's output that runs over channels, from the back."""
    return -1 - len(getattr(layer, "kernel_size", ()))


def producers_of(group: CoupledGroup) -> set[str]:
    """Names of the layers that make the channels of a group."""
    return {member.tensor.rpartition(".")[0] for member in group.producers}


def neurons_of(graph: SpikingGraph, group: CoupledGroup) -> list[str]:
    """Neuron modules that hold the channels of a group: those that its producers drive."""
    producers = producers_of(group)
    return [
        name
        for name, record in graph.neurons.items()
        if not record.functional and producers & set(record.layers)
    ]


def norms_of(graph: SpikingGraph, group: CoupledGroup) -> list[str]:
    """Names of the weights (gamma) of the norms that the channels of a group pass."""
    norms = set(graph.of_kind("norm"))
    return [
        member.tensor
        for member in group.members
        if member.tensor.endswith(".weight") and member.tensor.rpartition(".")[0] in norms
    ]


def unknown_rules(graph: SpikingGraph, neurons: Iterable[str]) -> list[str]:
    """Those of ``neurons`` whose record does not tell the membrane."""
    specs = {name: graph.neurons[name].spec for name in neurons}
    return [name for name, spec in specs.items() if not spec.exact or spec.folded_time]
