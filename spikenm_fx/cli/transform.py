# SPDX-License-Identifier: Apache-2.0
"""Commands that write a checkpoint: sparsify and pack."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from spikenm_fx.cli.common import (
    CheckpointIn,
    Force,
    Input,
    Json,
    Out,
    Pattern,
    RootOption,
    Screen,
    Target,
    refuse_existing,
    shape_of,
)

__all__ = ["pack", "sparsify"]


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
    permute: Annotated[
        bool,
        typer.Option("--permute", help="First put channels in the order in which N:M keeps most."),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make a dense checkpoint N:M in one shot, without training; keys stay the dense ones."""
    screen, asked = Screen(as_json), shape_of(shape)
    refuse_existing(out, force)
    with screen.working("choosing weights"):
        from spikenm_fx.fold import fold
        from spikenm_fx.pack.check.stored import sparse_metadata
        from spikenm_fx.recipe import load_model
        from spikenm_fx.verify import verify

        loaded = load_model(target, root=root, nm=nm, shape=asked, checkpoint=checkpoint)
        decided = loaded.plan()
        loaded.sparsify(decided, method, permute=permute)
        fold(loaded.model)
        found = verify(loaded.model, decided)
        found.raise_if_invalid()
        loaded.save(out, sparse_metadata(decided))
    screen.result(
        {"out": str(out), "plan": decided.to_dict(), "verification": found.to_dict()},
        f"{decided}\nwritten and verified: {out}",
    )


def pack(
    target: Target,
    checkpoint: CheckpointIn,
    out: Out,
    nm: Annotated[
        str | None,
        typer.Option("--nm", help="Store at this pattern; else the tightest that weights have."),
    ] = None,
    root: RootOption = None,
    shape: Input = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Store an N:M checkpoint as kept values and few-bit indices."""
    screen, asked = Screen(as_json), shape_of(shape)
    refuse_existing(out, force)
    with screen.working("packing"):
        from spikenm_fx.pack import save_packed_model, tightest_plan
        from spikenm_fx.recipe import load_model
        from spikenm_fx.verify import verify

        loaded = load_model(target, root=root, nm=nm, shape=asked, checkpoint=checkpoint)
        decided = loaded.plan()
        if nm is None:
            decided = tightest_plan(loaded.model, decided)
        verify(loaded.model, decided).raise_if_invalid()
        sizes = save_packed_model(out, loaded.model, decided)
    patterns = {entry.name: str(entry.nm) for entry in decided.sparse if entry.name in sizes}
    dense, packed = sum(d for d, _ in sizes.values()), sum(p for _, p in sizes.values())
    at = ", ".join(f"{count} at {nm}" for nm, count in Counter(patterns.values()).most_common())
    text = (
        f"layers packed: {at}; {dense:,} bytes to {packed:,} "
        f"({dense / max(packed, 1):.2f}x smaller)\nwritten: {out}"
    )
    layers = {
        name: {"pattern": patterns[name], "dense_bytes": d, "packed_bytes": p}
        for name, (d, p) in sizes.items()
    }
    screen.result({"out": str(out), "layers": layers}, text)
