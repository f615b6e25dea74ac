# SPDX-License-Identifier: Apache-2.0
"""Make fresh networks spike to their last layer: silent ones prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import BatchNormBase, tree_flatten
from spikenm_fx.recipe.waking import drive_harder, drivers_of
from spikenm_fx.trace import SpikingGraph, trace

__all__ = ["liven", "rouse"]

_ROUNDS, _RATE = 40, 0.01


def liven(
    model: nn.Module, inputs: tuple[Tensor, ...], reset: Callable[[nn.Module], None]
) -> nn.Module:
    """Calibrate the norms on the input, then wake the neurons that are silent still.

    One forward in training mode with momentum 1 makes each norm's statistics those of what it
    really receives.

    Args:
        model: a spiking network.
        inputs: arguments of its forward, of any shape that it takes.
        reset: puts its neurons to rest.

    Returns:
        ``model``, in eval mode.
    """
    norms = [m for m in nn.Module.modules(model) if isinstance(m, BatchNormBase)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.data.fill_(2.0)
        if norm.bias is not None:
            norm.bias.data.copy_(torch.linspace(-0.5, 1.0, norm.num_features))
    with torch.no_grad():
        model.train()(*(x.clone() for x in inputs))
    reset(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return rouse(model.eval(), inputs, reset)


@torch.no_grad()
def rouse(
    model: nn.Module, inputs: tuple[Tensor, ...], reset: Callable[[nn.Module], None]
) -> nn.Module:
    """Double the parameters of layers before silent neurons until these spike, front to back.

    Arguments, shapes among them, as of :func:`liven`.
    """
    graph = trace(model, inputs)
    drive_harder(
        model, graph, lambda: _silent(model, graph, inputs, reset), factor=2.0, rounds=_ROUNDS
    )
    return model


def _silent(
    model: nn.Module,
    graph: SpikingGraph,
    inputs: tuple[Tensor, ...],
    reset: Callable[[nn.Module], None],
) -> list[str]:
    """Neurons that hardly spike although a layer before them does receive something."""
    rates: dict[str, float] = {}
    handles = []

    def watch(name: str, module: nn.Module, given: bool) -> None:
        def look(_: nn.Module, args: Any, out: Any) -> None:
            seen = args if given else out
            first = next((t for t in tree_flatten(seen)[0] if isinstance(t, Tensor)), None)
            if first is not None:
                rates[name] = max(rates.get(name, 0.0), float((first != 0).double().mean()))

        handles.append(module.register_forward_hook(look))

    modules = dict(nn.Module.named_modules(model))
    neurons = [n for n, record in graph.neurons.items() if n in modules and record.layers]
    layers = {layer for n in neurons for layer in drivers_of(graph, n)}
    for name in neurons:
        watch(name, modules[name], given=False)
    for name in layers & modules.keys():
        watch(name, modules[name], given=True)
    reset(model)
    try:
        model(*(x.clone() for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
        reset(model)
    return [
        name
        for name in neurons
        if rates.get(name, 0.0) < _RATE
        and graph.neurons[name].spec.kind != "integrator"
        and any(rates.get(layer, 0.0) > 0 for layer in drivers_of(graph, name))
    ]
