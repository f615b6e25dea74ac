# SPDX-License-Identifier: Apache-2.0
"""Where in memory the inputs of a neuron lie, next to the outputs of the layer before it.

Between both may be reshapes, norms and pools: the graph is asked, and slopes at the neuron's inputs
are brought back through it where both do not lie alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikenm_fx.masks.eid.slopes import Neuron, Source, in_layer_order, slopes_of
from spikenm_fx.masks.eid.walk import gradients_without_hooks

if TYPE_CHECKING:
    from spikenm_fx.masks.eid.watch import Watch
    from spikenm_fx.trace import NeuronSpec

__all__ = ["locate"]

_PROBES = (0.3719, 0.6173, 0.8317)  # no fixed points of the usual transpositions


def locate(watch: Watch, source: Source, neuron: Neuron, spec: NeuronSpec, current: Tensor) -> None:
    """Learn how the inputs of ``neuron`` lie, and bring its slopes to the outputs of ``source``.

    Args:
        watch: of both.
        source: the layer.
        neuron: that it drives, whose call is the last one kept.
        spec: of the neuron.
        current: its input, of any shape, with its graph.
    """
    if source.same_order is None:
        source.same_order = _same_order(watch, source, neuron, spec, current)
    if source.same_order or spec.step_mode != "multi":
        return
    slopes = slopes_of(neuron, spec, neuron.calls[-1:])
    outputs = [use.output for use in source.uses if use.output is not None]
    asked = len(outputs) == len(source.uses)
    if slopes is None or not asked or not all(y.requires_grad for y in (current, *outputs)):
        return
    try:
        back = _gradients(watch, current, slopes[0].to(current.dtype), outputs)
    except RuntimeError:  # a compiled graph; a norm whose weight FSDP has let go of
        return
    source.mapped = [
        torch.zeros_like(y) if g is None else g for y, g in zip(outputs, back, strict=True)
    ]


def _same_order(
    watch: Watch, source: Source, neuron: Neuron, spec: NeuronSpec, current: Tensor
) -> bool | None:
    """Ask the graph where three of the neuron's inputs come from; None while it cannot tell."""
    outputs = [use.output for use in source.uses if use.output is not None]
    if len(outputs) < len(source.uses) or not all(y.requires_grad for y in outputs):
        return None  # inside of a compiled graph, or without one
    total = sum(use.shape.numel() for use in source.uses)
    before = sum(call.current.numel() for call in neuron.calls[:-1])
    if spec.step_mode == "multi" and before + current.numel() != total and len(source.posts) == 1:
        return False  # pooled or cut on the way
    if len(source.posts) > 1 or not current.requires_grad or before + current.numel() > total:
        return None
    index = in_layer_order(
        torch.arange(current.numel(), device="cpu").view(current.shape), spec, len(source.uses)
    )
    places = index.tolist()
    for place in {int(share * current.numel()) for share in _PROBES}:
        one = torch.zeros(current.shape, dtype=current.dtype, device=current.device)
        one.view(-1)[place] = 1.0
        try:
            grads = _gradients(watch, current, one, outputs)
        except RuntimeError:  # a compiled graph, an output that was overwritten
            return None
        flat = [
            torch.zeros(y.numel(), dtype=torch.float32, device=y.device)
            if g is None
            else g.flatten().float().abs()
            for y, g in zip(outputs, grads, strict=True)
        ]
        strongest = torch.cat(flat)
        if not bool(strongest.any()):
            return None
        if int(strongest.argmax()) != before + places.index(place):
            return False
    return True


def _gradients(
    watch: Watch, of: Tensor, grad: Tensor, wanted: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Gradients in the graph that stays there for the backward pass of a forward on its way.

    Args:
        watch: of the model.
        of: what was computed, of any shape.
        grad: of the same shape.
        wanted: from which it was computed, of any shapes.
    """
    if any(weight.shard is not None for weight in watch.run.weights):
        return gradients_without_hooks(of, grad, wanted)
    return torch.autograd.grad(of, wanted, grad, retain_graph=True, allow_unused=True)
