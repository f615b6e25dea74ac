# SPDX-License-Identifier: Apache-2.0
"""Commands that write a checkpoint: sparsify and pack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikenm_fx.cli.blocks import sparse_metadata
from spikenm_fx.cli.common import Input, Json, Loaded, Pattern, RootOption, Screen
from spikenm_fx.errors import RecipeError

if TYPE_CHECKING:
    from spikenm_fx.plan.plan import Plan

__all__ = ["pack", "sparsify"]

Target = Annotated[str, typer.Argument(help="A recipe file, or module:Class.")]
CheckpointIn = Annotated[
    Path, typer.Option("--checkpoint", "-c", help="Weights: .safetensors or .pt.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write; must not exist.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file that --out names.")]


def sparsify(
    target: Target,
    checkpoint: CheckpointIn,
    out: Out,
    nm: Pattern = None,
    root: RootOption = None,
    shape: Input = None,
    method: Annotated[
        str, typer.Option(help="Scores that choose the weights in one shot.")
    ] = "magnitude",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a dense checkpoint N:M in one shot, without training; keys stay the dense ones."""
    import spikenm_fx
    from spikenm_fx.checkpoint import save_state

    screen = Screen(as_json)
    where = {"root": root, "nm": nm, "shape": shape, "checkpoint": checkpoint}
    with _opened(screen, "choosing weights", target, out, force, where) as (loaded, decided):
        loaded.sparsify(decided, method)
        spikenm_fx.fold(loaded.model)
        found = spikenm_fx.verify(loaded.model, decided)
        found.raise_if_invalid()
        save_state(out, loaded.model.state_dict(), metadata=sparse_metadata(decided))
    screen.result(
        {"out": str(out), "plan": decided.to_dict(), "verification": found.to_dict()},
        f"{decided}\nwritten and verified: {out}",
    )


def pack(
    target: Target,
    checkpoint: CheckpointIn,
    out: Out,
    nm: Pattern = None,
    root: RootOption = None,
    shape: Input = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store an N:M checkpoint as kept values and few-bit indices."""
    import spikenm_fx
    from spikenm_fx.cli.packing import pack_model

    screen = Screen(as_json)
    where = {"root": root, "nm": nm, "shape": shape, "checkpoint": checkpoint}
    with _opened(screen, "packing", target, out, force, where) as (loaded, decided):
        spikenm_fx.verify(loaded.model, decided).raise_if_invalid()
        sizes = pack_model(loaded.model, decided, out)
    dense, packed = sum(d for d, _ in sizes.values()), sum(p for _, p in sizes.values())
    text = (
        f"{len(sizes)} layers packed: {dense:,} bytes to {packed:,} "
        f"({dense / max(packed, 1):.2f}x smaller)\nwritten: {out}"
    )
    layers = {name: {"dense_bytes": d, "packed_bytes": p} for name, (d, p) in sizes.items()}
    screen.result({"out": str(out), "layers": layers}, text)


@contextmanager
def _opened(
    screen: Screen, words: str, target: str, out: Path, force: bool, where: dict[str, Any]
) -> Iterator[tuple[Loaded, Plan]]:
    """The model and its plan, after making sure that ``out`` may be written."""
    if out.exists() and not force:
        raise RecipeError(f"{out} exists; --force replaces it")
    if not out.parent.is_dir():
        raise RecipeError(f"{out.parent} is not a folder")
    with screen.working(words):
        loaded = Loaded.named(target, **where)
        yield loaded, loaded.plan()
