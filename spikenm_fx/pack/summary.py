# SPDX-License-Identifier: Apache-2.0
"""What packing did to each layer: printable, and usable to pack again without measuring."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from spikenm_fx.errors import some_of
from spikenm_fx.table import html_table, text_table

__all__ = [
    "GAINS",
    "PackReport",
    "PackedLayerReport",
    "PackedNeuronReport",
    "PartReport",
    "Proof",
    "WholeForward",
]

GAINS = 1.02
"""What is called a gain: less is noise."""


@dataclass(frozen=True, slots=True)
class PackedLayerReport:
    """What became of one weight layer.

    Attributes:
        name: qualified.
        shape: of the weight.
        pattern: N:M that the weight satisfies, or "" where it cannot be packed.
        choice: how it runs; ``"torch"`` is the model's own code.
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
        choice = "dense" if self.choice == "torch" else self.choice
        dense, chosen = self.milliseconds.get("dense"), self.milliseconds.get(choice)
        return dense / chosen if dense and chosen else None


@dataclass(frozen=True, slots=True)
class PackedNeuronReport:
    """What became of one neuron.

    Attributes:
        name: qualified.
        layer: the layer that it is fused with, or "".
        note: why it is not fused, and what to do about it.
    """

    name: str
    layer: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class WholeForward:
    """One forward of the engine beside one of the model, taking turns on the examples.

    Attributes:
        model: milliseconds of the folded model, the median of the faster half of the runs.
        engine: milliseconds of the engine, alike; those of the model where it runs its code.
        form: which form of the engine was fastest: ``"fused"``, ``"unfused"`` (packed layers, and
            neurons as they were), ``"dense"`` (torch's layers, norms folded into them), ``"some"``
            (packed are only those layers that the whole gains by) or ``"torch"`` (the model's own
            code, and nothing else); ``"program"`` where the engine is one (see
            :mod:`spikenm_fx.program`), ``"parts"`` where parts of it are.
    """

    model: float
    engine: float
    form: str

    @property
    def gain(self) -> float:
        """How many times faster the engine is."""
        return self.model / self.engine


@dataclass(frozen=True, slots=True)
class PartReport:
    """A part of an engine that is a program, or that is none.

    Attributes:
        names: of the modules that it is, or stands for; ``""`` is the whole model.
        reason: why it has no program; "" where it is one.
        milliseconds: that one forward spends in it, other parts inside it not counted.
        gain: how many times faster the program is than the modules were; None where there is none.
    """

    names: tuple[str, ...]
    reason: str
    milliseconds: float
    gain: float | None = None

    def __str__(self) -> str:
        name = self.names[0] or "the rest of the model"
        name += f" and {len(self.names) - 1} more behind it" if len(self.names) > 1 else ""
        spent = f"{self.milliseconds:.3g} ms of a forward"
        if not self.reason:
            return f"{name}: a program, {self.gain:.2f}x as fast as before; {spent}."
        return f"{name}: no program, as {self.reason}; {spent}."


@dataclass(frozen=True, slots=True)
class Proof:
    """What the comparison of engine and model took.

    Attributes:
        rounds: comparisons; each is a forward of the model and one of the engine.
        seconds: of all of them.
        put_back: layers and neurons that differed and run as the model's own since.
    """

    rounds: int
    seconds: float
    put_back: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackReport:
    """All layers of a packed engine, in the order of the module tree.

    Attributes:
        layers: every weight layer.
        neurons: every neuron that the trace found; empty without examples.
        whole: times of the whole forward; None where they were not measured.
        proof: of the comparison with the model; None where there was none.
        note: what was not done, and why.
        parts: which parts run as programs, and why others do not; empty where that was not asked
            for, or where all is one program.
    """

    layers: tuple[PackedLayerReport, ...]
    neurons: tuple[PackedNeuronReport, ...] = ()
    whole: WholeForward | None = None
    proof: Proof | None = None
    note: str = ""
    parts: tuple[PartReport, ...] = ()

    @property
    def choices(self) -> dict[str, str]:
        """Backend by layer: pass it as ``backend=`` to pack alike without measuring."""
        return {layer.name: layer.choice for layer in self.layers if layer.pattern}

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        whole = self.whole
        return {
            "layers": [asdict(layer) | {"gain": layer.gain} for layer in self.layers],
            "neurons": [asdict(neuron) for neuron in self.neurons],
            "whole": None if whole is None else asdict(whole) | {"gain": whole.gain},
            "memory": self.memory,
            "proof": None if self.proof is None else asdict(self.proof),
            "note": self.note,
            "parts": [asdict(part) for part in self.parts],
        }

    @property
    def verdict(self) -> str:
        """What the whole forward gains, in a sentence."""
        if self.whole is None:
            return self.note
        model, engine = (f"{value:.3g} ms" for value in (self.whole.model, self.whole.engine))
        if self.whole.form == "torch":
            return (
                f"No gain: keep your model. Its forward takes {model}, which no form of an engine "
                "made less; this copy runs the model's own code, and nothing else."
            )
        if self.whole.gain < GAINS:
            return f"No gain: keep your model. Its forward takes {model}, the engine's {engine}."
        return f"The whole forward gains {self.whole.gain:.2f}x: {model} became {engine}."

    @property
    def memory(self) -> str:
        """What packed weights take in memory, in a sentence; "" where there are none."""
        packed = [layer for layer in self.layers if layer.choice != "torch"]
        dense, stored, resident = (
            sum(getattr(layer, f"{kind}_bytes") for layer in packed)
            for kind in ("dense", "packed", "resident")
        )
        if not dense:
            return ""
        share = f"{resident / dense:.2f} of dense fp32"
        line = f"Packed weights take {resident:,} bytes in memory, {share} ({dense:,} bytes)"
        if resident <= stored * 1.2:
            return line + ": they stay as they are stored."
        return (
            f"{line}: {resident - stored:,} of them are layouts for speed; with memory='small' "
            f"about {stored:,} remain."
        )

    def _lines(self) -> list[str]:
        lines = [self.verdict] if self.verdict else []
        lines += [self.memory] if self.memory else []
        if self.proof is not None:
            proof = self.proof
            back = f"; put back: {some_of(proof.put_back)}" if proof.put_back else ""
            lines.append(
                f"Compared with the model {proof.rounds} time(s), in {proof.seconds:.2g} s{back}."
            )
        lines += map(str, self.parts)
        lines += [f"{n.name}: {n.note}" for n in self.neurons if n.note]
        return lines

    def _rows(self) -> list[tuple[str, ...]]:
        head = ("layer", "weight", "N:M", "runs as", "rate", "gain", "neuron", "note")
        return [head, *(_row(layer) for layer in self.layers)]

    def _repr_html_(self) -> str:
        packed = sum(layer.choice != "torch" for layer in self.layers)
        smaller = f"{packed} of {len(self.layers)} weight layers are packed"
        caption = ". ".join([smaller, *self._lines()])
        return html_table(self._rows(), caption=caption)

    def __str__(self) -> str:
        return "\n".join([*text_table(self._rows()), *self._lines()])


def _row(layer: PackedLayerReport) -> tuple[str, ...]:
    rate = "" if layer.rate is None else f"{layer.rate:.1%}"
    if layer.planes > 1:
        rate += f" x{layer.planes}"
    gain = "" if layer.gain is None else f"{layer.gain:.2f}x"
    shape = "x".join(map(str, layer.shape))
    return (
        layer.name, shape, layer.pattern, layer.choice, rate, gain, layer.neuron, layer.note
    )  # fmt: skip
