# SPDX-License-Identifier: Apache-2.0
"""Tables of text and of HTML, as plans, verifications, reports and packing summaries show them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["html_table", "text_table"]

_STYLE = (
    "border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap;font-size:13px"
)


def text_table(
    rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset(), ruled: bool = False
) -> list[str]:
    """Lines with aligned columns; the first row is the head.

    Args:
        rows: cells, the same number in each row.
        right: columns, by index, that are flush right.
        ruled: a line below the head and one above the last row, which then holds totals.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        aligned = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in cells)
        lines.append("  ".join(aligned).rstrip())
    if ruled:
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    return lines


def html_table(rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """The same as an HTML table that needs no style sheet, for notebooks; all text is escaped.

    Args:
        rows: cells, the same number in each row; the first row is the head.
        caption: a sentence above the table.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        style = ' style="text-align:left;padding:3px 10px"'
        return "<tr>" + "".join(f"<{tag}{style}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    above = f'<p style="margin:0 0 6px">{escape(caption)}</p>' if caption else ""
    body = "".join(line(row, "td") for row in rows[1:])
    return (
        f'<div style="overflow-x:auto">{above}<table style="{_STYLE}">'
        f"<thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table></div>"
    )
