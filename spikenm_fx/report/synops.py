# SPDX-License-Identifier: Apache-2.0
"""Exact synaptic operations: every meeting of a real spike with a real non-zero weight, once.

The sum over outputs of ``conv(spikes, weight != 0)`` is linear in the spikes, so it equals
``<spikes, fan_out>``, where ``fan_out`` says for each input position how many non-zero weights
leave it.  The fan-out is computed once per layer; a batch then costs one sum over its input.

Zeros that a convolution pads with never spike: they are no operations here.  Formulas of the form
``H_out * W_out * k * k * C_in * C_out`` count them; :func:`padded_ops` gives that figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from spikenm_fx._torch import ConvTransposeNd
from spikenm_fx.pattern import WeightLayer
from spikenm_fx.report.correlation import correlated
from spikenm_fx.report.cycles import cycles_of, work_of_channels
from spikenm_fx.report.masks import PES
from spikenm_fx.trace.execution.values import kind_of_values

__all__ = [
    "SIGNALS",
    "LayerCounter",
    "Operations",
    "Signal",
    "fan_out",
    "one_level",
    "padded_ops",
    "signal_kind",
]

Signal = Literal["spike", "integer", "scaled", "analog"]

SIGNALS: tuple[Signal, ...] = ("spike", "integer", "scaled", "analog")
"""From the most to the least spike-like."""


@dataclass(frozen=True, slots=True)
class Operations:
    """What one layer did over all batches (whole numbers; divide by samples for one inference).

    Attributes:
        dense: products of a layer without zeros: every input value meets every weight it reaches.
        weight_sparse: those whose weight is not zero.
        synops: accumulations: a spike (an integer ``k`` counts as ``k`` spikes) meets a non-zero
            weight; 0 for analog input.
        synops_dense_weights: the same spikes meeting a layer without zeros; 0 for analog input.
        macs: multiply-accumulates: analog input times non-zero weight; 0 for spikes.
        padded: the conventional count that includes a convolution's zero padding.
    """

    dense: int = 0
    weight_sparse: int = 0
    synops: int = 0
    synops_dense_weights: int = 0
    macs: int = 0
    padded: int = 0

    @property
    def effective(self) -> int:
        """Operations that remain after both sparsities: accumulations plus MACs."""
        return self.synops + self.macs


def signal_kind(values: Tensor) -> Signal:
    """What kind of signal a tensor is: ``spike`` {0,1}, ``integer`` (small counts), ``analog``.

    A scale of spikes is not looked for: see :func:`one_level`.

    Args:
        values: of any shape and dtype.
    """
    return kind_of_values(values) or "spike"


def one_level(values: Tensor) -> float | None:
    """The height of spikes: the one value that ``values``, of any shape, hold beside 0.

    None where there are others, and where there is none.
    """
    top = values.abs().amax() if values.numel() else values.new_zeros(())
    if not bool(top) or not values.is_floating_point() or not bool(top.isfinite()):
        return None
    return float(top) if bool(((values == 0) | (values == top)).all()) else None


def _in_spikes(values: Tensor, scale: float) -> tuple[Tensor, Signal]:
    """Scaled spikes as whole numbers of spikes, and their kind; others as they are.

    Args:
        values: of any shape.
        scale: what a trace tells.
    """
    if scale != 1.0 and values.is_floating_point():
        counts = values / scale
        if bool(((counts - counts.round()).abs() <= _TOLERANCE * (1 + counts.abs())).all()):
            return counts.round(), "scaled"
    return values, signal_kind(values)


_TOLERANCE = 1e-4
"""Of a spike count: a scale in single precision moves it by less."""


def fan_out(
    layer: WeightLayer, mask: Tensor, size: tuple[int, ...], out: tuple[int, ...]
) -> Tensor:
    """How many non-zero weights leave each input position.

    Args:
        layer: Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d.
        mask: non-zero where the weight is, of the weight's shape.
        size: shape of one sample of the input, ``(C,)`` or ``(C, *spatial)``.
        out: the output's spatial shape (tells ``output_size`` of transposed convolutions).

    Returns:
        Whole numbers of shape ``size``, as float64 on the CPU.
    """
    mask = (mask.detach() != 0).float().cpu()
    if isinstance(layer, nn.Linear):
        return mask.sum(0).double()
    # The sum over output channels moves into the kernel: one channel a group is enough.  Counts
    # stay below 2^24, where float32 is exact.
    transposed = isinstance(layer, ConvTransposeNd)
    if transposed:
        kernel = mask.sum(1, keepdim=True)
    else:
        kernel = mask.unflatten(0, (layer.groups, -1)).sum(1)
    probe = torch.zeros(1, *size, dtype=torch.float32, device="cpu", requires_grad=True)
    with torch.enable_grad():
        response = correlated(layer, probe, kernel, out)
        (found,) = torch.autograd.grad(response.sum(), probe)
    return found[0].double()


def padded_ops(layer: WeightLayer, size: tuple[int, ...], out: tuple[int, ...]) -> int:
    """The textbook count of one sample, padding included: outputs times weights per output."""
    weights = layer.weight.numel()
    if isinstance(layer, nn.Linear):
        return weights
    # A transposed convolution scatters each input position over the whole kernel.
    positions = size[1:] if isinstance(layer, ConvTransposeNd) else out
    return weights * math.prod(positions)


@dataclass(slots=True)
class _Seen:
    """Sums over all samples of one input shape."""

    events: Tensor
    samples: int = 0


@dataclass(slots=True)
class LayerCounter:
    """Accumulates one layer's inputs; :meth:`operations` turns them into exact counts.

    Attributes:
        layer: the weight layer.
        mask: where its weight is non-zero.
        signal: the least spike-like input seen so far; None before the first.
        elements: input values seen.
        active: those that are not zero.
        total: sum of their absolute values (spike counts).
        calls: how often the layer ran.
        scale: what its spikes are multiplied with, where a trace tells; counts are of spikes.
        pes: processing elements that share the output channels.
        cycles_spikes: that they need for the spikes that came, see
            :mod:`spikenm_fx.report.cycles`; an analog value counts as one unless it is zero.
        cycles_weights: that they would need if every input value were one spike.
    """

    layer: WeightLayer
    mask: Tensor
    signal: Signal | None = None
    elements: int = 0
    active: int = 0
    total: float = 0.0
    calls: int = 0
    scale: float = 1.0
    pes: int = PES
    cycles_spikes: int = 0
    cycles_weights: int = 0
    _seen: dict[tuple[tuple[int, ...], tuple[int, ...]], _Seen] = field(default_factory=dict)

    def add(self, inputs: Tensor, output: Tensor) -> None:
        """Take in one call of the layer.

        Args:
            inputs: ``(*, C)`` of a linear layer, ``(*, C, *spatial)`` of a convolution.
            output: of the same leading shape.
        """
        dims = self._sample_dims()
        if inputs.dim() < dims:
            return
        size, out = tuple(inputs.shape[-dims:]), tuple(output.shape[-dims:])[1:]
        flat = inputs.detach().reshape(-1, *size)
        flat, kind = _in_spikes(flat, self.scale)
        self.signal = SIGNALS[max(SIGNALS.index(kind), SIGNALS.index(self.signal or "spike"))]
        magnitude = flat.double().abs()
        events = magnitude.sum(0).cpu()
        seen = self._seen.setdefault(
            (size, out), _Seen(torch.zeros(size, dtype=torch.float64, device="cpu"))
        )
        seen.events += events
        seen.samples += flat.shape[0]
        self.elements += flat.numel()
        self.active += int((flat != 0).sum())
        self.total += float(events.sum())
        self.calls += 1
        self._add_cycles(flat != 0 if kind == "analog" else flat.abs(), out)

    def _add_cycles(self, events: Tensor, out: tuple[int, ...]) -> None:
        mask = self.mask.to(events.device)
        work = work_of_channels(self.layer, mask, events, out)
        self.cycles_spikes += cycles_of(work, self.pes)
        every = work_of_channels(self.layer, mask, torch.ones_like(events[:1]), out)
        self.cycles_weights += len(events) * cycles_of(every, self.pes)

    def operations(self) -> Operations:
        """The counts over everything seen."""
        dense = sparse = synops = synops_dense = padded = 0
        ones = torch.ones_like(self.mask)
        for (size, out), seen in self._seen.items():
            every = fan_out(self.layer, ones, size, out)
            kept = fan_out(self.layer, self.mask, size, out)
            dense += seen.samples * round(float(every.sum()))
            sparse += seen.samples * round(float(kept.sum()))
            padded += seen.samples * padded_ops(self.layer, size, out)
            if self.signal != "analog":
                synops += round(float((seen.events * kept).sum()))
                synops_dense += round(float((seen.events * every).sum()))
        macs = sparse if self.signal == "analog" else 0
        return Operations(dense, sparse, synops, synops_dense, macs, padded)

    def _sample_dims(self) -> int:
        return 1 if isinstance(self.layer, nn.Linear) else 1 + len(self.layer.kernel_size)
