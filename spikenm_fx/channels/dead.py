# SPDX-License-Identifier: Apache-2.0
"""Which channels nothing depends on: never read, or always the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.state import preserved_in_eval, reset_to_rest
from spikenm_fx.trace import CoupledGroup, Member, NeuronSpec

__all__ = ["Dead", "dead_channels", "mean_activity", "silent_neurons"]


@dataclass(frozen=True, slots=True, eq=False)
class Dead:
    """The channels of one group without which the model computes the same.

    Attributes:
        group: of coupled channels.
        dead: bool ``[size]``.
        reason: why none can be removed; "" where the question could be asked.
        biases: by layer, what the removed channels added to its bias, ``[out channels]``.
    """

    group: CoupledGroup
    dead: Tensor
    reason: str = ""
    biases: Mapping[str, Tensor] | None = None


def dead_channels(
    group: CoupledGroup,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    known: Mapping[str, Tensor],
) -> Dead:
    """The channels of ``group`` that every consumer ignores.

    A consumer ignores a channel if its weights there are zero, or if the channel has one value for
    ever that its bias can take over: zero, or any where no padding cuts it off.

    Args:
        group: of coupled channels.
        tensors: the model's parameters and buffers by name, of any shapes.
        model: the model.
        known: constant inputs of the layers, float64 ``[C]`` by name; see
            :func:`~spikenm_fx.channels.bounds.constant_inputs`.
    """
    none = torch.zeros(group.size, dtype=torch.bool, device="cpu")
    modules = dict(nn.Module.named_modules(model))
    reason = _why_not(group)
    if reason:
        return Dead(group, none, reason)
    dead, constants = ~none, []
    for member in _consumers(group):
        weight = tensors[member.tensor].detach()
        unread = ~(_channels(weight, member, group.size) != 0).any(1).cpu()
        layer = member.tensor.rpartition(".")[0]
        values = _values(known.get(layer), member, group.size)
        takes = _takes_constants(modules.get(layer), member)
        dead &= unread | (values == 0) | (~values.isnan() & takes)
        constants.append((layer, member, weight, values))
    biases = {}
    for layer, member, weight, values in constants:
        each = values.where(dead, 0.0).nan_to_num()
        if bool(each.any()) and _takes_constants(modules.get(layer), member):
            biases[layer] = _added(weight, member, each)
    return Dead(group, dead, "", biases)


def _why_not(group: CoupledGroup) -> str:
    if group.frozen:
        return group.frozen[0]
    if group.mixed:
        return group.mixed[0]
    if not _consumers(group):
        return "no weight reads these channels"
    return ""


def _consumers(group: CoupledGroup) -> list[Member]:
    """Consumers, and recurrent matrices, which hold the channels along both axes."""
    twice = {m.tensor for m in group.members if m.axis == 1} & {
        m.tensor for m in group.members if m.axis == 0
    }
    return [
        m
        for m in group.members
        if m.role == "consumer" or (m.role == "attached" and m.axis == 1 and m.tensor in twice)
    ]


def _channels(tensor: Tensor, member: Member, size: int) -> Tensor:
    """``[size, ...]``: everything that the member's tensor holds for each channel."""
    length = member.outer * size * member.inner
    part = tensor.narrow(member.axis, member.offset, length).movedim(member.axis, 0)
    return part.reshape(member.outer, size, member.inner, -1).transpose(0, 1).flatten(1)


def _values(known: Tensor | None, member: Member, size: int) -> Tensor:
    """``[size]``: the one value of each channel at the consumer's input, NaN where it varies."""
    length = member.outer * size * member.inner
    if known is None or known.numel() < member.offset + length:
        return torch.full((size,), torch.nan, dtype=torch.float64, device="cpu")
    part = known[member.offset : member.offset + length].reshape(member.outer, size, member.inner)
    rows = part.transpose(0, 1).flatten(1)
    return rows[:, 0].where((rows == rows[:, :1]).all(1), torch.nan)


def _takes_constants(module: Any, member: Member) -> bool:
    """Whether a constant input is a constant output: no padding, no groups, a plain layer."""
    if isinstance(module, nn.Linear):
        return member.axis == 1 and member.outer == 1
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or isinstance(module.padding, str):
        return False
    return module.groups == 1 and not any(module.padding) and member.outer == 1


def _added(weight: Tensor, member: Member, each: Tensor) -> Tensor:
    """``[out channels]``: what inputs of the one value ``each`` add to the output."""
    part = weight.double().cpu().narrow(1, member.offset, len(each) * member.inner)
    rows = part.reshape(len(part), len(each), -1).sum(2)
    return rows @ each


def silent_neurons(
    model: nn.Module, neurons: Mapping[str, NeuronSpec], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """By name, where each neuron never spiked on ``batches``: bool, ``[1, (1,) ...]`` per output.

    Args:
        model: any model; run in eval mode from rest, and afterwards as before.
        neurons: the neuron modules' rules.
        batches: what the model is called with, tensors or tuples of arguments.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str, spec: NeuronSpec) -> Any:
        def hook(_: nn.Module, __: object, output: Any) -> None:
            spikes = (output[0] if isinstance(output, tuple | list) else output).detach()
            axes = (0,) if spec.time_axis is None or spec.folded_time else (0, 1)
            fired = (spikes != 0).any(axes[-1], keepdim=True)
            fired = fired.any(0, keepdim=True).cpu()
            seen[name] = seen[name] | fired if name in seen else fired

        return model.get_submodule(name).register_forward_hook(hook)

    with preserved_in_eval(model):
        handles = [watch(name, spec) for name, spec in neurons.items()]
        try:
            for batch in batches:
                reset_to_rest(model)
                model(*(batch if isinstance(batch, tuple) else (batch,)))
        finally:
            for handle in handles:
                handle.remove()
    return {name: ~fired for name, fired in seen.items()}


def mean_activity(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """By layer, the mean absolute input of each channel, float64 ``[channels]``; spikes: the rate.

    Args:
        model: run in eval mode from rest, and afterwards as before.
        arguments: of its call.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str, spatial: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().double().abs()
            rows = x.movedim(x.dim() - 1 - spatial, -1).flatten(0, -2)
            sums[name] = sums.get(name, 0.0) + rows.sum(0).cpu()
            counts[name] = counts.get(name, 0) + len(rows)

        return model.get_submodule(name).register_forward_pre_hook(hook)

    with preserved_in_eval(model):
        reset_to_rest(model)
        handles = [
            watch(name, module.weight.dim() - 2)
            for name, module in nn.Module.named_modules(model)
            if is_weight_layer(module)
        ]
        try:
            model(*arguments)
        finally:
            for handle in handles:
                handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
