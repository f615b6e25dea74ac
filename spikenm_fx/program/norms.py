# SPDX-License-Identifier: Apache-2.0
"""Layer norms, and batch norms along other axes than a layer's channels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from spikenm_fx._torch import BatchNormBase
from spikenm_fx.pack.eligible import hooked
from spikenm_fx.pack.engine.norms import affine_of
from spikenm_fx.program.axes import flattened, size_of
from spikenm_fx.program.calls import Call, Function
from spikenm_fx.program.code import Code
from spikenm_fx.program.draft import NotLowered, Ref
from spikenm_fx.program.layers import Channels
from spikenm_fx.program.products import with_constant
from spikenm_fx.program.tokens import with_channels

__all__ = ["NORMS", "batch_norm", "runs_elsewhere"]


def _layer_norm(call: Call) -> Ref:
    """Over the last axes, which are the channels of each pixel then."""
    ref = call.ref()
    shape, weight, bias = (
        call.get(i, n) for i, n in ((1, "normalized_shape"), (2, "weight"), (3, "bias"))
    )
    epsilon = float(call.get(4, "eps", 1e-5))
    whole = replace(ref, axes=flattened(ref.axes, -len(tuple(shape)), -1))
    source = with_channels(call.draft, call.where, whole, -1)
    n = size_of(whole.axes[-1])
    rows = [1.0 if weight is None else weight, 0.0 if bias is None else bias, epsilon]
    table = [torch.as_tensor(x, dtype=torch.float32).detach().reshape(-1).expand(n) for x in rows]
    stored = call.draft.keep(f"{call.where}::norm", torch.stack(table).contiguous())
    layout = source.value.layout
    value = call.draft.apply(Code.NORM, layout, source, tensors=(stored,), name=call.where)
    return replace(ref, value=value, step=call.draft.step_of(call.where, ref))


def runs_elsewhere(module: nn.Module, ref: Ref) -> bool:
    """Whether torch's batch norm runs along another axis of its input than the channels.

    Args:
        module: any norm.
        ref: its input.
    """
    torchs = isinstance(module, BatchNormBase) and type(module).__module__.startswith("torch.nn.")
    return torchs and len(ref.axes) > 1 and ref.axes[1] != ref.value.layout.channels


def batch_norm(name: str, module: nn.Module, call: Call) -> Ref:
    """A call of torch's batch norm along any axis of a token.

    Args:
        name: of the module.
        module: the norm.
        call: of it.

    Raises:
        NotLowered: where it is none in eval mode, or its axis is no axis of a token.
    """
    ref = call.ref()
    affine = affine_of(module, Channels(size_of(ref.axes[1])))
    if affine is None or hooked(module):
        raise NotLowered(name, "it does something else than a batch norm in eval mode")
    factor, shift = (x.view(-1, *[1] * (len(ref.axes) - 2)) for x in affine)
    return with_constant(call, ref, factor, shift)


NORMS: dict[str, Function] = {"layer_norm": _layer_norm}
"""What becomes of a norm, by its name."""
