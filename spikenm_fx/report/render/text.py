# SPDX-License-Identifier: Apache-2.0
"""A report as a table for terminals and logs."""

from __future__ import annotations

from collections import Counter

from spikenm_fx.report.data import ReportData
from spikenm_fx.report.render.columns import COLUMNS, rows
from spikenm_fx.report.render.units import bytes_text, count_text, counted, energy_text
from spikenm_fx.table import text_table

__all__ = ["latency_words", "table"]

_LEFT = 4  # columns of words
_EXPLAINED = ("kept |w|", "dual sparsity", "PE util.")


def table(report: ReportData) -> str:
    """The report as text: a head line, one row per layer, the totals, what the words mean."""
    right = frozenset(range(_LEFT, len(COLUMNS)))
    body = text_table(rows(report), right=right, ruled=True)
    return "\n".join([_head(report), *body, *_foot(report)])


def _head(report: ReportData) -> str:
    return (
        f"{report.model}: {sum(layer.pattern is not None for layer in report.layers)} of "
        f"{len(report.layers)} weight layers are N:M; "
        f"{counted(report.samples, 'sample')} in {counted(report.batches, 'batch', 'batches')}; "
        f"operations and energy per sample"
    )


def _foot(report: ReportData) -> list[str]:
    energy = report.energy
    lines = [
        f"energy: {energy.pj_per_ac:g} pJ per AC, {energy.pj_per_mac:g} pJ per MAC (weight layers "
        f"only); with dense weights {energy_text(report.picojoule_dense)}, "
        f"all MACs {energy_text(report.picojoule_ann)}",
        f"bytes: {bytes_text(report.dense_bytes)} dense, "
        f"{bytes_text(report.packed_bytes)} packed; PE utilisation for {report.pes} PEs, which "
        f"need {count_text(report.cycles[0])} cycles a sample for the spikes that came "
        f"({count_text(report.cycles[1])} for all inputs)",
        *(f"{head}: {COLUMNS[head].meaning}" for head in _EXPLAINED),
    ]
    ways = Counter(la.note.removeprefix("runs as ") for la in report.layers if "runs as" in la.note)
    if ways:
        lines.append("packed layers run as: " + ", ".join(f"{n} {way}" for way, n in ways.items()))
    lines += latency_words(report)
    return [*lines, *(f"note: {note}" for note in report.notes)]


def latency_words(report: ReportData) -> list[str]:
    """One line with the time of each variant; none where nothing was timed."""
    if report.latency is None:
        return []
    times = ", ".join(f"{k} {1000 * v:.2f} ms" for k, v in report.latency.total.items())
    return [
        f"latency of one batch: {times} (median of {report.latency.repeats}, "
        f"{counted(report.latency.threads, 'thread')})"
    ]
