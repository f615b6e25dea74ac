# SPDX-License-Identifier: Apache-2.0
"""Neurons that run inside the kernel of the layer before them.

A module of the user's model keeps its identity: its class becomes a subclass of its own (see
:mod:`spikenm_fx.surgery`) that overrides ``forward`` alone.  State stays in the attribute where the
framework keeps it, so that every reset protocol goes on working, and whatever the native rule does
not cover is left to the original ``forward``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx import surgery
from spikenm_fx.errors import PackError
from spikenm_fx.native.library import kernels
from spikenm_fx.pack.engine.deferred import Pending, PooledSums
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.engine.neuron import NeuronCall, NeuronRule, why_not_native
from spikenm_fx.pack.engine.spikes import in_row_order
from spikenm_fx.pack.kernels.ops import integrate
from spikenm_fx.trace import NeuronSpec

__all__ = ["FusedNeuron", "fuse_neuron", "release_neuron", "why_not_fused"]

WAITING = (Pending, PooledSums)
LANES = 64  # channels of a row when a neuron with scalar parameters runs on any shape


@dataclass(slots=True, eq=False)
class _Fusion:
    """What a fused neuron knows beside its own attributes.

    Attributes:
        spec: its rule.
        forgets: each call starts afresh: the caller neither gives nor reads state.
        rules: by number of channels.
    """

    spec: NeuronSpec
    forgets: bool
    rules: dict[int, NeuronRule | None] = field(default_factory=dict)

    def rule(self, channels: int) -> NeuronRule | None:
        """The rule for ``channels`` channels, made once; None where it is not per channel."""
        if channels not in self.rules:
            self.rules[channels] = NeuronRule.of(self.spec, channels)
        return self.rules[channels]

    @property
    def scalar(self) -> bool:
        """Whether one value holds for all channels."""
        spec = self.spec
        values = [spec.decay, spec.gain, spec.rest, spec.bias, spec.threshold, spec.reset_value]
        values += [] if spec.reset_amount is None else [spec.reset_amount]
        values += [] if spec.synapse is None else [spec.synapse.decay, spec.synapse.gain]
        return all(not isinstance(v, Tensor) or v.numel() == 1 for v in values)


def why_not_fused(module: nn.Module, spec: NeuronSpec, *, state_read: bool) -> str:
    """Why this neuron keeps its own forward; "" if it can be fused."""
    reason = why_not_native(spec)
    if reason:
        return reason
    if spec.time_axis not in (None, 0) or spec.folded_time:
        return "time is not the first axis of its input"
    if spec.returns_state and spec.time_axis == 0 and state_read:
        return "the model reads the state that it returns"
    carried = spec.returns_state and spec.time_axis is None
    if carried and (spec.framework != "snntorch" or spec.synapse is not None):
        return "the model carries its state from step to step"
    if spec.synapse is not None and not (spec.returns_state and spec.time_axis == 0):
        return "it keeps a synaptic current between calls"
    if not spec.returns_state and not spec.state:
        return "it is not known where it keeps its state"
    return surgery.why_not_extended(module, FusedNeuron, leading=True)


def fuse_neuron(module: nn.Module, spec: NeuronSpec) -> None:
    """Make ``module`` run natively, in place; call :func:`why_not_fused` first.

    Args:
        module: a neuron.
        spec: its update rule.

    Raises:
        TypeError: if the module's class cannot be extended in place.
    """
    forgets = spec.returns_state and spec.time_axis == 0
    module.__dict__["_spikenm_fusion"] = _Fusion(spec, forgets)
    surgery.extend(module, FusedNeuron)


def release_neuron(module: nn.Module) -> None:
    """Undo :func:`fuse_neuron`; state stays where it is.

    Args:
        module: a fused neuron.
    """
    surgery.restore(module)
    module.__dict__.pop("_spikenm_fusion", None)


class FusedNeuron(nn.Module):
    """Mixed in before a neuron's own class; see the module's head."""

    _spikenm_fusion: _Fusion

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Native where the rule covers the call, else the neuron's own forward.

        Args:
            x: of any shape that the neuron's own forward takes.
            args: as the neuron's own forward takes them.
            kwargs: as the neuron's own forward takes them.
        """
        fusion = self._spikenm_fusion
        if torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        if not getattr(self, "store_v_seq", False) and not (fusion.forgets and (args or kwargs)):
            spikes = None
            if (
                isinstance(x, LazyTensor)
                and isinstance(x.source, Pending | PooledSums)
                and x.fusable
            ):
                spikes = _fused(self, x, args, kwargs)
            elif not args and not kwargs and not fusion.spec.returns_state:
                spikes = _alone(self, x)
            if spikes is not None:
                return spikes
        plain = x.materialize() if isinstance(x, LazyTensor) else x
        return super().forward(plain, *args, **kwargs)


def _fused(neuron: FusedNeuron, x: LazyTensor, args: Any, kwargs: Any) -> Any:
    """Layer and neuron in one kernel; None where the call is not of that form."""
    fusion, source = neuron._spikenm_fusion, x.source
    assert isinstance(source, WAITING)
    spec = fusion.spec
    rule = fusion.rule(source.channels)
    axis = _channel_axis(x, source.channels)
    if rule is None or axis is None or not _per_channel(spec, axis):
        return None
    if spec.time_axis == 0 and axis == -x.dim():
        return None
    steps = x.shape[0] if spec.time_axis == 0 else 1
    shape = tuple(x.shape[1:] if spec.time_axis == 0 else x.shape)
    strides = tuple(x.stride()[1:] if spec.time_axis == 0 else x.stride())
    carried = spec.returns_state and not fusion.forgets
    memory: Any = {"dtype": torch.float32, "device": "cpu"}
    v = torch.empty_strided(shape, strides, **memory)
    if not v.numel():
        return None
    if fusion.forgets:
        _fill(v, rule.initial)
    else:
        _load(neuron, v, _carried_state(neuron, args, kwargs) if carried else _kept_state(neuron))
    current = torch.empty_strided(shape, strides, **memory).zero_() if rule.synapse else None
    bits = source.fused(steps, NeuronCall(rule.parameters, rule.modes(), v, current))
    # The spikes have the batch layout of the layer; the views since then split its batch axis.
    spikes = LazyTensor(bits, x.meta_tensor, x.views)
    if fusion.forgets:
        return spikes, None
    if not carried or getattr(neuron, "init_hidden", False):
        setattr(neuron, spec.state[0], v)
    return (spikes, v) if spec.returns_state else spikes


def _channel_axis(x: LazyTensor, channels: int) -> int | None:
    """The axis, counted from the end, of a row's channels; None where rows are out of order."""
    for axis in range(-1, -x.dim() - 1, -1):
        if x.meta_tensor.stride(axis) == 1 and in_row_order(x.meta_tensor, axis, channels):
            return axis
    return None


def _per_channel(spec: NeuronSpec, channel_axis: int) -> bool:
    """Whether the rule's tensors run along the layer's channels as torch would broadcast them."""
    values = (spec.decay, spec.gain, spec.threshold, spec.rest, spec.bias, spec.reset_value)
    return all(
        value.dim() >= -channel_axis and value.shape[channel_axis] == value.numel()
        for value in values
        if isinstance(value, Tensor) and value.numel() > 1
    )


def _carried_state(neuron: FusedNeuron, args: Any, kwargs: Any) -> Any:
    if getattr(neuron, "init_hidden", False):
        return _kept_state(neuron)
    return args[0] if args else kwargs.get("mem")


def _kept_state(neuron: FusedNeuron) -> Any:
    return getattr(neuron, neuron._spikenm_fusion.spec.state[0])


def _fill(v: Tensor, initial: Tensor) -> None:
    # One membrane per channel, and the channels lie side by side.
    if initial.numel() and bool((initial == initial[0]).all()):
        v.fill_(float(initial[0]))
    else:
        channel_axis = v.stride().index(1) if 1 in v.stride() else -1
        v.copy_(initial.view([-1 if i == channel_axis % v.dim() else 1 for i in range(v.dim())]))


def _load(neuron: FusedNeuron, v: Tensor, state: Any) -> None:
    """Fill ``v`` with what the framework keeps as state: a number, nothing yet, or a membrane."""
    if isinstance(state, LazyTensor):
        state = state.materialize()
    if state is None:
        v.zero_()
    elif not isinstance(state, Tensor):
        v.fill_(float(state))
    elif state.numel() <= 1 and v.numel() > 1:
        v.fill_(float(state) if state.numel() else 0.0)
    elif state.shape == v.shape:
        v.copy_(state)
    elif neuron._spikenm_fusion.spec.framework == "snntorch":
        v.zero_()  # as snnTorch does when the batch changes
    else:
        raise PackError(
            f"a {type(neuron).__name__} holds state of shape {tuple(state.shape)} and is given "
            f"input for {tuple(v.shape)}; reset the network between batches of different size"
        )


def _alone(neuron: FusedNeuron, x: Tensor) -> Tensor | None:
    """The neuron on an input that no packed layer made; None where it must run itself."""
    fusion = neuron._spikenm_fusion
    spec = fusion.spec
    if isinstance(x, LazyTensor):
        x = x.materialize()
    if not fusion.scalar or spec.synapse is not None or kernels() is None:
        return None
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.requires_grad or not x.numel():
        return None
    steps = x.shape[0] if spec.time_axis == 0 else 1
    shape = x.shape[1:] if spec.time_axis == 0 else x.shape
    if shape.numel() % LANES:
        return None
    rule = fusion.rule(LANES)
    assert rule is not None
    v = torch.empty(shape, dtype=torch.float32, device="cpu")
    _load(neuron, v, _kept_state(neuron))
    spikes, after = integrate(
        x.reshape(steps, -1, LANES), v.view(-1, LANES), rule.parameters, rule.modes()
    )
    setattr(neuron, spec.state[0], after.view(shape))
    result: Tensor = spikes.view(x.shape)
    return result
