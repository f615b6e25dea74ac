# SPDX-License-Identifier: Apache-2.0
"""Let a freshly initialised network fire: a silent one would pass any check of its spikes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spikenm_fx.errors import TraceError
from spikenm_fx.report.neurons import NeuronWatch
from spikenm_fx.trace import trace

__all__ = ["firing_rates", "rouse", "wake"]

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
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
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
    """Enlarge the weights that drive silent neurons, a few times: where no norm follows it helps.

    Args:
        model: changed in place.
        batch: ``[T, B, ...]`` or ``[B, ...]``, what it is traced with, to see who drives whom.
        firing: measures the rate of each neuron layer.
    """
    silent = {name for name, rate in firing().items() if not rate}
    if not silent:
        return
    try:
        layers = trace(model, batch).layers
    except TraceError:
        return
    for _ in range(_ROUNDS):
        drivers = [name for name, record in layers.items() if silent & set(record.post)]
        with torch.no_grad():
            for name in drivers:
                weight = getattr(model.get_submodule(name), "weight", None)
                if isinstance(weight, Tensor):
                    weight.mul_(_FACTOR)
        silent = {name for name, rate in firing().items() if not rate}
        if not silent or not drivers:
            return
