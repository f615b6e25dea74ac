# SPDX-License-Identifier: Apache-2.0
"""Products with weights that no module call shows: raw parameters, an attention's projections.

torch's own products are watched, and what is counted is the weight as it is multiplied: after
whatever the model computes of its parameters first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.pattern import WeightLayer
from spikenm_fx.report.data import LayerReport
from spikenm_fx.report.synops import LayerCounter
from spikenm_fx.trace.execution.products import Multiplied, ProductWatch

__all__ = ["RawProducts"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(slots=True)
class RawProducts:
    """Counts what is multiplied outside of the calls of weight layers.

    Attributes:
        model: whose parameters.
        layers: its weight layers, by name: their calls are counted by their own hooks.
        counters: of the layers by name; of one whose weight is used by itself the counts go there.
        ran: told the name of each weight that was multiplied.
        scales: of the spikes that raw weights see, by name, as far as a trace tells.
        pes: processing elements that share the output channels.
    """

    model: nn.Module
    layers: Mapping[str, WeightLayer]
    counters: Mapping[str, LayerCounter]
    ran: Callable[[str], object]
    scales: Mapping[str, float]
    pes: int
    raw: dict[str, LayerCounter] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)
    _inside: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the products of one batch are counted."""
        fast = torch.backends.mha.get_fastpath_enabled()
        with contextlib.ExitStack() as stack:
            for name, layer in self.layers.items():
                enter = layer.register_forward_pre_hook(self._enter(name))
                leave = layer.register_forward_hook(self._leave, always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            # the fused attention of eval mode hides its projections from everybody
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            stack.enter_context(ProductWatch(self.model, self._see))
            yield

    def describe(self, name: str, parameter: Tensor, report: LayerReport) -> LayerReport:
        """The record of a raw weight, from that of the layer that it is counted as.

        Args:
            name: of the parameter.
            parameter: itself, of any shape.
            report: of the weight as it is multiplied.
        """
        share = parameter.numel() / max(report.weights, 1)  # of a repeated weight one copy is kept
        return replace(
            report,
            name=name,
            kind="Parameter",
            shape=tuple(parameter.shape),
            dense_bytes=round(report.dense_bytes * share),
            packed_bytes=round(report.packed_bytes * share),
        )

    def _enter(self, name: str) -> Callable[[nn.Module, object], None]:
        def enter(module: nn.Module, args: object) -> None:
            self._inside.append(name)

        return enter

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._inside:
            self._inside.pop()

    def _see(self, product: Multiplied) -> None:
        if self._inside:
            name = self._inside[-1]
            if product.as_layers_weight.shape == self.layers[name].weight.shape:
                self.counters[name].mask = (product.as_layers_weight.detach() != 0).cpu()
            return
        parts = self._parts(product)
        for part in parts:
            self._count(part)
        if parts:
            return
        self._count(product)

    def _parts(self, product: Multiplied) -> list[Multiplied]:
        """One product per parameter, where the operand holds several one below the other."""
        turned = _as_layer(product) if len(product.names) > 1 else None
        if turned is None or not isinstance(turned[0], nn.Linear):
            return []
        layer, data, out = turned
        found: list[Multiplied] = []
        for name in product.names:
            part = self.model.get_parameter(name).detach()
            part = part if part.dim() == 2 and part.shape[1] == layer.weight.shape[1] else part.mT
            rows = [
                row
                for row in range(layer.weight.shape[0] - part.shape[0] + 1)
                if torch.equal(layer.weight[row : row + part.shape[0]], part)
            ]
            if not rows:
                return []
            args = (data, layer.weight[rows[0] : rows[0] + part.shape[0]])
            found.append(Multiplied((name,), "linear", args, 0, 1, out[..., : part.shape[0]]))
        return found

    def _count(self, product: Multiplied) -> None:
        parameter = product.names[0]
        owner = parameter.removesuffix(".weight")
        if owner != parameter and owner in self.layers:
            layer = self.layers[owner]
            counter: LayerCounter | None = None
            turned, name = _as_layer(product), owner
            if turned is not None and turned[0].weight.shape == layer.weight.shape:
                counter = known = self.counters[owner]
                known.mask = (turned[0].weight != 0).cpu()
        else:
            turned, name = _as_layer(product), parameter
            if turned is None:
                counter = None
            else:
                layer = turned[0]
                counter = self.raw.get(name)
                if counter is None or counter.layer.weight.shape != layer.weight.shape:
                    mask = (layer.weight != 0).cpu()
                    scale = self.scales.get(name, 1.0)
                    counter = self.raw.setdefault(
                        name, LayerCounter(layer, mask, scale=scale, pes=self.pes)
                    )
        if counter is None or turned is None:
            self.uncounted += [name] if name not in self.uncounted else []
            return
        counter.add(turned[1], turned[2])
        self.ran(name)


def _as_layer(product: Multiplied) -> tuple[WeightLayer, Tensor, Tensor] | None:
    """A layer of the same geometry, its input and output; None for what has none."""
    weight, data, out = (
        product.as_layers_weight.detach(),
        product.args[product.data],
        product.output,
    )
    if product.operator == "convolution":
        return (_convolution(product, weight), data, out) if product.weight == 1 else None
    if product.weight < product.data:
        if data.dim() < 2:
            data, out = data[:, None], out[:, None]
        data, out = data.mT, out.mT
    if weight.dim() == 2:
        layer: WeightLayer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        return layer, data, out
    if weight.dim() != 3:
        return None
    # one matrix per batch entry, as a convolution in so many groups
    many, outputs, inputs = weight.shape
    grouped = nn.Conv1d(many * inputs, many * outputs, 1, groups=many, bias=False, device="meta")
    kernel = weight.reshape(many * outputs, inputs, 1)
    grouped.weight = nn.Parameter(kernel.contiguous(), requires_grad=False)
    return grouped, _side_by_side(data), _side_by_side(out)


def _side_by_side(values: Tensor) -> Tensor:
    """``[H, N, C]`` as ``[N, H * C, 1]``."""
    return values.transpose(0, 1).flatten(1)[..., None]


def _convolution(product: Multiplied, weight: Tensor) -> WeightLayer:
    stride, padding, dilation, transposed, _, groups = product.args[3:9]
    kind: Any = (_TRANSPOSED if transposed else _CONV)[weight.dim() - 3]
    first, second = weight.shape[0], weight.shape[1] * groups
    layer: WeightLayer = kind(
        first if transposed else second,
        second if transposed else first,
        tuple(weight.shape[2:]),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        bias=False,
        device="meta",
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
