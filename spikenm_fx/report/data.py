# SPDX-License-Identifier: Apache-2.0
"""What a report says: one record per layer, one per model, and how both become plain data."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from spikenm_fx.report.energy import EnergyModel
from spikenm_fx.report.masks import MaskTile
from spikenm_fx.report.synops import Operations, Signal

__all__ = ["LatencyReport", "LayerChange", "LayerReport", "NeuronReport", "ReportData", "changes"]

SCHEMA = 1
"""Version of :meth:`ReportData.to_dict`; raised when a key changes its meaning."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One weight layer, over all batches.

    Attributes:
        name: qualified name in the model.
        kind: class of layer, e.g. ``Conv2d``.
        shape: of the weight.
        pattern: ``"n:m"`` that its zeros obey, or None for a dense layer.
        action: the plan's decision where one is known, else ``sparsify`` or ``keep_dense`` by its
            zeros.
        reason: the plan's reason.
        density: share of weights that are not zero.
        kept_magnitude: share of the dense weight's sum of magnitudes that the mask keeps; None
            where the dense weight is not known.
        signal: kind of its input; None where the layer never ran.
        rate_in: mean spikes per input value and step (mean count for integers); None for analog.
        rate_out: firing rate of the neuron that the layer feeds; None where there is none.
        input_density: share of input values that are not zero.
        calls: how often it ran.
        operations: exact counts.
        picojoule: energy of the operations.
        picojoule_dense: energy of the same input through a layer without zeros.
        utilisation: mean over maximum work of the PEs, in non-zero weights.
        cycles_spikes: cycles of the PEs over all samples, for the spikes that came.
        cycles_weights: the same if every input value were a spike.
        dense_bytes: weight and bias as they are in memory.
        packed_bytes: of the packed format; the dense size where the layer has no pattern.
        blocks: how many blocks hold 0, 1, ... non-zeros; empty for dense layers.
        tile: corner of the mask for drawing.
        not_finite: weights that are NaN or infinite; they count as non-zero.
        note: what a reader should know, e.g. that the layer never ran.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str | None
    action: str
    reason: str
    density: float
    kept_magnitude: float | None
    signal: Signal | None
    rate_in: float | None
    rate_out: float | None
    input_density: float | None
    calls: int
    operations: Operations
    picojoule: float
    picojoule_dense: float
    utilisation: float
    dense_bytes: int
    packed_bytes: int
    cycles_spikes: int = 0
    cycles_weights: int = 0
    blocks: tuple[int, ...] = ()
    tile: MaskTile | None = None
    not_finite: int = 0
    note: str = ""

    @property
    def weights(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)

    @property
    def dual_sparsity(self) -> float | None:
        """Share of products that weight zeros and silent inputs remove together; 0 at least.

        A count of k spikes is k additions, which may be more than there are products.
        """
        if not self.operations.dense:
            return None
        return max(0.0, 1.0 - self.operations.effective / self.operations.dense)


@dataclass(frozen=True, slots=True)
class NeuronReport:
    """Firing of one neuron layer.

    Attributes:
        name: qualified name.
        rate: mean spikes per neuron and step.
        silent: share of neurons that never fired over all batches; None where its shape varied.
    """

    name: str
    rate: float
    silent: float | None


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """Median seconds of one forward.

    Attributes:
        total: by variant, e.g. ``{"dense": 0.12, "packed": 0.08}``.
        layers: by layer, then by variant.
        repeats: measured forwards per variant, interleaved.
        threads: torch's threads while measuring.
    """

    total: dict[str, float]
    layers: dict[str, dict[str, float]]
    repeats: int
    threads: int


@dataclass(frozen=True, slots=True)
class ReportData:
    """What a model costs and where its zeros are; :class:`spikenm_fx.Report` shows it, too.

    Attributes:
        model: class name of the model.
        layers: one record per weight layer, in the model's order.
        samples: samples that ran; per-sample figures divide by it.
        batches: batches that ran.
        energy: the constants behind the energies.
        neurons: firing of each neuron layer.
        latency: measured times, where asked for.
        pes: PEs behind ``utilisation``.
        notes: what a reader should know of the whole.
    """

    model: str
    layers: tuple[LayerReport, ...]
    samples: int
    batches: int
    energy: EnergyModel
    neurons: tuple[NeuronReport, ...] = ()
    latency: LatencyReport | None = None
    pes: int = 16
    notes: tuple[str, ...] = field(default=())

    @property
    def density(self) -> float:
        """Share of all layers' weights that are not zero."""
        return _ratio(
            sum(layer.density * layer.weights for layer in self.layers),
            sum(layer.weights for layer in self.layers),
        )

    @property
    def operations(self) -> Operations:
        """Sums over the layers, over all samples."""
        names = [f.name for f in dataclasses.fields(Operations)]
        sums = {n: sum(getattr(layer.operations, n) for layer in self.layers) for n in names}
        return Operations(**sums)

    @property
    def firing_rate(self) -> float | None:
        """Mean spikes per input value and step over the layers that see spikes."""
        seen = [layer.rate_in for layer in self.layers if layer.rate_in is not None]
        return sum(seen) / len(seen) if seen else None

    @property
    def dual_sparsity(self) -> float:
        """Share of all products that zeros on either side remove; 0 at least."""
        return max(0.0, 1.0 - _ratio(self.operations.effective, self.operations.dense))

    @property
    def utilisation(self) -> float:
        """PE utilisation, weighted by the layers' non-zero weights."""
        work = [layer.density * layer.weights for layer in self.layers]
        busy = sum(w * layer.utilisation for w, layer in zip(work, self.layers, strict=True))
        return _ratio(busy, sum(work))

    @property
    def cycles(self) -> tuple[float, float]:
        """Cycles of the PEs per sample, layer after layer: for real spikes, and for all inputs."""
        sums = (
            sum(layer.cycles_spikes for layer in self.layers),
            sum(layer.cycles_weights for layer in self.layers),
        )
        return _ratio(sums[0], self.samples), _ratio(sums[1], self.samples)

    @property
    def picojoule(self) -> float:
        """Energy per sample, in pJ."""
        return _ratio(sum(layer.picojoule for layer in self.layers), self.samples)

    @property
    def picojoule_dense(self) -> float:
        """Energy per sample of the same spikes through layers without zeros, in pJ."""
        return _ratio(sum(layer.picojoule_dense for layer in self.layers), self.samples)

    @property
    def picojoule_ann(self) -> float:
        """Energy per sample if every product were a MAC: neither sparsity used, in pJ."""
        return self.energy.picojoule(0, _ratio(self.operations.dense, self.samples))

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weight layers' parameters."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the same, packed where a layer has a pattern."""
        return sum(layer.packed_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: numbers, text, lists; counts are over all samples, ``total`` per sample."""
        total = self.operations
        per_sample = {
            f"{key}_per_sample": _ratio(value, self.samples)
            for key, value in (*dataclasses.asdict(total).items(), ("effective", total.effective))
        }
        return {
            "schema": SCHEMA,
            "model": self.model,
            "samples": self.samples,
            "batches": self.batches,
            "energy": dataclasses.asdict(self.energy),
            "pes": self.pes,
            "total": {
                "density": self.density,
                "firing_rate": self.firing_rate,
                "dual_sparsity": self.dual_sparsity,
                "utilisation": self.utilisation,
                "cycles_spikes_per_sample": self.cycles[0],
                "cycles_weights_per_sample": self.cycles[1],
                **per_sample,
                "picojoule_per_sample": self.picojoule,
                "picojoule_dense_per_sample": self.picojoule_dense,
                "picojoule_ann_per_sample": self.picojoule_ann,
                "dense_bytes": self.dense_bytes,
                "packed_bytes": self.packed_bytes,
            },
            "layers": [_layer_dict(layer) for layer in self.layers],
            "neurons": [dataclasses.asdict(neuron) for neuron in self.neurons],
            "latency": dataclasses.asdict(self.latency) if self.latency is not None else None,
            "notes": list(self.notes),
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One layer in two reports; of each pair the first is before, the second after.

    Attributes:
        name: qualified name.
        pattern: ``"n:m"``, None for a dense layer and where there is no such layer.
        density: share of weights that are not zero; None where there is no such layer.
        effective: operations per sample; None where there is no such layer.
        picojoule: energy per sample; None where there is no such layer.
        packed_bytes: bytes when packed; None where there is no such layer.
    """

    name: str
    pattern: tuple[str | None, str | None]
    density: tuple[float | None, float | None]
    effective: tuple[float | None, float | None]
    picojoule: tuple[float | None, float | None]
    packed_bytes: tuple[int | None, int | None]


def changes(before: ReportData, after: ReportData) -> list[LayerChange]:
    """The layers of two reports by name, those of ``before`` first."""
    first, second = ({layer.name: layer for layer in r.layers} for r in (before, after))
    samples = max(before.samples, 1), max(after.samples, 1)
    found = []
    for name in dict.fromkeys((*first, *second)):
        a, b = first.get(name), second.get(name)
        found.append(
            LayerChange(
                name,
                (a.pattern if a else None, b.pattern if b else None),
                (a.density if a else None, b.density if b else None),
                (
                    a.operations.effective / samples[0] if a else None,
                    b.operations.effective / samples[1] if b else None,
                ),
                (a.picojoule / samples[0] if a else None, b.picojoule / samples[1] if b else None),
                (a.packed_bytes if a else None, b.packed_bytes if b else None),
            )
        )
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _layer_dict(layer: LayerReport) -> dict[str, Any]:
    data = dataclasses.asdict(layer)
    del data["tile"]
    return {
        **data,
        "shape": list(layer.shape),
        "blocks": list(layer.blocks),
        "dual_sparsity": layer.dual_sparsity,
        "effective": layer.operations.effective,
    }
