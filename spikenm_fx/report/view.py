# SPDX-License-Identifier: Apache-2.0
"""The reports as users hold them: figures that print, and that write themselves as a page.

Drawing is asked for here alone, when it is wanted: the records know nothing of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikenm_fx.checkpoint import write_atomically
from spikenm_fx.errors import ReportError
from spikenm_fx.report.data import ReportData, changes

__all__ = ["Comparison", "Report", "compare"]


class Report(ReportData):
    """What a model costs and where its zeros are.

    ``print(report)`` shows a table, :meth:`to_dict` and :meth:`to_json` the figures,
    :meth:`to_html` a page of its own; notebooks show the page's body.
    """

    __slots__ = ()

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page: no network, no scripts.

        Args:
            path: a file to write the page to, too, completely or not at all.

        Raises:
            CheckpointError: if the disk refuses the file.
        """
        from spikenm_fx.report.render import html

        return _written(html.page(self), path)

    def _repr_html_(self) -> str:
        from spikenm_fx.report.render import html

        return html.fragment(self)

    def __str__(self) -> str:
        from spikenm_fx.report.render import text

        return text.table(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two reports side by side: of the model before and after, say.

    ``print(comparison)`` shows both tables, :meth:`to_html` a page; notebooks show its body.

    Attributes:
        before: what is compared with.
        after: what is compared; ratios are of its figures over those of ``before``.
        names: what to call the two.
    """

    before: ReportData
    after: ReportData
    names: tuple[str, str] = ("before", "after")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: both reports' totals, and of each figure above zero in both its ratio.

        ``latency``: seconds of one batch by variant, as measured for the report of ``after``.
        """
        totals = [report.to_dict()["total"] for report in (self.before, self.after)]
        ratios = {
            key: totals[1][key] / value
            for key, value in totals[0].items()
            if value and totals[1][key] is not None
        }
        layers = [asdict(change) for change in changes(self.before, self.after)]
        return {
            "names": list(self.names),
            "before": totals[0],
            "after": totals[1],
            "ratios": ratios,
            "layers": layers,
            "latency": None if self.after.latency is None else dict(self.after.latency.total),
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page: no network, no scripts.

        Args:
            path: a file to write the page to, too, completely or not at all.

        Raises:
            CheckpointError: if the disk refuses the file.
        """
        from spikenm_fx.report.render import comparison

        return _written(comparison.page(self.before, self.after, self.names), path)

    def _repr_html_(self) -> str:
        from spikenm_fx.report.render import comparison

        return comparison.fragment(self.before, self.after, self.names)

    def __str__(self) -> str:
        from spikenm_fx.report.render import comparison

        return comparison.text(self.before, self.after, self.names)


def compare(
    before: ReportData, after: ReportData, *, names: tuple[str, str] = ("before", "after")
) -> Comparison:
    """Two reports side by side, all figures per sample: totals, then layer by layer.

    Layers are matched by their qualified names; one that only one of the models has is listed with
    a dash for the other.  Times are those of ``after``: give its report both models, which
    then take turns, ``report(small, x, latency={"before": model, "after": small})``.

    Args:
        before: of the dense model, say.
        after: of the same model folded, say.
        names: what to call the two.

    Raises:
        ReportError: if either is no report, or there are not two names.
    """
    for given in (before, after):
        if not isinstance(given, ReportData):
            raise ReportError(
                f"compare() got a {type(given).__name__}; give two reports: "
                "compare(report(dense, x), report(folded, x))"
            )
    if isinstance(names, str) or len(names) != 2:
        raise ReportError(f"names={names!r}: give two, e.g. names=('dense', '2:4')")
    return Comparison(before, after, (str(names[0]), str(names[1])))


def _written(page: str, path: str | Path | None) -> str:
    if path is not None:
        write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return page
