# SPDX-License-Identifier: Apache-2.0
"""Two reports side by side, as text and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape

from spikenm_fx.report.data import ReportData, changes
from spikenm_fx.report.render.style import STYLE, document, styled_table
from spikenm_fx.report.render.text import latency_words
from spikenm_fx.report.render.units import bytes_text, count_text, counted, energy_text, percent
from spikenm_fx.table import text_table

__all__ = ["fragment", "page", "text"]

Names = tuple[str, str]


def text(before: ReportData, after: ReportData, names: Names) -> str:
    """Head line, totals and layers, for terminals and logs."""
    head = f"{_words(before, names[0])}\n{_words(after, names[1])}"
    totals, layers = _totals(before, after, names), _layers(before, after)
    right = frozenset(range(1, 4))
    rest = frozenset(range(2, len(layers[0])))
    times = latency_words(after)
    tables = [*text_table(totals, right=right), *times, "", *text_table(layers, right=rest)]
    return "\n".join([head, "", *tables])


def page(before: ReportData, after: ReportData, names: Names) -> str:
    """A complete HTML document."""
    title = f"{names[0]} and {names[1]}: {after.model}"
    return document(title, fragment(before, after, names))


def fragment(before: ReportData, after: ReportData, names: Names) -> str:
    """The page's body with its own style, for notebooks and other pages."""
    words = "<br>".join(escape(_words(r, n)) for r, n in zip((before, after), names, strict=True))
    return (
        f'<div class="snm"><style>{STYLE}</style>'
        f"<h1>{escape(names[0])} and {escape(names[1])}</h1><p>{words}</p>"
        "<h2>In all</h2><p>Operations and energy are per sample; the ratio is of the second over "
        f"the first.</p>{styled_table(_totals(before, after, names))}"
        f"<p>{escape(' '.join(latency_words(after)))}</p>"
        "<h2>Layer by layer</h2><p>Before &rarr; after; operations are SynOps and MACs that both "
        f"sparsities leave.</p>{styled_table(_layers(before, after))}</div>"
    )


def _words(report: ReportData, name: str) -> str:
    return (
        f"{name}: {report.model}, {counted(report.samples, 'sample')} in "
        f"{counted(report.batches, 'batch', 'batches')}"
    )


def _totals(before: ReportData, after: ReportData, names: Names) -> list[list[str]]:
    found = [["figure", *names, "ratio"]]

    def add(name: str, show: Callable[[float], str], value: Callable[[ReportData], float]) -> None:
        a, b = value(before), value(after)
        found.append([name, show(a), show(b), f"{b / a:.3f}" if a else "-"])

    def each(field: str) -> Callable[[ReportData], float]:
        return lambda r: float(getattr(r.operations, field)) / max(r.samples, 1)

    add("weight density", percent, lambda r: r.density)
    add("firing rate", percent, lambda r: r.firing_rate or 0.0)
    add("dense operations", count_text, each("dense"))
    add("SynOps", count_text, each("synops"))
    add("MACs", count_text, each("macs"))
    add("dual sparsity", percent, lambda r: r.dual_sparsity)
    add("energy", energy_text, lambda r: r.picojoule)
    add("PE utilisation", percent, lambda r: r.utilisation)
    add("weights", count_text, lambda r: float(sum(layer.weights for layer in r.layers)))
    add("bytes", bytes_text, lambda r: float(r.dense_bytes))
    add("bytes when packed", bytes_text, lambda r: float(r.packed_bytes))
    return found


def _layers(before: ReportData, after: ReportData) -> list[list[str]]:
    found = [["layer", "pattern", "density", "operations", "ratio", "energy", "packed"]]
    for change in changes(before, after):
        patterns = zip(change.pattern, change.density, strict=True)
        a, b = change.effective
        found.append(
            [
                change.name or "(root)",
                _arrow("-" if density is None else nm or "dense" for nm, density in patterns),
                _pair(change.density, percent),
                _pair(change.effective, count_text),
                f"{b / a:.3f}" if a and b is not None else "-",
                _pair(change.picojoule, energy_text),
                _pair(change.packed_bytes, bytes_text),
            ]
        )
    return found


def _pair(values: tuple[float | None, float | None], show: Callable[[float], str]) -> str:
    return _arrow("-" if value is None else show(value) for value in values)


def _arrow(values: Iterable[str]) -> str:
    before, after = values
    return before if before == after else f"{before} -> {after}"
