# SPDX-License-Identifier: Apache-2.0
"""What packing did to each layer: printable, and usable to pack again without measuring."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from spikenm_fx.table import html_table, text_table

__all__ = ["PackReport", "PackedLayerReport"]


@dataclass(frozen=True, slots=True)
class PackedLayerReport:
    """What became of one weight layer.

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

    layers: tuple[PackedLayerReport, ...]

    @property
    def choices(self) -> dict[str, str]:
        """Backend by layer: pass it as ``backend=`` to pack alike without measuring."""
        return {layer.name: layer.choice for layer in self.layers if layer.choice != "torch"}

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return {"layers": [asdict(layer) | {"gain": layer.gain} for layer in self.layers]}

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("layer", "weight", "N:M", "runs as", "rate", "gain", "neuron", "note")
        return [head, *(_row(layer) for layer in self.layers)]

    def _repr_html_(self) -> str:
        packed = sum(bool(layer.pattern) for layer in self.layers)
        smaller = f"{packed} of {len(self.layers)} weight layers are packed"
        return html_table(self._rows(), caption=smaller)

    def __str__(self) -> str:
        return "\n".join(text_table(self._rows()))


def _row(layer: PackedLayerReport) -> tuple[str, ...]:
    rate = "" if layer.rate is None else f"{layer.rate:.1%}"
    if layer.planes > 1:
        rate += f" x{layer.planes}"
    gain = "" if layer.gain is None else f"{layer.gain:.2f}x"
    shape = "x".join(map(str, layer.shape))
    return (
        layer.name, shape, layer.pattern, layer.choice, rate, gain, layer.neuron, layer.note
    )  # fmt: skip
