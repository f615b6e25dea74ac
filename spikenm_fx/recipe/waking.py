# SPDX-License-Identifier: Apache-2.0
"""Let a freshly initialised network fire: a silent one would pass any check of its spikes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from spikenm_fx._torch import BatchNormBase
from spikenm_fx.errors import TraceError
from spikenm_fx.report.neurons import NeuronWatch
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["drive_harder", "drivers_of", "firing_rates", "rouse", "wake"]

_STEPS = 3
_ROUNDS, _FACTOR = 4, 4.0


def wake(
    model: nn.Module, run: Callable[[nn.Module], object], rest: Callable[[nn.Module], None]
) -> None:
    """Let batch norms see data, so that the network fires also in eval mode.

    Args:
        model: changed in place; in training mode afterwards.
        run: one forward of a batch, ``[T, B, ...]`` or ``[B, ...]``.
        rest: forgets the neurons' state.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.momentum = 0.9
    with torch.no_grad():
        for _ in range(_STEPS):
            rest(model)
            run(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    rest(model)


def firing_rates(
    model: nn.Module, run: Callable[[nn.Module], object], rest: Callable[[nn.Module], None]
) -> dict[str, float]:
    """Mean spikes per neuron and step of each neuron layer, from one forward in eval mode.

    Args:
        model: its mode is as before afterwards.
        run: one forward of a batch.
        rest: forgets the neurons' state; called before and after.
    """
    watch, training = NeuronWatch.of_model(model), model.training
    model.eval()
    rest(model)
    with torch.no_grad(), watch.attached():
        run(model)
    rest(model)
    model.train(training)
    return {neuron.name: neuron.rate for neuron in watch.reports()}


def rouse(
    model: nn.Module,
    batch: Tensor,
    firing: Callable[[], dict[str, float]],
) -> None:
    """Drive the silent neurons of a model harder, a few times: where no norm follows it helps.

    Args:
        model: changed in place.
        batch: ``[T, B, ...]`` or ``[B, ...]``, what it is traced with, to see who drives whom.
        firing: measures the rate of each neuron layer.
    """

    def silent() -> set[str]:
        return {name for name, rate in firing().items() if not rate}

    if not silent():
        return
    with contextlib.suppress(TraceError):
        drive_harder(model, trace(model, batch), silent, factor=_FACTOR, rounds=_ROUNDS)


@torch.no_grad()
def drive_harder(
    model: nn.Module,
    graph: SpikingGraph,
    silent: Callable[[], Collection[str]],
    *,
    factor: float,
    rounds: int,
) -> None:
    """Multiply the parameters of the layers before silent neurons until these fire.

    Args:
        model: changed in place.
        graph: of it: who drives whom.
        silent: names the neurons that do not fire; asked before each round.
        factor: by which weights and biases grow in a round.
        rounds: at most.
    """
    for _ in range(rounds):
        drivers = {layer for neuron in silent() for layer in drivers_of(graph, neuron)}
        if not drivers:
            return
        for name in drivers:
            raw = graph.layers[name].kind == "functional"  # a parameter, not a layer
            holder = model.get_submodule(name.rpartition(".")[0] if raw else name)
            for parameter in holder._parameters.values():
                if parameter is not None:
                    parameter.mul_(factor)


def drivers_of(graph: SpikingGraph, neuron: str) -> list[str]:
    """Layers of which ``neuron`` is the next one; the first before it where there is none."""
    record = graph.neurons.get(neuron)
    if record is None:
        return []
    nearest = [name for name in record.layers if graph.layers[name].post[0] == neuron]
    return nearest or list(record.layers[:1])
