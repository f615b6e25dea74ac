# SPDX-License-Identifier: Apache-2.0
"""The engine that is a copy of the model: built, compared with it, and in its fastest form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spikenm_fx.pack.builder import EngineBuilder
from spikenm_fx.pack.check.proof import prove
from spikenm_fx.pack.copying import copy_at_rest, own_memory, shared_weights, unregister
from spikenm_fx.pack.engine.choose import choose
from spikenm_fx.pack.forms import Forms
from spikenm_fx.pack.summary import PackReport, Proof
from spikenm_fx.pattern import NM
from spikenm_fx.state import preserved_records
from spikenm_fx.state.guard import Watched, watching

__all__ = ["packed_copy"]

NO_EXAMPLES = (
    "No example inputs were given: nothing was measured, fused or compared, and every layer runs "
    "dense; call pack(model, example_inputs)."
)
SMALL = (
    "Layers keep no more than their stored weights in memory (memory='small'), as was asked for; "
    "nothing was timed, and it may be slower than the model."
)
GIVEN = (
    "The backend was given, so that the whole forward was not timed, and may be slower than the "
    "model's; leave backend= out to have that measured."
)


def packed_copy(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    backend: str | Mapping[str, str],
    dtype: torch.dtype | None,
    nm: NM | None,
    *,
    check: bool,
    memory: str = "fast",
) -> nn.Module:
    """An instance of the model's class whose layers are packed; its report is with it.

    Args:
        model: folded, on the CPU; it is left as it is.
        args: the example inputs, or None.
        backend: as :func:`~spikenm_fx.pack.api.pack` takes it.
        dtype: of the stored weights, or None.
        nm: what each layer must be that is not dense, or None.
        check: compare the engine with the model.
        memory: whether layers keep no more than their stored weights.

    Raises:
        PackError: for weights that cannot be packed, or a backend that does not exist.
    """
    engine = copy_at_rest(model, share=True)
    with preserved_records(model, engine):
        report = _build(model, engine, args, backend, dtype, nm, check=check, memory=memory)
    own_memory(engine, model)
    engine.__dict__["_spikenm_packing"] = report
    return engine


def _build(
    model: nn.Module,
    engine: nn.Module,
    args: tuple[Any, ...] | None,
    backend: str | Mapping[str, str],
    dtype: torch.dtype | None,
    nm: NM | None,
    *,
    check: bool,
    memory: str,
) -> PackReport:
    shared = [Watched(weight) for weight in shared_weights(engine, model)]
    with watching(shared):
        builder = EngineBuilder(engine, args, dtype, nm)
    share = not any(weight.written for weight in shared)
    if not share:  # its forward writes into its weights, which must not be those of the model
        own_memory(engine, model)
    builder.small = memory == "small"
    builder.replace_layers()
    if builder.small:
        backend = {name: draft.packed.choice for name, draft in builder.layers.items()}
    elif isinstance(backend, Mapping):
        backend = _without_torchs(builder, backend)
    if args is None:
        choose(engine, None, builder.layers, backend)
        return replace(builder.report(), note=NO_EXAMPLES)
    if builder.layers or not builder.left:
        builder.fuse()
    builder.put_back_unmultiplied()
    reference = copy_at_rest(model, share=share)
    try:
        if dtype is not None:
            builder.round_alike(reference)
        return _settle(builder, reference, args, backend, check=check)
    finally:
        unregister(reference)


def _without_torchs(builder: EngineBuilder, backend: Mapping[str, str]) -> Mapping[str, str]:
    """Let layers be torch's that shall be, and return what is said of the others."""
    for name in [name for name, choice in backend.items() if choice == "torch"]:
        if name in builder.layers:
            builder.leave(name, "It is torch's, as was asked for; leave it out to have it packed.")
    return {name: choice for name, choice in backend.items() if name not in builder.left}


def _settle(
    builder: EngineBuilder,
    reference: nn.Module,
    args: tuple[Any, ...],
    backend: str | Mapping[str, str],
    *,
    check: bool,
) -> PackReport:
    """Choose how each layer runs, prove the engine right, and let its fastest form run."""
    engine, forms, auto = builder.engine, Forms(builder), backend == "auto"
    proof: Proof | None = None
    try:
        choose(engine, args, builder.layers, backend)
    except Exception as error:  # the forward does not run with what became of its layers
        if not (check and auto) or not builder.layers:
            raise
        proof = prove(builder, reference, args)
        if not proof.put_back:
            raise error
        choose(engine, args, builder.layers, backend)
    if check:
        proof = prove(builder, reference, args, before=proof)
    whole = forms.fastest(reference, args) if auto else None
    forms.finish()
    note = "" if auto else GIVEN
    note = SMALL if builder.small else note
    return replace(builder.report(), whole=whole, proof=proof, note=note)
