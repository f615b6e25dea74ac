# SPDX-License-Identifier: Apache-2.0
"""The columns of a report, once for text and page: head, meaning, a layer's cell, the total."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from spikenm_fx.report.data import LayerReport, ReportData
from spikenm_fx.report.render.units import bytes_text, count_text, energy_text, percent

__all__ = ["COLUMNS", "Column", "rows"]

Cell = Callable[[LayerReport, int], str]
Total = Callable[[ReportData, int], str]


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of every layer.

    Attributes:
        head: its name.
        meaning: the same in a sentence; "" where the name says it.
        cell: of a layer, given the number of samples.
        total: of the model, given the number of samples.
    """

    head: str
    meaning: str
    cell: Cell
    total: Total


def _nothing(_report: ReportData, _samples: int) -> str:
    return ""


_ALL = (
    Column("layer", "", lambda la, _: la.name or "(root)", lambda _r, _: "total"),
    Column("kind", "", lambda la, _: la.kind, _nothing),
    Column(
        "weight",
        "shape of the weight: outputs x inputs x kernel",
        lambda la, _: "x".join(map(str, la.shape)),
        lambda r, _: count_text(sum(la.weights for la in r.layers)),
    ),
    Column(
        "pattern",
        "n:m, at most n of m consecutive input channels are not zero",
        lambda la, _: la.pattern or "dense",
        _nothing,
    ),
    Column(
        "density",
        "share of weights that are not zero",
        lambda la, _: percent(la.density),
        lambda r, _: percent(r.density),
    ),
    Column(
        "kept |w|",
        "share of the dense weight's sum of magnitudes that the mask keeps (known of masked "
        "models, else from reference=)",
        lambda la, _: percent(la.kept_magnitude),
        _nothing,
    ),
    Column(
        "input",
        "what the layer sees: spikes (0 and 1), integer (counts of spikes) or analog values",
        lambda la, _: la.signal or "never ran",
        _nothing,
    ),
    Column(
        "rate in",
        "mean spikes per input value and time step",
        lambda la, _: percent(la.rate_in),
        lambda r, _: percent(r.firing_rate),
    ),
    Column(
        "rate out",
        "mean spikes per time step of the neurons that the layer drives",
        lambda la, _: percent(la.rate_out),
        _nothing,
    ),
    Column(
        "dense ops",
        "products of inputs and weights if neither held zeros",
        lambda la, n: count_text(la.operations.dense / n),
        lambda r, n: count_text(r.operations.dense / n),
    ),
    Column(
        "SynOps",
        "synaptic operations: accumulations of a non-zero weight for a spike",
        lambda la, n: count_text(la.operations.synops / n),
        lambda r, n: count_text(r.operations.synops / n),
    ),
    Column(
        "MACs",
        "multiply-accumulates of a non-zero weight with an analog value",
        lambda la, n: count_text(la.operations.macs / n),
        lambda r, n: count_text(r.operations.macs / n),
    ),
    Column(
        "energy",
        "of the SynOps and MACs",
        lambda la, n: energy_text(la.picojoule / n),
        lambda r, _: energy_text(r.picojoule),
    ),
    Column(
        "dual sparsity",
        "share of the dense operations that zero weights and silent inputs remove together",
        lambda la, _: percent(la.dual_sparsity),
        lambda r, _: percent(r.dual_sparsity),
    ),
    Column(
        "PE util.",
        "mean over maximum work, in non-zero weights, of processing elements that take one output "
        "channel each and wait for the slowest",
        lambda la, _: percent(la.utilisation),
        lambda r, _: percent(r.utilisation),
    ),
    Column(
        "bytes",
        "weight and bias as they are in memory",
        lambda la, _: bytes_text(la.dense_bytes),
        lambda r, _: bytes_text(r.dense_bytes),
    ),
    Column(
        "packed",
        "the same when only kept values and their positions are stored",
        lambda la, _: bytes_text(la.packed_bytes),
        lambda r, _: bytes_text(r.packed_bytes),
    ),
)

COLUMNS = {column.head: column for column in _ALL}
"""Every column by its head, in order."""


def rows(report: ReportData, heads: Iterable[str] = tuple(COLUMNS)) -> list[list[str]]:
    """The heads, one row per layer and the totals; counts and energy are per sample."""
    columns, samples = [COLUMNS[head] for head in heads], max(report.samples, 1)
    found = [[column.head for column in columns]]
    found += [[c.cell(layer, samples) for c in columns] for layer in report.layers]
    return [*found, [column.total(report, samples) for column in columns]]
