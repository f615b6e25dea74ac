# SPDX-License-Identifier: Apache-2.0
"""The compiled mask kernels: draws and their gradient in one pass over the blocks.

The noise has the very bits of :mod:`spikenm_fx.masks.noise`; logarithm and exponential are
rounded differently than torch's, which may swap two positions whose perturbed logits agree to the
last bits (fewer than one block in 10^5).  Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import is_functorch_tensor
from spikenm_fx.masks.noise import Key
from spikenm_fx.native.library import Draws, kernels

__all__ = ["gradient", "kernel_for", "mask", "plain"]

_MAX_M = 32  # csrc/sampler.h
MASK, GRADIENT, LEARN, MOVE, SPREAD = range(5)  # csrc/abi.h
_COUNTERS = 1 << 31  # the noise of the torch path counts in int32

Kernel = Any
"""A ctypes function on ``Draws``; ctypes has no type for it that could be written down."""


def kernel_for(
    scores: Tensor, keep: int, *others: Tensor, level: str | None = None
) -> Kernel | None:
    """The kernel for these blocks, or None where the torch path must serve.

    Args:
        scores: ``(lead, M, inner)``.
        keep: N.
        others: further tensors of the same shape.
        level: ISA level; None for the best one of this machine.
    """
    if (
        torch.compiler.is_compiling()
        or scores.dim() != 3
        or not 1 <= keep <= scores.shape[1] <= _MAX_M
    ):
        return None
    if scores.numel() >= _COUNTERS or not all(plain(tensor) for tensor in (scores, *others)):
        return None
    if any(other.shape != scores.shape for other in others):
        return None
    found = kernels(level)
    return None if found is None else found.draws


def mask(
    kernel: Kernel,
    scores: Tensor,
    keep: int,
    *,
    kappa: float = 1.0,
    key: Key | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """:func:`~spikenm_fx.masks.sampler.draw_mask`, without ``key`` ``top_mask``; same shapes."""
    out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    call, held = _call(scores, keep, key, present)
    call.mask, call.kappa = out.data_ptr(), kappa
    _run(kernel, call, held)
    return out


def gradient(
    kernel: Kernel,
    grad: Tensor,
    logits: Tensor,
    keep: int,
    kappa: float,
    tau: float,
    key: Key,
    *,
    weight: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """:func:`~spikenm_fx.masks.sampler.straight_through`, by argument and shape."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    grad, weight = grad.contiguous(), None if weight is None else weight.contiguous()
    call, held = _call(logits, keep, key, present)
    call.mode = GRADIENT
    call.grad, call.out = grad.data_ptr(), out.data_ptr()
    call.weight = None if weight is None else weight.data_ptr()
    call.kappa, call.inverse_tau, call.gain = kappa, 1 / tau, kappa / tau
    _run(kernel, call, (held, grad, weight))
    return out


def _call(scores: Tensor, keep: int, key: Key | None, present: Tensor | None) -> tuple[Any, Any]:
    """The C structure, and the tensors that must outlive its use."""
    scores = scores.contiguous()
    lead, m, inner = scores.shape
    call = Draws(lead=lead, m=m, inner=inner, keep=keep, threads=torch.get_num_threads())
    call.scores = scores.data_ptr()
    if key is not None:
        call.noisy, call.key0, call.key1 = 1, *(word & 0xFFFFFFFF for word in key)
    if present is not None:
        present = present.expand(lead, m, 1).contiguous()
        call.present = present.data_ptr()
    return call, (scores, present)


def _run(kernel: Kernel, call: Any, held: object) -> None:
    status = kernel(ctypes.byref(call))
    if status:
        raise RuntimeError(f"the mask kernel refused blocks of {call.m} (status {status})")
    del held  # alive until here


def plain(tensor: Tensor) -> bool:
    """Whether the data of any tensor lie in this process's memory as float32, without a wrapper."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not is_functorch_tensor(tensor)
    )
