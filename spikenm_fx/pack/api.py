# SPDX-License-Identifier: Apache-2.0
"""The verb ``pack``: an inference copy of a model on packed weights and fused neurons."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_map
from spikenm_fx.errors import PackError
from spikenm_fx.masks.attach import masked_weights
from spikenm_fx.pack.builder import EngineBuilder
from spikenm_fx.pack.engine.choose import choose
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.summary import PackReport
from spikenm_fx.pattern import NM, PatternLike

__all__ = ["pack", "packing"]


def pack(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    backend: str | Mapping[str, str] = "auto",
    dtype: torch.dtype | None = None,
    nm: PatternLike | None = None,
) -> nn.Module:
    """An inference copy of ``model`` that runs on packed weights.

    Layers become :class:`~spikenm_fx.pack.engine.layer.PackedLayer`; where a layer drives one
    neuron alone, its batch norm is folded in and layer and neuron run as one kernel over all time
    steps, handing spikes on as bits.  The copy has the class, the call signature and the reset
    protocol of the model, which is left as it is.

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

    Returns:
        The copy, in eval mode; :func:`packing` gives its report.

    Raises:
        PackError: for weights that are not finite or not ``nm``, masks that are not folded, a
            model on another device or packed already, or a backend that does not exist.
    """
    _refuse(model)
    engine = _copy(model)
    args = _arguments(example_inputs)
    builder = EngineBuilder(engine, args, dtype, None if nm is None else NM.parse(nm))
    builder.replace_layers()
    if args is not None:
        builder.fuse()
    choose(engine, args, builder.layers, backend)
    engine.__dict__["_spikenm_packing"] = builder.report()
    if any(layer.packed.waits for layer in builder.layers.values()):  # else nothing is lazy
        engine.register_forward_hook(_plain_outputs)
    return engine


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
    packed = next((n for n, m in model.named_modules() if isinstance(m, PackedLayer)), None)
    if packed is not None:
        raise PackError(f"{packed} is packed already; pack the model that this engine was made of")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise PackError(f"{name} is on {parameter.device}; move the model to the CPU first")


def _plain_outputs(_engine: nn.Module, _args: Any, output: Any) -> Any:
    """What leaves the engine is ordinary tensors."""
    if type(output) is Tensor or torch.compiler.is_compiling():
        return output
    return tree_map(lambda x: x.materialize() if isinstance(x, LazyTensor) else x, output)


def _copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        raise PackError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pack "
            "works on a copy.deepcopy of the model"
        ) from error
    _register(model, copied)
    return copied


def _register(model: nn.Module, copied: nn.Module) -> None:
    """Enter copies where their originals are listed: snnTorch resets the neurons of such a list."""
    for original, twin in zip(model.modules(), copied.modules(), strict=True):
        listed = getattr(type(original), "instances", None)
        if isinstance(listed, list) and any(entry is original for entry in listed):
            listed.append(twin)


def _arguments(example_inputs: Any) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
