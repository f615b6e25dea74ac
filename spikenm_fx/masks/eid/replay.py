# SPDX-License-Identifier: Apache-2.0
"""Run a neuron again by itself on what it received, to ask autograd for its slopes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_map
from spikenm_fx.state import preserved
from spikenm_fx.trace import NeuronSpec

__all__ = ["Call", "replayed_slopes", "runs_through_time"]


@dataclass(slots=True)
class Call:
    """One call of a neuron, as a pre-hook saw it.

    Attributes:
        order: position among all calls of the step.
        current: what came from the layer, detached.
        rest: further arguments: the state where the caller carries it.
        keywords: keyword arguments.
        starts: True where a new sequence begins with this call.
    """

    order: int
    current: Tensor
    rest: tuple[Any, ...]
    keywords: dict[str, Any]
    starts: bool


def replayed_slopes(neuron: nn.Module, spec: NeuronSpec, calls: Sequence[Call]) -> list[Tensor]:
    """Gradient of the summed spikes with respect to each input, by the neuron's own backward.

    For a neuron whose reset is detached and subtracts, this is what
    :func:`~spikenm_fx.masks.eid.eligibility.filtered_slopes` computes; otherwise the path through
    the reset is in it as well, because nothing outside the neuron can tell the two apart.

    Args:
        neuron: the module; its state afterwards is as before.
        spec: what is known of it; only its way of resetting is used.
        calls: in order.
    """
    with _alone(neuron, calls[0]) as restore:
        currents, spikes = [], []
        state: tuple[Any, ...] = ()
        for call in calls:
            if call.starts:
                restore()
                _reset(neuron, spec)
                state = tree_map(_detached, call.rest)
            current = call.current.detach().requires_grad_()
            out = neuron.forward(current, *state, **tree_map(_detached, call.keywords))
            if isinstance(out, tuple | list):
                state = tuple(out[1:])[: len(call.rest)]
                out = out[0]
            currents.append(current)
            spikes.append(out)
        total = torch.stack([out.sum() for out in spikes]).sum()
        slopes = torch.autograd.grad(total, currents, allow_unused=True)
    return [
        torch.zeros_like(current) if slope is None else slope.detach()
        for current, slope in zip(currents, slopes, strict=True)
    ]


def runs_through_time(neuron: nn.Module, spec: NeuronSpec, call: Call) -> bool:
    """Whether axis 0 of the input is time: does the last output depend on the first input?

    Args:
        neuron: the module; its state afterwards is as before.
        spec: what is known of it.
        call: any call.
    """
    if call.current.dim() < 2 or not len(call.current):
        return False
    with _alone(neuron, call):
        _reset(neuron, spec)
        current = call.current.detach()
        current = torch.cat([current, current]).requires_grad_()  # two steps, or another batch
        out = neuron.forward(
            current, *tree_map(_detached, call.rest), **tree_map(_detached, call.keywords)
        )
        out = out[0] if isinstance(out, tuple | list) else out
        (slopes,) = torch.autograd.grad(out[-1].sum(), current, allow_unused=True)
    return slopes is not None and bool(slopes[0].any())


@contextlib.contextmanager
def _alone(neuron: nn.Module, call: Call) -> Iterator[Callable[[], None]]:
    """Run it out of turn: state and random numbers restored, gradients on, no autocast.

    The recorded inputs have the precision that autocast chose already.
    """
    device = call.current.device.type
    with (
        preserved(neuron) as restore,
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
    ):
        yield restore


def _reset(neuron: nn.Module, spec: NeuronSpec) -> None:
    reset: Callable[[], Any] | None = getattr(neuron, spec.reset_call or "", None)
    if reset is not None:
        reset()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
