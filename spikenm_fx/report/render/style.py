# SPDX-License-Identifier: Apache-2.0
"""The page's style sheet and frame: light and dark, from 700 pixels on."""

from __future__ import annotations

from html import escape

__all__ = ["STYLE", "document", "styled_table"]

STYLE = """
.snm{--bg:#fff;--ink:#1b2330;--soft:#667085;--line:#e4e8ee;--band:#f7f9fb;--grey:#cfd6df;
--ghost:#eef1f5;--weight:#2b6cb0;--spike:#e08a1e;--done:#12936f;--mac:#8e5bbf;--card:#f7f9fb;
background:var(--bg);color:var(--ink);max-width:1200px;margin:0 auto;padding:28px 32px 40px;
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media(prefers-color-scheme:dark){.snm{--bg:#12161d;--ink:#e7ebf1;--soft:#98a3b3;--line:#2a323e;
--band:#181e27;--grey:#46505f;--ghost:#1d242e;--weight:#5b9be0;--spike:#f0a544;--done:#35bd95;
--mac:#b48ae0;--card:#1a212b}}
.snm h1{font-size:25px;margin:0 0 2px;letter-spacing:-.01em}
.snm h2{font-size:17px;margin:38px 0 4px}
.snm p{margin:0 0 12px;color:var(--soft)}
.snm .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));gap:12px;
margin:20px 0 4px}
.snm .tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.snm .tile b{display:block;font-size:23px;white-space:nowrap;letter-spacing:-.02em;font-weight:650}
.snm .tile span{display:block;color:var(--soft);font-size:12.5px}
.snm .tile em{font-style:normal;font-size:13px}
.snm .figure{overflow-x:auto}
.snm svg{width:100%;max-width:940px;min-width:600px;height:auto;display:block;
font-family:inherit}
.snm svg text{font-size:12.5px;fill:var(--ink)}
.snm svg .strong{font-weight:600}.snm svg .soft,.snm svg .tick{fill:var(--soft)}
.snm svg .tick{font-size:11.5px}.snm svg .end{text-anchor:end}.snm svg .mid{text-anchor:middle}
.snm svg .inside{fill:#fff;font-size:11.5px}
.snm svg .name{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:12px}
.snm .weight{fill:var(--weight)}.snm .spike{fill:var(--spike)}.snm .done{fill:var(--done)}
.snm .mac{fill:var(--mac)}.snm .grey{fill:var(--grey)}.snm .ghost{fill:var(--ghost)}
.snm .band{fill:var(--band)}.snm .empty{fill:var(--ghost)}
.snm .rule{stroke:var(--line);stroke-width:1}
.snm .border{stroke:var(--soft);stroke-width:.7;fill:none;opacity:.55}
.snm .ring{fill:none;stroke:var(--ink);stroke-width:1.6}
.snm .legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft);
margin:0 0 10px}
.snm .legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.snm .scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px}
.snm table{border-collapse:collapse;width:100%;font-size:12px;white-space:nowrap}
.snm th{font-weight:600;color:var(--soft);text-align:right;padding:8px 7px;
border-bottom:1px solid var(--line)}
.snm td{text-align:right;padding:5px 7px;font-variant-numeric:tabular-nums;color:var(--ink);
border-bottom:1px solid var(--line);background:none}
.snm tr:last-child td{border-bottom:0}.snm .totals tr:last-child td{font-weight:600}
.snm th:first-child,.snm td:first-child{text-align:left;position:sticky;left:0;
background:var(--bg)}
.snm td:first-child{font-family:ui-monospace,"DejaVu Sans Mono",monospace}
.snm .scroll{margin-bottom:14px}
.snm dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;margin:0;font-size:13px}
.snm dt{font-weight:600}.snm dd{margin:0;color:var(--soft)}
@media(max-width:760px){.snm{padding:20px 14px 28px}.snm td,.snm th{padding:5px 5px}}
.snm footer{margin-top:26px;font-size:12.5px;color:var(--soft)}
"""


def document(title: str, body: str) -> str:
    """A complete HTML document around ``body``, which is HTML already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title>"
        "<style>html{color-scheme:light dark}body{margin:0;background:#fff}"
        "@media(prefers-color-scheme:dark){body{background:#12161d}}</style></head>"
        f"<body>{body}</body></html>"
    )


def styled_table(
    rows: list[list[str]],
    *,
    heads: dict[str, str] | None = None,
    rows_say: list[str] | None = None,
    totals: bool = False,
) -> str:
    """A table of the page.

    Args:
        rows: cells; the first row is the head.
        heads: what the heads mean, shown where the pointer rests.
        rows_say: the same for each row below the head; "" for nothing.
        totals: the last row holds totals.
    """
    meanings, marked = heads or {}, ' class="totals"' if totals else ""
    head = "".join(_cell("th", name, meanings.get(name, "")) for name in rows[0])
    body = ""
    for row, says in zip(rows[1:], rows_say or [""] * len(rows[1:]), strict=True):
        cells = "".join(_cell("td", cell) for cell in row)
        body += f'<tr title="{escape(says)}">{cells}</tr>' if says else f"<tr>{cells}</tr>"
    return (
        f'<div class="scroll"><table{marked}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(tag: str, text: str, title: str = "") -> str:
    opening = f'<{tag} title="{escape(title)}">' if title else f"<{tag}>"
    return f"{opening}{escape(text)}</{tag}>"
