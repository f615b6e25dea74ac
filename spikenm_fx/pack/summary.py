# SPDX-License-Identifier: Apache-2.0
"""What packing did to each layer: printable, and usable to pack again without measuring."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LayerReport", "PackReport"]


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One weight layer.

    Attributes:
        name: qualified.
        shape: of the weight.
        pattern: N:M that the weight satisfies, or "" where it is not packed.
        choice: how it runs.
        rate: share of its input on the examples that is not zero; None if that was neither spikes
            nor counts of spikes.
        milliseconds: per candidate, the median of the faster half of the runs on the examples.
        neuron: the neuron that is fused with it, or "".
        note: why it is not packed, or why its neuron is not fused.
        dense_bytes: of the dense fp32 weight.
        packed_bytes: in a packed file.
        resident_bytes: in memory, the execution layouts included.
        planes: binary digits of its input: 1 for spikes, more for sums and pools of spikes.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str = ""
    choice: str = "torch"
    rate: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    neuron: str = ""
    note: str = ""
    dense_bytes: int = 0
    packed_bytes: int = 0
    resident_bytes: int = 0
    planes: int = 1

    @property
    def gain(self) -> float | None:
        """How many times faster than dense torch the choice was; None if not measured."""
        dense, chosen = self.milliseconds.get("dense"), self.milliseconds.get(self.choice)
        return dense / chosen if dense and chosen else None


@dataclass(frozen=True, slots=True)
class PackReport:
    """All layers of a packed engine, in the order of the module tree."""

    layers: tuple[LayerReport, ...]

    @property
    def choices(self) -> dict[str, str]:
        """Backend by layer: pass it as ``backend=`` to pack alike without measuring."""
        return {layer.name: layer.choice for layer in self.layers if layer.choice != "torch"}

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return {"layers": [asdict(layer) | {"gain": layer.gain} for layer in self.layers]}

    def __str__(self) -> str:
        head = ("layer", "weight", "N:M", "runs as", "rate", "gain", "neuron", "note")
        rows = [head, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _row(layer: LayerReport) -> tuple[str, ...]:
    rate = "" if layer.rate is None else f"{layer.rate:.1%}"
    if layer.planes > 1:
        rate += f" x{layer.planes}"
    gain = "" if layer.gain is None else f"{layer.gain:.2f}x"
    shape = "x".join(map(str, layer.shape))
    return (
        layer.name, shape, layer.pattern, layer.choice, rate, gain, layer.neuron, layer.note
    )  # fmt: skip
