# SPDX-License-Identifier: Apache-2.0
"""Run an ONNX model step by step in onnxruntime, handing its states on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikenm_fx.errors import ExportError
from spikenm_fx.export.packages import needed

__all__ = ["run_onnx"]


def run_onnx(
    model: Any, inputs: Sequence[Tensor], states: Sequence[Tensor] = ()
) -> list[list[Tensor]]:
    """The outputs of each step, without the states.

    Args:
        model: an ``onnx.ModelProto`` or a path.
        inputs: of each step, ``[N, ...]``; of a model over all steps one, ``[T, N, ...]``.
        states: before the first step, in the order of the inputs; the last outputs are the new
            ones.

    Raises:
        ExportError: if onnxruntime is missing or refuses the model.
    """
    runtime = needed("onnxruntime", "running ONNX")
    given = str(model) if isinstance(model, str | Path) else model.SerializeToString()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime refuses the model: {error}") from error
    names = [value.name for value in session.get_inputs()]
    outs = []
    count = len(states)
    now = [state.numpy() for state in states]
    for x in inputs:
        feed = dict(zip(names, [x.numpy(), *now], strict=True))
        found = session.run(None, feed)
        now = found[len(found) - count :] if count else []
        outs.append([torch.from_numpy(value.copy()) for value in found[: len(found) - count]])
    return outs
