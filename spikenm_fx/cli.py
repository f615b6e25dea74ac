# SPDX-License-Identifier: Apache-2.0
"""The command line ``spikenm-fx``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """Learnable N:M sparsity for spiking neural networks."""


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Of weights, batches and masks.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-output"),
) -> None:
    """Watch a spiking network learn handwritten digits: dense, at 2:4 and at 1:8."""
    from spikenm_fx.demo import PATTERNS, draw_masks, run_demo, steps_of

    console = Console()
    columns = (
        TextColumn("{task.description:>5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = steps_of(epochs)
        tasks = {p or "dense": progress.add_task(p or "dense", total=total) for p in PATTERNS}
        rows = list(run_demo(epochs, seed, lambda pattern: progress.advance(tasks[pattern])))
    for row in rows:
        if row.verification is not None:
            row.verification.raise_if_invalid()
            sparse = [layer for layer in row.verification.layers if layer.required]
            blocks = sum(layer.blocks for layer in sparse)
            console.print(
                f"verified {row.pattern}: {len(sparse)} layers, {blocks} blocks, no violation"
            )
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
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    draw_masks(rows, out / "masks.png")
    console.print(f"learnt masks: {out / 'masks.png'}")


def main() -> None:
    """Entry point."""
    app()
