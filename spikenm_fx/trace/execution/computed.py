# SPDX-License-Identifier: Apache-2.0
"""Layers that multiply something else than their weight: does it hold the weight's zeros?

Weight standardisation subtracts a mean, and so fills every zero; a mask on such a weight would be
none on what is multiplied.  The layer is run with few weights kept, and the product is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import ConvTransposeNd, storage_id
from spikenm_fx.state import preserved
from spikenm_fx.trace.execution.products import Multiplied, ProductWatch

__all__ = ["has_own_forward", "run_and_compare"]


def has_own_forward(layer: nn.Module) -> bool:
    """Whether the class of a weight layer, or the layer, computes in its own way."""
    if "forward" in vars(layer):
        return True
    return not type(layer).__module__.startswith("torch.nn.") and "weight" in layer._parameters


def run_and_compare(layer: nn.Module, call: Callable[[], Any]) -> tuple[Any, str]:
    """Run ``call``, which calls ``layer``, and look at what the layer multiplies.

    Args:
        layer: a Linear or Conv with a parameter ``weight``.
        call: runs it on the example.

    Returns:
        What ``call`` returns, and why a mask on the weight would not be one on what is multiplied;
        empty where it would, and where nothing is known.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    seen: list[Multiplied] = []
    out = _watched(layer, call, seen)
    computed = [one for one in seen if storage_id(one.operand) != storage_id(weight)]
    if not computed or "weight" not in computed[0].names:
        return out, ""
    try:
        with preserved(layer):
            kept = all(_holds(layer, call, mask) for mask in _masks(layer, weight))
    except Exception:  # it cannot run with other values: nothing is known
        return out, ""
    kind = type(layer).__name__
    why = f"{kind} computes what it multiplies from its weight, and zeros do not stay in place"
    return out, "" if kept else why


def _watched(layer: nn.Module, call: Callable[[], Any], seen: list[Multiplied]) -> Any:
    with ProductWatch(layer, seen.append):
        return call()


def _masks(layer: nn.Module, weight: Tensor) -> list[Tensor]:
    """One weight kept in each row of input channels, at random; and the first channel alone."""
    axis = 0 if isinstance(layer, ConvTransposeNd) else 1
    places = torch.rand_like(weight, dtype=torch.float).argmax(axis, keepdim=True)
    first = torch.zeros_like(weight)
    first.select(axis, 0).fill_(1.0)
    return [torch.zeros_like(weight).scatter_(axis, places, 1.0), first]


def _holds(layer: nn.Module, call: Callable[[], Any], mask: Tensor) -> bool:
    """Whether what is multiplied has as many weights as the masked one, in the same places."""
    seen: list[Multiplied] = []
    weight = layer._parameters["weight"]
    masked = nn.Parameter((torch.rand_like(mask, dtype=torch.float) + 0.5).to(mask.dtype) * mask)
    layer._parameters["weight"] = masked
    try:
        _watched(layer, call, seen)
    finally:
        layer._parameters["weight"] = weight
    operand = torch.nan_to_num(seen[0].as_layers_weight) != 0
    return operand.shape == mask.shape and not bool((operand & (mask == 0)).any())
