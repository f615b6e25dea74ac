# SPDX-License-Identifier: Apache-2.0
"""What checks came to: a summary for people, and the table in a Markdown file, renewed by rows."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikenm_fx.checkpoint import write_atomically
from spikenm_fx.errors import RecipeError

__all__ = ["BEGIN", "END", "check_table", "renew_table", "summary"]

BEGIN = "<!-- results: written by spikenm-fx recipe check -->"
END = "<!-- end of results -->"

_HEAD = (
    "| recipe | code | sparse / all layers | neurons firing | build, plan, sparsify, step, fold, "
    "verify | pack (output off by) | spikes on the threshold | one native program | tried |"
)
_RULE = "|---|---|---|---|---|---|---|---|---|"


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """Some lines for each recipe, and how many are fine.

    Args:
        results: of :meth:`CheckResult.to_dict`.
    """
    lines = []
    for result in results:
        verdict = "skipped" if result["skipped"] else "ok" if result["ok"] else "FAILED"
        layers = f"{result['sparse']}/{result['layers']} layers" if result["layers"] else ""
        firing = "{} of {} neurons fire".format(*result["firing"]) if result["firing"] else ""
        name, seconds = result["recipe"], result["seconds"]
        lines.append(f"{verdict:8} {name:34} {layers:16} {firing:24} {seconds:6.1f} s")
        lines += [
            f"         {stage}: {text}" for stage, text in result["stages"].items() if text != "ok"
        ]
    skipped = sum(result["skipped"] for result in results)
    ok = sum(result["ok"] and not result["skipped"] for result in results)
    lines.append(f"{ok} ok, {len(results) - ok - skipped} failed, {skipped} skipped")
    return "\n".join(lines)


def check_table(path: Path) -> str:
    """The text of a file whose table can be renewed; that of a new one where there is none.

    Raises:
        RecipeError: if the file cannot be read, its folder is missing, or it lacks the two marks
            between which the table stands.
    """
    if not path.parent.is_dir():
        raise RecipeError(f"{path.parent} is not a folder")
    if not path.exists():
        return f"{BEGIN}\n{END}\n"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from error
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise RecipeError(f"{path} lacks the marks {BEGIN!r} and {END!r}")
    return text


def renew_table(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of the recipes that were tried; rows of others stay.

    Raises:
        RecipeError: as :func:`check_table`.
        CheckpointError: if the disk refuses.
    """
    head, _, rest = check_table(path).partition(BEGIN)
    old, _, tail = rest.partition(END)
    rows = dict(_old_rows(old))
    rows |= {f"`{r['recipe']}`": _row(r) for r in results if not r["skipped"]}
    body = "\n".join([BEGIN, "", _HEAD, _RULE, *(rows[key] for key in sorted(rows)), "", END])
    content = head + body + tail
    write_atomically(path, lambda part: part.write_text(content, encoding="utf-8"))


def _old_rows(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        if line.startswith("| `"):
            yield line.split("|")[1].strip(), line


def _row(result: Mapping[str, Any]) -> str:
    stages = result["stages"]
    main = {stage: text for stage, text in stages.items() if stage != "pack"}
    failed = [f"{stage} {_short(text)}" for stage, text in main.items() if text != "ok"]
    firing = "{} of {}".format(*result["firing"]) if result["firing"] else "-"
    cells = (
        f"`{result['recipe']}`",
        str(result["origin"]),
        f"{result['sparse']} / {result['layers']}",
        firing,
        "; ".join(failed) or "all ok",
        *_packed(result),
        _short(result.get("program") or "-"),
        f"{datetime.date.today().isoformat()}, {result['environment']}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _packed(result: Mapping[str, Any]) -> tuple[str, str]:
    """What became of packing, and how many spikes were ties, with what came of them."""
    text, found = result["stages"].get("pack", "-"), result.get("packed")
    if text != "ok" or found is None:
        return _short(text), "-"
    agreed = f"ok ({found['difference']:.0e})" if found["difference"] else "ok (0)"
    if not found["neurons"]:
        return agreed, "no neurons to compare"
    if not found["ties"]:
        return agreed, "none"
    ties = f"{found['ties']} of {found['spikes']:.1e}, at most {found['share']:.1e} at first"
    return agreed, f"{ties}; output then off by {found['jump']:.2g}"


def _short(text: str) -> str:
    line = text.splitlines()[0] if text else "-"
    return line if len(line) <= 120 else line[:117] + "..."
