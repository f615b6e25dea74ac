# SPDX-License-Identifier: Apache-2.0
"""``spikenm-fx demo``: watch a spiking network learn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spikenm_fx.cli.common import Json, Screen

if TYPE_CHECKING:
    from rich.table import Table

    from spikenm_fx.demo.run import DemoRow

__all__ = ["demo"]


def demo(
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Of weights, batches and masks.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """Watch a spiking network learn handwritten digits: dense, at 2:4 and at 1:8."""
    from spikenm_fx.errors import CheckpointError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: no folder can be made there: {error.strerror}") from error
    import torch
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from spikenm_fx.demo.run import PATTERNS, draw_masks, run_demo, steps_of

    # The network is too small for more: threads that wait for each other on a busy machine stall.
    torch.set_num_threads(1)
    screen = Screen(as_json)
    columns = (
        TextColumn("{task.description:>5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen.err) as progress:
        total = steps_of(epochs)
        tasks = {p or "dense": progress.add_task(p or "dense", total=total) for p in PATTERNS}
        rows = list(run_demo(epochs, seed, lambda pattern: progress.advance(tasks[pattern])))
    for row in rows:
        if row.verification is not None:
            row.verification.raise_if_invalid()
            sparse = [layer for layer in row.verification.layers if layer.required]
            blocks = sum(layer.blocks for layer in sparse)
            screen.say(
                f"verified {row.pattern}: {len(sparse)} layers, {blocks} blocks, no violation"
            )
    draw_masks(rows, out / "masks.png")
    picture = str(out / "masks.png")
    if as_json:
        screen.json({"rows": [row.to_dict() for row in rows], "picture": picture})
        return
    screen.out.print(_table(rows))
    screen.out.print(f"learnt masks: {picture}")


def _table(rows: list[DemoRow]) -> Table:
    from rich.table import Table

    table = Table(title="Spiking CNN on 8x8 digits, T=4, folded weights")
    for heading in (
        "pattern",
        "test accuracy",
        "density",
        "packed bytes",
        "SynOps/image",
        "MACs/image",
        "training",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.pattern,
            f"{row.accuracy:.2%}",
            f"{row.density:.3f}",
            f"{row.packed_bytes:,}",
            f"{row.synops:,.0f}",
            f"{row.macs:,.0f}",
            f"{row.seconds:.1f} s",
        )
    return table
