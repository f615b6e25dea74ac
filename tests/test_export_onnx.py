# SPDX-License-Identifier: Apache-2.0
"""ONNX files compute what the model computes, step after step, and say what they keep."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from export_nets import NETS, HandLIF, by_hand, folded, jelly_mlp, over_time, snn_conv
from test_export_nir import TABLE
from torch import nn
from typer.testing import CliRunner

import spikenm_fx
from spikenm_fx import Rule, export
from spikenm_fx.cli.app import app
from spikenm_fx.errors import CheckpointError, ExportError, PlanError
from spikenm_fx.export import onnx_export

onnx = pytest.importorskip("onnx")
for package in ("onnxscript", "onnxruntime", "spikingjelly", "snntorch", "norse", "sinabs"):
    pytest.importorskip(package)
pytestmark = [pytest.mark.framework, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def _one_registry():
    """The exporter reads its 500 translations and torch's operators anew in each call."""
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration

    owner = _registration.ONNXRegistry
    made, name = functools.cache(owner.from_torchlib), "_materialize_cpp_cia_ops"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "from_torchlib", staticmethod(made))
        patch.setattr(utils, name, functools.cache(getattr(utils, name)))
        yield


def tensors(value: object) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def states(proto: object) -> dict[str, object]:
    return json.loads({p.key: p.value for p in proto.metadata_props}["spikenm_fx.states"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_row_of_the_table(name: str) -> None:
    """Each model of the table runs in onnxruntime as it does in torch."""
    model, x = NETS[name]()
    if x.dim() in (3, 5) and x.shape[0] == 5:
        x = x[:3]  # steps are unrolled
    assert TABLE[name]["onnx"] == "equal"
    proto = export.onnx(model, x)  # compares
    with torch.no_grad():
        expected = tensors(model(x))[0]
    seen = run(proto, [x])[0][0]
    assert torch.allclose(seen, expected, rtol=1e-4, atol=1e-5)
    assert bool(states(proto)) == ("one step" in name or "2 groups" in name)
    assert not proto.graph.sparse_initializer


def run(proto: object, inputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """In onnxruntime, from the states at rest that the file names."""
    shapes = {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in proto.graph.input
    }
    start = [torch.full(shapes[n], float(v)) for n, v in states(proto).items()]
    return export.run_onnx(proto, inputs, start)


def test_states_go_in_and_come_out() -> None:
    """0, 1, 0, 1 stays that: each step of a single-step model is equal, inputs changing."""
    model = folded(snn_conv())
    inputs = list(torch.rand(5, 3, 4, 8, 8) * torch.rand(5, 1, 1, 1, 1))
    proto = export.onnx(model, inputs[0])
    assert list(states(proto)) == ["state.1.mem", "state.5.mem"]
    names = [value.name for value in proto.graph.output]
    assert names[-2:] == ["new_state.1.mem", "new_state.5.mem"]
    with torch.no_grad():
        own = [tensors(model(x))[0] for x in inputs]
    seen = [out[0] for out in run(proto, inputs)]
    assert all(torch.equal(a, b) for a, b in zip(own, seen, strict=True))
    assert any(not torch.equal(own[0], out) for out in own)  # steps differ: states matter


def test_a_file_runs_in_openvino(tmp_path) -> None:
    """The same file, unchanged; in bfloat16, its choice where a processor has it, spikes differ."""
    openvino = pytest.importorskip("openvino")
    model, x = folded(by_hand(HandLIF)), over_time(16)[:3]
    export.onnx(model, x, file=tmp_path / "model.onnx")
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", exact)
    seen = compiled([x.numpy()])[compiled.output(0)]
    assert np.allclose(seen, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class Turned(nn.Module):
    """Weights in each form that ONNX has for a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2)

    def forward(self, x):
        return self.fc(self.up(self.conv(x)).movedim(1, -1))


@pytest.mark.parametrize("optimize", [False, True])
def test_blocks_are_counted_by_use_not_by_name(tmp_path, optimize: bool) -> None:
    """MatMul's second factor, Gemm's transB, Conv: anybody's file, renamed and transposed."""
    model, x = Turned(), torch.rand(2, 4, 6, 6)
    spikenm_fx.sparsify(model, "2:4", rules=[Rule("re:.*")], method="magnitude")
    spikenm_fx.fold(model.eval())
    file = tmp_path / "foreign.onnx"
    torch.onnx.export(
        model, (x,), str(file), dynamo=True, optimize=optimize, external_data=False, verbose=False
    )
    found = export.verify_onnx(file, "2:4")
    assert found.valid
    assert len(found.layers) == 3
    proto = onnx.load(str(file))
    for initializer in proto.graph.initializer:  # one weight too many in one block
        array = onnx.numpy_helper.to_array(initializer).copy()
        if array.ndim == 2:
            array[:] = 1.0
            initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
    onnx.save(proto, str(file))
    assert not export.verify_onnx(file, "2:4")


def test_files_say_what_they_keep(tmp_path) -> None:
    """Names, axes and patterns stand in the metadata, and the command line counts them."""
    model, x = folded(jelly_mlp("s"), 3.0), torch.rand(3, 16)
    file = tmp_path / "model.onnx"
    proto = export.onnx(model, x, file=file)
    about = {p.key: p.value for p in proto.metadata_props}
    weights = json.loads(about[onnx_export.METADATA])
    assert list(weights) == ["0.weight", "2.weight", "4.weight"]
    assert all(w["pattern"] == "2:4" and w["axis"] == 1 for w in weights.values())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    done = CliRunner().invoke(app, ["verify", str(file)])
    assert done.exit_code == 0, done.output
    assert "valid: 3 weights, a pattern is required of 3" in done.output
    with pytest.raises(PlanError, match="no weight of"):
        export.verify_onnx(file, without=["nothing"])


def test_weights_beyond_one_file(tmp_path, monkeypatch) -> None:
    """What protobuf cannot hold lies beside it, and is counted all the same."""
    monkeypatch.setattr(onnx_export, "_ONE_FILE", 100)
    model, x = folded(by_hand(nn.Identity)), over_time(16)
    export.onnx(model, x, file=tmp_path / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert export.verify_onnx(tmp_path / "model.onnx").valid
    seen = export.run_onnx(tmp_path / "model.onnx", [x])[0][0]
    assert torch.allclose(seen, model(x), rtol=1e-4, atol=1e-5)


# -- refusals -------------------------------------------------------------------------------------


def test_models_that_are_not_ready() -> None:
    """Unfolded, running, in half precision, or of an example that is no tensor."""
    x = over_time(16)
    masked = spikenm_fx.sparsify(jelly_mlp(), rules=[Rule("re:.*")]).eval()
    with pytest.raises(ExportError, match=r"call spikenm_fx.fold\(model\) first"):
        export.onnx(masked, x)
    running = folded(jelly_mlp("s"))
    running(x[0])
    with pytest.raises(ExportError, match="in the middle of a sequence; reset it first"):
        export.onnx(running, x[0])
    with pytest.raises(ExportError, match=r"call model.to\(torch.float32\) first"):
        export.onnx(folded(jelly_mlp()).half(), x)
    with pytest.raises(ExportError, match="fixed batch size and number of steps"):
        export.onnx(folded(jelly_mlp()), {"x": x})


def test_what_no_file_can_carry() -> None:
    """State that is no tensor, and code that torch.export cannot read, by name."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.steps = jelly_mlp("s"), 0

        def forward(self, x):
            self.steps += 1
            return self.body(x * (1 + self.steps % 2))

    with pytest.raises(ExportError, match="keeps 'steps' \\(int\\)"):
        export.onnx(folded(Counts()), torch.rand(3, 16))

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x):
            return self.fc(x) if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match=r"torch.export.export\(model, \(x,\)\)"):
        export.onnx(folded(Branches()), torch.rand(3, 16))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, package: str) -> None:
    """With the command that installs it; nothing is run before."""
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=f"needs the package {package}.*pip install"):
        export.onnx(folded(jelly_mlp()), over_time(16))


def test_files_that_are_no_onnx(tmp_path) -> None:
    """Named, and nothing half-written where the disk refuses."""
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model.onnx: cannot be read as ONNX"):
        export.verify_onnx(tmp_path / "model.onnx")
    with pytest.raises(CheckpointError):
        export.onnx(folded(by_hand(nn.Identity)), over_time(16), file=tmp_path / "no" / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
