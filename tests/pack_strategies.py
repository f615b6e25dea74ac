# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for N:M weights and layers that can be packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from spikenm_fx.pack.weights.format import LayerGeometry
from spikenm_fx.pattern import NM, BlockView

COMMON = ["2:4", "1:4", "2:8", "1:8", "1:16", "4:8", "1:2", "1:1"]


@dataclass(frozen=True)
class Case:
    """A weight that is N:M, and the layer it belongs to."""

    weight: Tensor
    nm: NM
    geometry: LayerGeometry


def prune(weight: Tensor, nm: NM) -> Tensor:
    """Keep the ``keep`` largest magnitudes of each block (ties broken by position)."""
    view = BlockView(nm, tuple(weight.shape))
    blocks = view.to_blocks(weight)
    order = blocks.abs().argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(blocks).scatter_(1, order[:, : nm.keep], 1.0)
    return view.from_blocks(blocks * mask)


patterns = st.one_of(
    st.sampled_from(COMMON).map(NM.parse),
    st.integers(1, 20).flatmap(lambda of: st.builds(NM, st.integers(1, of), st.just(of))),
)


@st.composite
def geometries(draw: st.DrawFn, spatial: int | None = None) -> LayerGeometry:
    """Linear, Conv1d or Conv2d with any stride, padding, dilation and groups."""
    dims = draw(st.sampled_from([0, 1, 2])) if spatial is None else spatial
    if dims == 0:
        return LayerGeometry()

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    return LayerGeometry.conv(
        dims,
        stride=per_dim(1, 3),
        padding=per_dim(0, 2),
        dilation=per_dim(1, 2),
        groups=draw(st.sampled_from([1, 1, 1, 2, 3])),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    nms: st.SearchStrategy[NM] = patterns,
    dtype: torch.dtype = torch.float32,
    channels: int = 40,
    outputs: int = 12,
) -> Case:
    """An N:M weight with its geometry; values include exact zeros, and sometimes denormals."""
    nm, geometry = draw(nms), draw(geometries())
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(geometry.spatial))
    rows = geometry.groups * draw(st.integers(1, outputs))
    shape = (rows, draw(st.integers(1, channels)), *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    weight *= draw(st.sampled_from([1.0, 1.0, 1e-3, 1e-41]))
    return Case(prune(weight.to(dtype), nm), nm, geometry)
