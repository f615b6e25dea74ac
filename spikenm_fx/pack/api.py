# SPDX-License-Identifier: Apache-2.0
"""The verb ``pack``: an inference copy of a model on packed weights and fused neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spikenm_fx.errors import PackError
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.pack.builder import EngineBuilder
from spikenm_fx.pack.check.proof import prove
from spikenm_fx.pack.copying import copy_at_rest, own_memory, shared_weights, unregister
from spikenm_fx.pack.engine.choose import choose
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.forms import Forms
from spikenm_fx.pack.summary import PackReport, Proof
from spikenm_fx.pattern import NM, PatternLike, quantised_weights
from spikenm_fx.state import preserved_records
from spikenm_fx.state.guard import Watched, watching

__all__ = ["pack", "packing"]

NO_EXAMPLES = (
    "No example inputs were given: nothing was measured, fused or compared, and every layer runs "
    "dense; call pack(model, example_inputs)."
)


def pack(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    backend: str | Mapping[str, str] = "auto",
    dtype: torch.dtype | None = None,
    nm: PatternLike | None = None,
    check: bool = True,
    program: bool = False,
) -> nn.Module:
    """An inference copy of ``model`` that runs on packed weights.

    Layers become :class:`~spikenm_fx.pack.engine.layer.PackedLayer`; where a layer drives one
    neuron alone, its batch norm is folded in and layer and neuron run as one kernel over all time
    steps, handing spikes on as bits.  The copy has the class, the call signature and the reset
    protocol of the model, which is left as it is.

    **It is compared with the model** on the examples before it is returned, layer by layer on the
    same spikes (see :mod:`spikenm_fx.pack.check.proof`).  What differs beyond rounding and ties is
    put back to the model's own, with a :class:`~spikenm_fx.errors.SpikeNMWarning` that names it.
    That costs one forward of each of the two where nothing differs, at most
    :data:`~spikenm_fx.pack.check.proof.ROUNDS` of each; their activations are kept meanwhile.
    Where ``dtype`` rounds weights, the model is compared with the same rounded weights.
    ``packing(engine).proof`` says what it took.

    **It is not slower than the model**: with ``backend="auto"`` the whole forward of the model and
    of the engine's forms (fused; with neurons as they were; all torch's) take turns on the
    examples, and the fastest form is returned; ``packing(engine).verdict`` says what it gains, or
    to keep the model.  Without examples nothing is measured, fused or compared.

    The copy starts at rest: its neurons are reset, and state that hangs on an autograd graph is
    detached.

    The engine itself cannot be pickled where its neurons are fused (``torch.save(engine)`` fails).
    Store the weights: :func:`~spikenm_fx.pack.weights.files.save_packed` with the ``packed`` of
    each packed layer, or the state dict, which loads into an engine packed alike.

    Args:
        model: on the CPU, folded (see :func:`spikenm_fx.fold`).
        example_inputs: a tensor or a tuple of arguments; needed to fuse and to measure.  Spikes of
            typical inputs make the measured choice right for typical inputs.
        backend: ``"auto"`` times every candidate of each layer on the examples and keeps the
            fastest, dense torch being one of them; ``"dense"``, ``"reference"``, ``"fma"``,
            ``"lut"``, ``"event"`` or ``"event8"`` force one wherever it is possible; a mapping
            from layer names (``report.choices``) forces each layer's.
        dtype: stored values: None keeps fp32; ``torch.int8``, ``float16`` and ``bfloat16`` round.
        nm: refuse layers that the model sparsified to another pattern: each layer that is not
            entirely dense must be ``nm``.
        check: compare the engine with the model on the examples.
        program: lower the whole network to one native program, an
            :class:`~spikenm_fx.program.engine.Engine` with ``step``, ``reset`` and ``save``, which
            keeps its states itself and is no longer of the model's class; ``backend`` does not
            matter then.  Where a part has no operation (see :mod:`spikenm_fx.program`), the engine
            is the one without ``program``, and a warning and the report's note say which and why.

    Returns:
        The copy, in eval mode, or the program; :func:`packing` gives its report.

    Raises:
        PackError: for weights that are not finite, not ``nm`` or quantised, unfolded masks, a
            model on another device or packed already, or a backend that does not exist.
    """
    _refuse(model)
    args = _arguments(example_inputs)
    why = ""
    if program:
        from spikenm_fx.pack.programs import program_of, without_program

        pattern = None if nm is None else NM.parse(nm)
        made, why = program_of(model, args, dtype=dtype, nm=pattern, check=check)
        if made is not None:
            return made
    engine = copy_at_rest(model, share=True)
    with preserved_records(model, engine):
        report = _build(model, engine, args, backend, dtype, nm, check=check)
    own_memory(engine, model)
    engine.__dict__["_spikenm_packing"] = without_program(report, why) if why else report
    return engine


def _build(
    model: nn.Module,
    engine: nn.Module,
    args: tuple[Any, ...] | None,
    backend: str | Mapping[str, str],
    dtype: torch.dtype | None,
    nm: PatternLike | None,
    *,
    check: bool,
) -> PackReport:
    shared = [Watched(weight) for weight in shared_weights(engine, model)]
    with watching(shared):
        builder = EngineBuilder(engine, args, dtype, None if nm is None else NM.parse(nm))
    share = not any(weight.written for weight in shared)
    if not share:  # its forward writes into its weights, which must not be those of the model
        own_memory(engine, model)
    builder.replace_layers()
    if args is None:
        choose(engine, None, builder.layers, backend)
        return replace(builder.report(), note=NO_EXAMPLES)
    builder.fuse()
    builder.put_back_unmultiplied()
    reference = copy_at_rest(model, share=share)
    try:
        if dtype is not None:
            builder.round_alike(reference)
        return _settle(builder, reference, args, backend, check=check)
    finally:
        unregister(reference)


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
    note = "" if auto else "The backend was given, so that the whole forward was not timed."
    return replace(builder.report(), whole=whole, proof=proof, note=note)


def packing(engine: nn.Module) -> PackReport:
    """The report of an engine that :func:`pack` made.

    Raises:
        PackError: for any other module.
    """
    report = engine.__dict__.get("_spikenm_packing")
    if not isinstance(report, PackReport):
        raise PackError(f"this {type(engine).__name__} was not made by pack()")
    return report


def _refuse(model: nn.Module) -> None:
    masked = [name for name, _, _ in masked_weights(model)]
    if masked:
        raise PackError(
            f"{masked[0]} and {len(masked) - 1} more layers still carry their masks; "
            "call spikenm_fx.fold(model) first"
        )
    quantised = quantised_weights(model)
    if quantised:
        raise PackError(
            f"{quantised[0]} and {len(quantised) - 1} more hold quantised weights, which are no "
            "N:M floats to pack; pack the folded model before torch quantises it, with "
            "dtype=torch.int8 for weights of 8 bits"
        )
    packed = next((n for n, m in model.named_modules() if isinstance(m, PackedLayer)), None)
    if packed is not None:
        raise PackError(f"{packed} is packed already; pack the model that this engine was made of")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise PackError(f"{name} is on {parameter.device}; move the model to the CPU first")


def _arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
