# SPDX-License-Identifier: Apache-2.0
"""What ``method="activity"`` goes by: measured at the neurons before each masked layer.

The running average lives in a :class:`~spikenm_fx.masks.eid.guide.Guide`, as the credits of the
distillation do: it is refreshed in the same rhythm, averaged over ranks, and kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.channels.membrane import (
    channel_axis,
    mean_membrane,
    membranes_on,
    neurons_of,
    norms_of,
    producers_of,
    unknown_rules,
)
from spikenm_fx.errors import PlanError, some_of
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.masks.eid import EID, Guide
from spikenm_fx.masks.eid.connect import hook_neuron
from spikenm_fx.masks.eid.slopes import Neuron
from spikenm_fx.masks.eid.watch import Watch
from spikenm_fx.masks.layer import MaskedWeight
from spikenm_fx.masks.methods.activity import Activity
from spikenm_fx.masks.methods.regrowth import exchanged, strongest_blocks
from spikenm_fx.masks.sampler import top_mask
from spikenm_fx.masks.update import draw_masks
from spikenm_fx.trace import CoupledGroup, SpikingGraph, coupled_groups

__all__ = ["check_activity", "guide_by_activity"]


def check_activity(method: Activity, graph: SpikingGraph, weights: Mapping[str, str]) -> None:
    """Let through a model of which the method can measure what it needs.

    Args:
        method: the method.
        graph: of the model.
        weights: of the layers that become sparse, by name that of the weight's parameter.

    Raises:
        PlanError: if no neuron feeds them, their rule is not known, or norms are missing.
    """
    read = [group for group in coupled_groups(graph) if _reads(group, set(weights.values()))]
    found = [(group, neurons_of(graph, group)) for group in read]
    if not any(neurons for _, neurons in found):
        raise PlanError(
            f"activity needs neurons before the sparse layers, and none feeds {some_of(weights)}: "
            "use another method, e.g. 'magnitude'"
        )
    unknown = unknown_rules(graph, [name for _, neurons in found for name in neurons])
    if unknown:
        raise PlanError(
            f"activity needs the membrane potential of {some_of(unknown)}, whose update rule is "
            "not known: tell it by spikenm_fx.trace.register_neuron(cls, read)"
        )
    bare = [group for group, neurons in found if neurons and not norms_of(graph, group)]
    if bare and method.growth:
        raise PlanError(
            f"growth={method.growth} goes by the gradient of a norm, and no norm follows "
            f"{some_of(sorted(producers_of(bare[0])))}: add norms, or use Activity(growth=0.0)"
        )


def guide_by_activity(model: nn.Module, graph: SpikingGraph, inputs: Any) -> None:
    """Give each mask its importance, measured on the examples, and the hooks that renew it.

    Args:
        model: with masks of ``method="activity"``.
        graph: of it.
        inputs: arguments of a forward call; the model is afterwards as before.
    """
    masks = {id(mask): mask for _, _, mask in masked_weights(model)}
    first = next(iter(masks.values()))
    method = first.method
    assert isinstance(method, Activity)
    settings = EID("eligibility", every=method.every, ema=method.ema, automatic=False)
    watch = first.run.watch = Watch(first.run, first.schedule, settings)
    parts = _parts(model, graph, watch)
    for mask in masks.values():
        mine = [part for part in parts if part.owner is mask]
        whole = sum(part.length for part in mine) == mask.view.channels
        mask.guide = Guide(settings, ChannelActivity(watch, mine) if whole else None)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    for mask in masks.values():
        mask.raw = True  # the first importance is that of the dense network
    try:
        means = membranes_on(model, graph, arguments)
    finally:
        for mask in masks.values():
            mask.raw = False
    for mask in masks.values():
        if mask.guide is not None and isinstance(mask.guide.observed, ChannelActivity):
            mask.guide.load(mask.guide.observed.importance(means))
    draw_masks(masks.values(), first.run.step)


@dataclass(slots=True, eq=False)
class Part:
    """Input channels of a masked weight that one coupled group makes.

    Attributes:
        owner: the mask of the weight that reads them.
        size: number of channels; along the weight's axis the index runs over ``outer`` x ``size`` x
            ``inner``, from ``offset`` on.
        neurons: that hold the channels.
        axis: of the channels in what the neurons receive.
        gammas: parameters of the norms that they pass.
    """

    owner: MaskedWeight
    offset: int
    outer: int
    size: int
    inner: int
    neurons: list[Neuron]
    axis: int
    gammas: list[nn.Parameter] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Input channels of the weight that it covers."""
        return self.outer * self.size * self.inner

    def spread(self, values: Tensor) -> Tensor:
        """One value a channel to one for each input channel of the weight, ``[length]``."""
        return values.view(1, -1, 1).expand(self.outer, self.size, self.inner).reshape(-1)


class ChannelActivity:
    """A measure for :class:`~spikenm_fx.masks.eid.guide.Guide`: importance of input channels.

    Args:
        watch: keeps what the neurons received.
        parts: of the weight's input channels, all of them.
    """

    def __init__(self, watch: Watch, parts: list[Part]) -> None:
        self.watch, self.parts = watch, sorted(parts, key=lambda part: part.offset)

    def close(self, step: int) -> None:
        """Every forward of the step counts."""

    @property
    def sees(self) -> bool:
        """Whether there is anything that could be measured: each channel has its neuron."""
        return True

    def measure(self) -> Tensor | None:
        """Importance by what the neurons received in this step; None where they saw nothing.

        Where growth lets a pruned channel in, it takes the importance of the one that goes.
        """
        self.watch.close()
        neurons = {n.name: (n, part.axis) for part in self.parts for n in part.neurons}
        if any(not neuron.calls for neuron, _ in neurons.values()):
            return None
        credit = self.importance({n: _mean(neuron, axis) for n, (neuron, axis) in neurons.items()})
        share = _growth_of(self.parts[0].owner)
        gradients = [_gamma_gradient(part) for part in self.parts]
        if credit is None or not share or any(each is None for each in gradients):
            return credit
        owner = self.parts[0].owner
        growth = _over_inputs(owner, [each for each in gradients if each is not None])
        return _grown(owner, credit, growth, share)

    def importance(self, means: Mapping[str, Tensor]) -> Tensor | None:
        """Mean |V| of each input channel, in the shape of the weight.

        Args:
            means: of each channel of a neuron, by its name.
        """
        found = []
        for part in self.parts:
            whole = torch.stack([means[neuron.name] for neuron in part.neurons]).mean(0)
            if len(whole) != part.size:
                return None
            found.append(part.spread(whole.float()))
        return _over_inputs(self.parts[0].owner, found)


def _mean(neuron: Neuron, axis: int) -> Tensor:
    """Of all its calls in this step; a call that starts from rest begins another sequence."""
    sequences: list[list[Tensor]] = []
    for call in neuron.calls:
        if call.starts or not sequences:
            sequences.append([])
        sequences[-1].append(call.current)
    means = [mean_membrane(neuron.spec(), each, axis) for each in sequences]
    return torch.stack(means).mean(0)


def _growth_of(owner: MaskedWeight) -> float:
    assert isinstance(owner.method, Activity)
    return owner.method.growth


def _gamma_gradient(part: Part) -> Tensor | None:
    grads = [gamma.grad for gamma in part.gammas]
    if not grads or any(grad is None or len(grad) != part.size for grad in grads):
        return None
    total = torch.stack([grad.detach().abs() for grad in grads if grad is not None]).sum(0)
    return part.spread(total.float())


def _over_inputs(owner: MaskedWeight, parts: list[Tensor]) -> Tensor:
    """One value for each input channel to the shape of the weight."""
    view, values = owner.view, torch.cat(parts)
    if view.transposed:  # the channels of every group, one group after the other
        shape = (-1, *[1] * (len(view.shape) - 1))
        return values.repeat(view.groups).view(shape).expand(view.shape)
    return values.view(1, -1, *[1] * (len(view.shape) - 2)).expand(view.shape)


def _grown(owner: MaskedWeight, credit: Tensor, growth: Tensor, share: float) -> Tensor:
    """The credits with those of two channels exchanged in the blocks that grow."""
    view, present = owner.view, owner.view.present(credit.device)
    values, gain = view.to_blocks(credit.contiguous()), view.to_blocks(growth.contiguous())
    mask = top_mask(values, view.nm.keep, present)
    gain = strongest_blocks(gain.masked_fill(mask, 0.0), share)
    moved = exchanged(mask, values, gain, present) ^ mask
    other = (values * moved).sum(1, keepdim=True) - values
    return view.from_blocks(torch.where(moved, other, values))


def _reads(group: CoupledGroup, weights: set[str]) -> bool:
    return any(member.tensor in weights for member in group.consumers)


def _parts(model: nn.Module, graph: SpikingGraph, watch: Watch) -> list[Part]:
    owners = {
        f"{name}.weight".lstrip(".") if key == "weight" else f"{name}.{key}".lstrip("."): mask
        for name, layer in nn.Module.named_modules(model)
        for key, mask in getattr(layer, "_nm_masks", {}).items()
    }
    modules = dict(nn.Module.named_modules(model))
    parameters = dict(model.named_parameters())
    neurons: dict[str, Neuron] = {}
    parts = []
    for group in coupled_groups(graph):
        names = neurons_of(graph, group)
        for member in group.consumers:
            owner = owners.get(member.tensor)
            if owner is None or not names:
                continue
            for name in names:
                if name not in neurons:
                    neurons[name] = hook_neuron(watch, name, modules[name])
            producer = modules[next(iter(sorted(producers_of(group))))]
            parts.append(
                Part(
                    *(owner, member.offset, member.outer, group.size, member.inner),
                    [neurons[name] for name in names],
                    channel_axis(producer),
                    [parameters[name] for name in norms_of(graph, group) if name in parameters],
                )
            )
    return parts
