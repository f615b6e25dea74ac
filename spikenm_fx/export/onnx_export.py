# SPDX-License-Identifier: Apache-2.0
"""The verb ``export.onnx``: a folded model in one file, its states as inputs and outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import tree_flatten
from spikenm_fx.checkpoint import write_atomically
from spikenm_fx.errors import ExportError, TraceError, some_of
from spikenm_fx.export.onnx_run import run_onnx
from spikenm_fx.export.packages import needed, quiet
from spikenm_fx.export.ready import arguments, at_rest, refuse_unready
from spikenm_fx.export.states import Stepwise, stepwise
from spikenm_fx.state import reset_to_rest
from spikenm_fx.trace import trace
from spikenm_fx.verify import verify

__all__ = ["METADATA", "onnx"]

METADATA = "spikenm_fx.weights"
"""Key of the file's metadata: the weights' names, patterns and axes, as JSON."""

STEPS = 4
"""How many steps of a single-step model are compared."""

_ONE_FILE = 2**31 - 2**20  # protobuf ends at 2 GiB


def onnx(model: nn.Module, x: Tensor, *, file: str | Path | None = None, check: bool = True) -> Any:
    """``model`` as an ONNX model of fixed shapes.

    A model over all steps (``[T, N, ...]``) is unrolled and starts from rest in each call.  A model
    that takes one step a call gets the state of each neuron as a further input and output, named
    ``state.NAME`` and ``new_state.NAME``: hand in what the call before gave, at first the values of
    the metadata ``spikenm_fx.states`` (``{name: value}``).

    Weights keep their names and axes; the metadata :data:`METADATA` names those that are N:M.  No
    ``sparse_initializer`` is written: it takes 1.5 times the room at 2:4, runs no faster, and
    OpenVINO does not read it.

    Run the file in float32: rounded, a membrane crosses its threshold at another step.  OpenVINO
    rounds to bfloat16 wherever the processor can, unless compiled with
    ``{"INFERENCE_PRECISION_HINT": "f32"}``.

    Args:
        model: folded, at rest, in float32; it is not changed.
        x: an example input of the shape that the file will take.
        file: also write it there, completely or not at all; beyond 2 GB the weights go to
            ``FILE.data``.
        check: run it in onnxruntime and hold it against the model, over several steps.

    Returns:
        An ``onnx.ModelProto``.

    Raises:
        ExportError: for a model that is not folded, not at rest or not float32, that cannot be
            exported, or whose outputs differ; where a package is missing.
        CheckpointError: if ``file`` cannot be written.
    """
    needed("onnx", "export.onnx")
    needed("onnxscript", "export.onnx")
    if check:
        needed("onnxruntime", "export.onnx with check=True")
    refuse_unready(model, "export.onnx", dtypes=(torch.float32,))
    x = arguments(x, "export.onnx")
    copied = at_rest(model, "export.onnx")
    patterns = _patterns(copied)
    steps = stepwise(copied, x, single=_single_step(copied, x))
    proto = _exported(steps, x)
    _rename(proto)
    _name_states(proto, steps)
    _annotate(proto, patterns, steps)
    if check:
        _hold_against(at_rest(model, "export.onnx"), x, proto, steps)
    if file is not None:
        _write(proto, Path(file))
    return proto


def _single_step(model: nn.Module, x: Tensor) -> bool:
    """Whether one call is one step: a neuron without time axis is called once."""
    try:
        graph = trace(model, x)
    except TraceError as error:
        raise ExportError(f"export.onnx: {error}") from error
    return any(n.spec.time_axis is None and n.calls <= 1 for n in graph.neurons.values())


def _exported(steps: Stepwise, x: Tensor) -> Any:
    with quiet():
        try:
            program = torch.onnx.export(
                steps,
                (x, *steps.initial),
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=False,
            )
        except Exception as error:
            told = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
            raise ExportError(
                f"export.onnx: torch cannot export {type(steps.net).__name__} "
                f"({type(error).__name__}: {' '.join(told)[:300]}); its forward must run under "
                "torch.export.export(model, (x,))"
            ) from error
    assert program is not None
    return program.model_proto


def _rename(proto: Any) -> None:
    """Take the wrapper's prefix off the names of the weights."""
    taken = {i.name for i in proto.graph.initializer}
    names = {n: n.removeprefix("net.") for n in taken if n.startswith("net.")}
    names = {old: new for old, new in names.items() if new not in taken}
    for initializer in proto.graph.initializer:
        initializer.name = names.get(initializer.name, initializer.name)
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for value in proto.graph.value_info:
        value.name = names.get(value.name, value.name)


def _name_states(proto: Any, steps: Stepwise) -> None:
    """``state.NAME`` goes in, ``new_state.NAME`` comes out."""
    helper = needed("onnx", "export.onnx").helper
    graph = proto.graph
    names = {}
    for value, name in zip(graph.input[1:], steps.names, strict=True):
        names[value.name] = value.name = f"state.{name}"
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
    for value, name in zip(graph.output[steps.outputs :], steps.names, strict=True):
        source = names.get(value.name, value.name)  # it may be an output or an input as well
        value.name = f"new_state.{name}"
        graph.node.append(helper.make_node("Identity", [source], [value.name]))


def _patterns(model: nn.Module) -> dict[str, dict[str, Any]]:
    found = {}
    for layer in verify(model).layers:
        if layer.found:
            module = model.get_submodule(layer.name)
            axis = 0 if getattr(module, "transposed", False) else 1
            entry = {"layer": layer.name, "pattern": str(layer.found), "axis": axis}
            found[f"{layer.name}.weight".lstrip(".")] = entry
    return found


def _annotate(proto: Any, patterns: dict[str, Any], steps: Stepwise) -> None:
    names = {i.name for i in proto.graph.initializer}
    lost = [name for name in patterns if name not in names]
    if lost:
        raise ExportError(
            f"export.onnx: the exporter wrote no weights named {some_of(lost)}; a weight that is "
            "computed or shared has no name in the file: make it a parameter of its own"
        )
    about = {METADATA: json.dumps(patterns), "spikenm_fx.pattern": "n:m keeps at most n of m"}
    start = {f"state.{n}": _start(v) for n, v in zip(steps.names, steps.initial, strict=True)}
    about["spikenm_fx.states"] = json.dumps(start)
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value


def _start(initial: Tensor) -> Any:
    """One number where all are the same."""
    flat = initial.flatten()
    return float(flat[0]) if bool((flat == flat[0]).all()) else initial.tolist()


def _hold_against(model: nn.Module, x: Tensor, proto: Any, steps: Stepwise) -> None:
    reset_to_rest(model)
    with torch.no_grad():
        wanted = _own_steps(model, x, STEPS if steps.names else 1, steps)
    seen = run_onnx(proto, [x] * len(wanted), steps.initial)
    for step, (ours, theirs) in enumerate(zip(wanted, seen, strict=True)):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            scale = max(1.0, float(a.abs().max())) if a.numel() else 1.0
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale):
                raise ExportError(
                    f"export.onnx: output {number} of step {step} differs between the model and "
                    f"onnxruntime ({_largest(a, b)}): the file would not be the same network. "
                    "Either a membrane lies on its threshold within rounding (then another example "
                    "is equal), or the model keeps something between steps that no tensor shows"
                )


def _largest(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    return f"up to {float((a.double() - b.double()).abs().max()):.3g}"


def _own_steps(model: nn.Module, x: Tensor, count: int, steps: Stepwise) -> list[list[Tensor]]:
    """The model's own outputs of each step."""
    outs: list[list[Tensor]] = []
    state = None
    for _ in range(count):
        if steps.carried is not None:
            out, state = model(x.clone(), state)
        else:
            out = model(x.clone())
        outs.append([t.detach().clone() for t in tree_flatten(out)[0] if isinstance(t, Tensor)])
    return outs


def _write(proto: Any, file: Path) -> None:
    package = needed("onnx", "export.onnx")
    if proto.ByteSize() <= _ONE_FILE:
        write_atomically(file, lambda part: part.write_bytes(proto.SerializeToString()))
        return
    beside = file.with_name(file.name + ".data")
    whole = _external(package, proto, beside.name)
    write_atomically(beside, lambda part: part.write_bytes(b"".join(whole)))
    write_atomically(file, lambda part: part.write_bytes(proto.SerializeToString()))


def _external(package: Any, proto: Any, location: str) -> Sequence[bytes]:
    """Move the weights' bytes out of the model; what is written beside it."""
    chunks, offset = [], 0
    for tensor in proto.graph.initializer:
        data = tensor.raw_data
        if len(data) < 1024:
            continue
        package.external_data_helper.set_external_data(
            tensor, location=location, offset=offset, length=len(data)
        )
        tensor.ClearField("raw_data")
        tensor.data_location = package.TensorProto.EXTERNAL
        chunks.append(data)
        offset += len(data)
    return chunks
