# SPDX-License-Identifier: Apache-2.0
"""The compiled mask kernels: draws and their gradient in one pass over the blocks.

The noise has the very bits of :mod:`spikenm_fx.masks.noise`; logarithm and exponential are
rounded differently than torch's, which may swap two positions whose perturbed logits agree to the
last bits (fewer than one block in 10^5).  Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikenm_fx._torch import is_functorch_tensor
from spikenm_fx.masks.noise import Key
from spikenm_fx.native.library import Draws, kernels
from spikenm_fx.native.threads import kernel_threads

__all__ = ["add_decay", "gradient", "kept", "kernel_for", "mask", "plain", "roomy"]

_MAX_M = 32  # csrc/blocks.h
_LARGE = 1 << 20  # numbers from which on NumPy asks for huge pages
_ALIGNED = 64  # bytes, as torch's own tensors
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


def kept(tensor: Tensor, mask: Tensor, undrawn: float) -> Tensor | None:
    """``tensor`` where ``mask`` is True, ``undrawn`` times it elsewhere; None where torch must.

    Args:
        tensor: of any shape.
        mask: bool, of its shape.
        undrawn: a factor; 0 gives zeros whatever was there.
    """
    found = None if torch.compiler.is_compiling() else kernels()
    if found is None or not _side_by_side(tensor, mask):
        return None
    out = roomy(tensor.shape) if tensor.is_contiguous() else torch.empty_like(tensor)
    if type(out) is not Tensor:  # a mode is on that makes tensors without memory
        return None
    found.kept(
        *(tensor.data_ptr(), mask.data_ptr(), undrawn, out.data_ptr()),
        *(tensor.numel(), kernel_threads()),
    )
    return out


def add_decay(grad: Tensor, weight: Tensor, mask: Tensor, factor: float) -> bool:
    """Add ``factor * weight`` to ``grad`` where ``mask`` is False; False where torch must.

    Args:
        grad: of any shape, written in place.
        weight: of its shape.
        mask: bool, of its shape.
        factor: rate of the decay.
    """
    found = kernels()
    if found is None or not (_side_by_side(weight, mask) and _side_by_side(grad, mask)):
        return False
    found.decay(
        *(weight.data_ptr(), mask.data_ptr(), factor, grad.data_ptr()),
        *(grad.numel(), kernel_threads()),
    )
    torch.autograd.graph.increment_version(grad)
    return True


def _side_by_side(tensor: Tensor, mask: Tensor) -> bool:
    """Whether both lie in memory without gaps and in the same order, as kernels read them."""
    return (
        plain(tensor)
        and type(mask) is Tensor
        and mask.device.type == "cpu"
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and mask.shape == tensor.shape
        and mask.stride() == tensor.stride()
        and (tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor))
        and tensor.numel() > 0
    )


def roomy(shape: Sequence[int]) -> Tensor:
    """Memory for float32 numbers, uninitialised: of large tensors in huge pages, by NumPy's way.

    Such a tensor lives for a forward and backward pass or less; the system handing out its memory
    in small pages costs more time than what is done with it.

    Args:
        shape: of the tensor.
    """
    size = math.prod(shape)
    if size < _LARGE:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    memory = np.empty(size + _ALIGNED // 4, dtype=np.float32)
    start = -memory.ctypes.data % _ALIGNED // 4
    return torch.from_numpy(memory[start : start + size].reshape(tuple(shape)))


def _call(scores: Tensor, keep: int, key: Key | None, present: Tensor | None) -> tuple[Any, Any]:
    """The C structure, and the tensors that must outlive its use."""
    scores = scores.contiguous()
    lead, m, inner = scores.shape
    call = Draws(lead=lead, m=m, inner=inner, keep=keep, threads=kernel_threads())
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
