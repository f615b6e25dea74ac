# SPDX-License-Identifier: Apache-2.0
"""Counting for packed engines: a twin whose packed layers are plain ones with the same weights.

Inside an engine spikes travel as bits and layers run together with their neurons, where no hook
can see them.  The twin computes the same values from the same non-zero weights, visibly.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from spikenm_fx.pack.engine.layer import PackedLayer

__all__ = ["is_engine", "kernels_of", "visible_twin"]


def is_engine(model: nn.Module) -> bool:
    """Whether ``model`` holds packed layers."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def kernels_of(engine: nn.Module) -> dict[str, str]:
    """How each packed layer runs, by qualified name."""
    return {
        name: f"runs as {module.choice}"
        for name, module in engine.named_modules()
        if isinstance(module, PackedLayer)
    }


def visible_twin(engine: nn.Module) -> nn.Module:
    """A copy of ``engine`` whose packed layers are Linear and Conv modules.

    Its outputs are the engine's up to summation order.
    """
    twin = copy.deepcopy(engine)
    plain: dict[int, nn.Module] = {}
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLayer):
                module._modules[name] = plain.setdefault(id(child), _plain(child))
    return _plain(twin) if isinstance(twin, PackedLayer) else twin


class _AnyLead:
    """Convolutions of an engine take ``(T, N, C, *spatial)`` as well."""

    def forward(self, x: Tensor) -> Tensor:
        dims = self.weight.dim()  # type: ignore[attr-defined]
        lead = x.shape[: x.dim() - dims + 1]
        y: Tensor = super().forward(x.reshape(-1, *x.shape[len(lead) :]))  # type: ignore[misc]
        return y.reshape(*lead, *y.shape[1:])


class _Conv1d(_AnyLead, nn.Conv1d):
    pass


class _Conv2d(_AnyLead, nn.Conv2d):
    pass


def _plain(packed: PackedLayer) -> nn.Module:
    weight, geometry = packed.weight, packed.geometry
    bias = packed.bias is not None
    layer: nn.Linear | _Conv1d | _Conv2d
    if geometry.kind == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    else:
        kind = _Conv1d if geometry.kind == "conv1d" else _Conv2d
        layer = kind(
            weight.shape[1] * geometry.groups,
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            stride=geometry.stride,  # type: ignore[arg-type]
            padding=geometry.padding,  # type: ignore[arg-type]
            dilation=geometry.dilation,  # type: ignore[arg-type]
            groups=geometry.groups,
            bias=bias,
        )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None and packed.bias is not None:
            layer.bias.copy_(packed.bias)
    if packed.nm.keep < packed.nm.of:
        layer.register_buffer(
            "weight_nm", torch.tensor([1, packed.nm.keep, packed.nm.of], device="cpu")
        )
    return layer.eval()
