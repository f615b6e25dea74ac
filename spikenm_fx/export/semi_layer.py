# SPDX-License-Identifier: Apache-2.0
"""A Linear or convolution as one product with a 2:4 matrix on sparse tensor cores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from spikenm_fx.export.semi_layout import compress, expand, padded, too_full

__all__ = ["SemiStructured", "as_matrix", "why_dense"]


def as_matrix(layer: nn.Module) -> Tensor:
    """The weight as ``(O, reduction)``; of a convolution in the order kernel, then channels.

    Consecutive columns are then consecutive input channels, as the blocks are.

    Args:
        layer: a Linear, or an ungrouped Conv1d or Conv2d.
    """
    held: Any = layer
    weight: Tensor = held.weight.detach()
    return weight if weight.dim() == 2 else weight.movedim(1, -1).flatten(1)


def why_dense(layer: nn.Module) -> str:
    """Why a layer cannot run on sparse tensor cores; "" where it can.

    Args:
        layer: any weight layer.
    """
    held: Any = layer
    kind = type(layer).__name__
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return f"a {kind} is no product with one matrix"
    if getattr(held, "groups", 1) != 1:
        return f"its {held.groups} groups are products of their own"
    if getattr(held, "padding_mode", "zeros") != "zeros" or isinstance(
        getattr(held, "padding", 0), str
    ):
        return f"its padding is {getattr(held, 'padding', '')!r}, {held.padding_mode}"
    matrix = as_matrix(layer)
    if held.weight.shape[1] % 4:
        return f"4 does not divide its {held.weight.shape[1]} input channels"
    if not bool((matrix == 0).any()):
        return "dense: no weight is zero"
    full = too_full(matrix)
    return f"not 2:4: {full} blocks hold more than two non-zeros" if full else ""


class SemiStructured(nn.Module):
    """The layer's outputs, computed in the compressed weight's dtype.

    On a CUDA device torch's semi-structured tensor multiplies; elsewhere the compressed weight is
    expanded, so that what it holds can be tested.

    Attributes:
        values: kept values, ``(rows, columns / 2)``.
        positions: words of their positions.
        scale: of the rows, for int8; else None.
        bias: of the outputs, or None.
    """

    values: Tensor
    positions: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: nn.Module, dtype: torch.dtype, name: str) -> None:
        super().__init__()
        held: Any = layer
        matrix = as_matrix(layer).float()
        self.outputs, self.reduction = matrix.shape
        scale = None
        if dtype == torch.int8:
            scale = (matrix.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            matrix = (matrix / scale[:, None]).round()
        values, positions = compress(padded(matrix.to(dtype)), name)
        self.register_buffer("values", values)
        self.register_buffer("positions", positions)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if held.bias is None else held.bias.detach().clone())
        self.dtype = dtype
        self.kernel = None if isinstance(layer, nn.Linear) else _geometry(held)
        self.__dict__["_ready"] = None

    def dense(self) -> Tensor:
        """What the compressed weight holds, ``(O, reduction)`` in float32."""
        matrix = expand(self.values, self.positions)[: self.outputs, : self.reduction].float()
        return matrix if self.scale is None else matrix * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Time and batch are merged for the product.

        Args:
            x: ``[..., C]`` of a Linear; ``[..., C, *spatial]`` with any axes before.
        """
        lead = x.shape[: x.dim() - 1 if self.kernel is None else x.dim() - 1 - len(self.kernel[0])]
        rows, spatial = self._rows(x, lead)
        out = self._product(rows)
        out = out if self.bias is None else out + self.bias
        if self.kernel is None:
            return out.reshape(*lead, self.outputs)
        return (
            out.reshape(-1, *spatial, self.outputs)
            .movedim(-1, 1)
            .reshape(*lead, self.outputs, *spatial)
        )

    def extra_repr(self) -> str:
        """Sizes and dtype."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.reduction} -> {self.outputs}, 2:4 in {kind}"

    def _rows(self, x: Tensor, lead: torch.Size) -> tuple[Tensor, tuple[int, ...]]:
        """One row of the product for each output position, ``[rows, reduction]``."""
        if self.kernel is None:
            return x.reshape(-1, self.reduction), ()
        size, stride, padding, dilation = self.kernel
        x = x.reshape(-1, *x.shape[len(lead) :])
        flat = x.unsqueeze(2) if len(size) == 1 else x  # unfold takes images
        wide = [(1, *v) if len(size) == 1 else v for v in (size, dilation, stride)]
        pad = (0, *padding) if len(size) == 1 else padding
        columns = F.unfold(flat, wide[0], dilation=wide[1], padding=pad, stride=wide[2])
        spatial = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(x.shape[2:], size, stride, padding, dilation, strict=True)
        )
        columns = columns.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1)
        return columns.reshape(-1, self.reduction), spatial

    def _product(self, rows: Tensor) -> Tensor:
        given = F.pad(rows.to(self.dtype), (0, 2 * self.values.shape[1] - self.reduction))
        if not self.values.is_cuda:
            matrix = expand(self.values, self.positions).float()
            out = given.float() @ matrix.T
        else:
            if self.__dict__["_ready"] is None:
                self.__dict__["_ready"] = to_sparse_semi_structured(
                    expand(self.values, self.positions)
                )
            out = F.linear(given, self.__dict__["_ready"]).float()
        out = out[:, : self.outputs]
        return out if self.scale is None else out * self.scale


def _geometry(layer: Any) -> tuple[tuple[int, ...], ...]:
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
