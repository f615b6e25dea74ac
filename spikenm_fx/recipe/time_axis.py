# SPDX-License-Identifier: Apache-2.0
"""Where time is in the input of a model that nobody described: from its trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from spikenm_fx.trace import SpikingGraph

__all__ = ["time_of"]


def time_of(
    graph: SpikingGraph | None, shape: Sequence[int]
) -> Literal["inside", "leading", "second"]:
    """``leading`` for ``[T, B, ...]``, ``second`` for ``[B, T, ...]``, else ``inside``.

    The first layer tells: its own input still has the time axis; or it is called as often as one of
    the two leading axes is long; or these two are folded into one, which is taken for time first.
    """
    for record in graph.layers.values() if graph is not None else ():
        if not record.sees_input or not record.calls:
            continue
        whole = tuple(shape)
        if record.time_axis in (0, 1) and record.input_shape == whole:
            return "leading" if record.time_axis == 0 else "second"
        extra = len(whole) > (len(record.weight_shape) or len(whole))
        if extra and record.calls > 1 and record.calls in whole[:2]:
            return "leading" if whole[0] == record.calls else "second"
        if extra and record.input_shape == (whole[0] * whole[1], *whole[2:]):
            return "leading"
    return "inside"
