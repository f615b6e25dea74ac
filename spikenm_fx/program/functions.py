# SPDX-License-Identifier: Apache-2.0
"""Operations without weights, by their names."""

from __future__ import annotations

import torch

from spikenm_fx.program.attention import ATTENTION
from spikenm_fx.program.calls import Call, Function, Lowered
from spikenm_fx.program.joins import JOINS
from spikenm_fx.program.norms import NORMS
from spikenm_fx.program.over_time import OVER_TIME
from spikenm_fx.program.pointwise import POINTWISE_FUNCTIONS
from spikenm_fx.program.pools import POOLS
from spikenm_fx.program.products import PRODUCTS
from spikenm_fx.program.reshapes import RESHAPES

__all__ = ["FUNCTIONS"]


def _same(call: Call) -> Lowered:
    return call.args[0]


def _typed(call: Call) -> Lowered:
    """``to``, ``float``: nothing, unless another dtype comes of it."""
    info = call.node.meta.get("value")
    if info is not None and info.dtype not in (None, torch.float32):
        raise call.refuse(f"it makes {info.dtype} of its input; programs compute in float32")
    return call.args[0]


FUNCTIONS: dict[str, Function] = {
    **dict.fromkeys(("detach", "clone", "contiguous", "identity", "dropout", "alias"), _same),
    **dict.fromkeys(("requires_grad", "lift_fresh", "dropout1d", "dropout2d", "data"), _same),
    **dict.fromkeys(("to", "float", "type", "type_as", "double", "half", "bool"), _typed),
    **RESHAPES,
    **OVER_TIME,
    **PRODUCTS,
    **JOINS,
    **POINTWISE_FUNCTIONS,
    **ATTENTION,
    **NORMS,
    **POOLS,
}
"""What becomes of an operation, by its name as :func:`spikenm_fx.trace.analysis.ops.op_name`."""
