# SPDX-License-Identifier: Apache-2.0
"""The verb ``pack``: an inference copy of a model on packed weights and fused neurons."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from spikenm_fx.errors import PackError
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.pack.summary import PackReport
from spikenm_fx.pattern import NM, PatternLike, quantised_weights

__all__ = ["pack", "packing"]


def pack(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    backend: str | Mapping[str, str] = "auto",
    dtype: torch.dtype | None = None,
    nm: PatternLike | None = None,
    check: bool = True,
    program: bool | Literal["auto"] = False,
    memory: Literal["fast", "small"] = "fast",
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
    of the engine's forms (fused; with neurons as they were) take turns on the examples, and the
    fastest form is returned, if it gains in a second measurement as well.  Where none gains, layers
    that save little become the model's own again, by halves; in the end the copy has nothing of
    this library in its forward, which then costs what the model's costs.
    ``packing(engine).verdict`` says what is gained, or to keep the model.  What was asked for is
    not undone: a ``backend``, ``memory="small"`` and a ``dtype`` may cost time, and the report says
    so.  Without examples nothing is measured, fused or compared.

    The copy starts at rest: its neurons are reset, and state that hangs on an autograd graph is
    detached.

    The engine itself cannot be pickled where its neurons are fused (``torch.save(engine)`` fails).
    Store the weights: :func:`~spikenm_fx.pack.weights.files.save_packed` with the ``packed`` of
    each packed layer, or the state dict, which loads into an engine packed alike.

    Args:
        model: on the CPU, folded (see :func:`spikenm_fx.fold`).
        example_inputs: a tensor, a tuple of arguments, or a mapping from their names; needed to
            fuse and to measure.  Spikes of typical inputs make the
            measured choice right for them.
        backend: ``"auto"`` times every candidate of each layer on the examples and keeps the
            fastest, dense torch being one of them; ``"dense"``, ``"reference"``, ``"fma"``,
            ``"lut"``, ``"event"`` or ``"event8"`` force one wherever it is possible; a mapping
            from layer names (``report.choices``) forces each layer's; ``"torch"`` in it leaves a
            layer the model's own.
        dtype: stored values: None keeps fp32; ``torch.int8``, ``float16`` and ``bfloat16`` round.
        nm: refuse layers that the model sparsified to another pattern: each layer that is not
            entirely dense must be ``nm``.
        check: compare the engine with the model on the examples.
        program: ``True`` lowers the whole network to one native program, an
            :class:`~spikenm_fx.program.engine.Engine` with ``step``, ``reset`` and ``save``, which
            keeps its states itself; ``backend`` does not matter then.  It is no instance of the
            model's class, has none of its attributes, and the framework's own reset does not reach
            it: that is why it is not the default.  Where a part has no operation (see
            :mod:`spikenm_fx.program`), the engine is the one without ``program`` in which the
            largest parts that have one are programs
            (:class:`~spikenm_fx.program.part.ProgramPart`); a warning and the report's ``parts``
            say which, why, and what each costs.  ``"auto"`` makes both where it can, and returns
            whichever gains more on the examples, without a warning.
        memory: ``"small"`` keeps packed layers in memory as they are stored, at 2:4 in 0.53 of the
            dense fp32 weights and 0.16 with ``dtype=torch.int8``, and runs them from that, slower;
            ``"fast"`` keeps layouts beside the stored weights, which the report gives in bytes.

    Returns:
        The copy, in eval mode, or the program; :func:`packing` gives its report.

    Raises:
        PackError: for weights that are not finite, not ``nm`` or quantised, unfolded masks, a
            model on another device or packed already, or a backend or memory that does not exist.
    """
    if memory not in ("fast", "small"):
        raise PackError(f"memory={memory!r}; known are 'fast' and 'small'")
    if memory == "small" and backend not in ("auto", "fma"):
        raise PackError(
            f"memory='small' runs packed layers as 'fma', from what is stored, and backend is "
            f"{backend!r}; leave one of the two out"
        )
    _refuse(model)
    args = _arguments(model, example_inputs)
    pattern = None if nm is None else NM.parse(nm)
    if program is True or (program == "auto" and args is not None and backend == "auto"):
        from spikenm_fx.pack.chosen import with_program

        auto = program == "auto"
        return with_program(
            *(model, args, backend, dtype, pattern), check=check, auto=auto, memory=memory
        )
    # what runs without a program need not be imported where there is one
    from spikenm_fx.pack.copied import packed_copy

    return packed_copy(model, args, backend, dtype, pattern, check=check, memory=memory)


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
    known = sys.modules.get("spikenm_fx.pack.engine.layer")  # else nobody has packed anything
    packed = next(
        (n for n, m in model.named_modules() if known and isinstance(m, known.PackedLayer)), None
    )
    if packed is not None:
        raise PackError(f"{packed} is packed already; pack the model that this engine was made of")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise PackError(f"{name} is on {parameter.device}; move the model to the CPU first")


def _arguments(model: nn.Module, example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Mapping):
        try:
            bound = inspect.signature(model.forward).bind(**example_inputs)
        except TypeError as error:
            raise PackError(f"the model's forward takes no such inputs: {error}") from error
        if bound.kwargs:
            raise PackError(
                f"the model's forward takes {', '.join(bound.kwargs)} by keyword alone; let it "
                "take all of its inputs by their place as well"
            )
        return bound.args
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
