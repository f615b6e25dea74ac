# SPDX-License-Identifier: Apache-2.0
"""NIR files are read by the real programs as the model they were made of, spike by spike."""

from __future__ import annotations

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from export_nets import NETS, Loop, by_hand, each_step, folded, jelly_conv, jelly_mlp, over_time
from torch import nn

import spikenm_fx
from spikenm_fx import Rule, export
from spikenm_fx.errors import CheckpointError, ExportError, SpikeNMWarning, VerificationError
from spikenm_fx.export.nir_readers import READERS
from spikenm_fx.export.packages import TESTED
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import find_neurons

nir = pytest.importorskip("nir")
pytestmark = [
    pytest.mark.framework,  # the readers are spikingjelly, snntorch, norse and sinabs
    pytest.mark.filterwarnings("ignore"),
]
for reader in ("spikingjelly", "snntorch", "norse", "sinabs"):
    pytest.importorskip(reader)


def table() -> dict[str, dict[str, str]]:
    """The table of the documentation: row, column, cell."""
    lines = [line for line in inspect.getdoc(export).splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line.startswith("| model"))
    head, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines[start:]]
    rows = [row for row in rows if len(row) == len(head)]
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in rows}


TABLE = table()


def own_outputs(name: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the model's last part emits in each step, by the model alone."""
    heard = []
    neurons = find_neurons(model)
    outer = [n for n, m in model.named_modules() if is_weight_layer(m) and not inside(n, neurons)]
    order = [n for n, _ in model.named_modules() if n in neurons or n in outer]
    last = model.get_submodule(order[-1])
    handle = last.register_forward_hook(lambda _m, _a, out: heard.append(out))
    state = None
    with torch.no_grad():
        for _ in range(len(each_step(name, x)) if "one step" in name or "groups" in name else 1):
            _, state = model(x, state) if name.startswith("Norse conv") else (model(x), None)
    handle.remove()
    outs = [out[0] if isinstance(out, tuple) else out for out in heard]
    return torch.stack(outs) if len(outs) > 1 else each_step(name, outs[0])


def inside(name: str, neurons: dict) -> bool:
    return any(name.startswith(f"{neuron}.") for neuron in neurons)


def test_the_table_holds_all_models_and_readers() -> None:
    """Nothing of the table is untested, and no model is missing in it."""
    assert list(TABLE) == list(NETS)
    assert set(next(iter(TABLE.values()))) == {*READERS, "onnx"}


@pytest.mark.parametrize("name", NETS)
def test_row_of_the_table(name: str, tmp_path) -> None:
    """Equal to the spike in the real reader, from memory and from a file; or refused, as told."""
    model, x = NETS[name]()
    for target in READERS:
        cell = TABLE[name][target]
        if cell != "equal":
            with pytest.raises(ExportError, match=cell):
                export.nir(model, x, target)
            continue
        graph = export.nir(model, x, target, file=tmp_path / f"{target}.nir")
        if target == "file":
            continue
        steps = each_step(name, x)
        expected = own_outputs(name, copy.deepcopy(model), x)
        for given in (graph, tmp_path / f"{target}.nir"):
            found = export.verify_nir(given, target, steps, expected=expected)
            assert found, f"{target}\n{found}"
        assert float(expected.abs().mean()) > 0


def test_a_graph_for_another_reader_is_found_out() -> None:
    """What is right for SpikingJelly is wrong in Norse: no exception there, but an answer here."""
    model, x = folded(jelly_mlp(decay_input=False)), over_time(16)
    graph = export.nir(model, x, "spikingjelly")
    assert export.verify_nir(graph, "spikingjelly", x)
    found = export.verify_nir(graph, "norse", x)  # its gains lie in r, which norse does not read
    assert not found
    assert any(node.first_step is not None and node.different for node in found.nodes)
    with pytest.raises(VerificationError, match="norse computes something else"):
        found.raise_if_different()


def test_thresholds_are_met_alike() -> None:
    """A membrane exactly on its threshold fires where the model's does: >= here, > there."""
    from spikingjelly.activation_based import neuron

    net = nn.Sequential(nn.Linear(4, 4, bias=False), neuron.IFNode(step_mode="m"))
    net[0].weight.data = torch.eye(4) * (torch.arange(4)[:, None] != 3) * 0.5
    x = torch.ones(4, 1, 4)  # 0.5 and 0.5 are 1.0, in every second step
    for target in ("spikingjelly", "snntorch", "norse"):
        graph = export.nir(net, x, target)
        found = export.verify_nir(graph, target, x, expected=net(x).detach())
        net[1].reset()
        assert found, found


def test_patterns_and_axes_survive_the_file(tmp_path) -> None:
    """Each layer's node says what it keeps and where; zeros stay zeros."""
    model, x = folded(jelly_conv()), over_time(4, 8, 8)
    export.nir(model, x, "spikingjelly", file=tmp_path / "model.nir")
    graph = nir.read(str(tmp_path / "model.nir"), type_check=False)
    weights = {n: node for n, node in graph.nodes.items() if hasattr(node, "weight")}
    assert sorted(weights) == ["0", "4", "7"]
    for node in weights.values():
        assert str(node.metadata["pattern"]) == "2:4"
        assert int(node.metadata["pattern_axis"]) == 1
        state = {"layer.weight": torch.from_numpy(node.weight)}
        assert spikenm_fx.verify(state, {"layer": "2:4"})
        assert node.weight.dtype == np.float32
    assert np.count_nonzero(weights["4"].weight) == int((model[4].weight != 0).sum())


def test_what_the_model_does_beside_its_steps_is_told() -> None:
    """The mean over time is no node: a warning and the metadata say so."""
    model, x = NETS["SpikingJelly residual"]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = export.nir(model, x)
    told = [str(w.message) for w in caught if w.category is SpikeNMWarning]
    assert any("mean over all steps" in text for text in told)
    assert "mean over all steps" in graph.metadata["spikenm_fx.notes"]


class Last(Loop):
    def forward(self, x):
        return super().forward(x)[-1]


def test_the_last_step_alone_is_told() -> None:
    """A model that returns its last step has a graph of all steps, and a note."""
    with pytest.warns(SpikeNMWarning, match="left to the caller"):
        export.nir(folded(Last(reset_mechanism="zero")), over_time(16))


@pytest.mark.parametrize("name", ["spikingjelly", "norse"])
def test_imported_models_are_planned(name: str) -> None:
    """A NIR file becomes sparse by what a reader makes of it."""
    model, x = folded(jelly_mlp()), over_time(16)
    graph = export.nir(model, x, name)
    if name == "spikingjelly":
        from spikingjelly.activation_based.nir_exchange import import_from_nir

        imported = import_from_nir(graph)
    else:
        import norse.torch as norse

        imported = norse.from_nir(graph, dt=1e-4)
    decided = spikenm_fx.plan(imported, "2:4", rules=[Rule("re:.*")])
    assert [entry.shape for entry in decided.sparse] == [(32, 16), (16, 32), (8, 16)]
    assert spikenm_fx.verify(imported, decided)


# -- refusals -------------------------------------------------------------------------------------


def refused(model: nn.Module, x: object, words: str, **options: object) -> None:
    """One error with these words; model and files as they were."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ExportError, match=words):
        export.nir(model, x, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_models_that_are_not_ready() -> None:
    """Unfolded, in the middle of a sequence, half precision, not finite: what to do about it."""
    x = over_time(16)
    masked = spikenm_fx.sparsify(jelly_mlp(), rules=[Rule("re:.*")]).eval()
    refused(masked, x, r"call spikenm_fx.fold\(model\) first")
    running = folded(jelly_mlp())
    running(x)
    refused(running, x, r"middle of a sequence; reset it first")
    refused(folded(jelly_mlp()).half(), x, r"is float16.*call model.to\(torch.float32\)")
    broken = folded(jelly_mlp())
    broken[0].bias.data[0] = float("inf")
    refused(broken, x, "holds NaN or infinity")
    with pytest.raises(ExportError, match="needs an nn"):
        export.nir("model", x)
    engine = spikenm_fx.pack(folded(jelly_mlp()), x)
    with pytest.raises(ExportError, match="is packed; export the folded model"):
        export.nir(engine, x)


@pytest.mark.parametrize("x", [None, (4, 3, 16), torch.ones(4, 3, 16, dtype=torch.int64)])
def test_examples_that_are_no_tensor_of_one_shape(x: object) -> None:
    """Dynamic batch or T, shapes and integers: a float32 tensor of fixed shape is asked for."""
    refused(folded(jelly_mlp()), x, "fixed batch|float32")


def test_unknown_targets_name_the_known() -> None:
    """A slip of the pen is corrected."""
    refused(folded(jelly_mlp()), over_time(16), "did you mean 'snntorch'", target="snntroch")


def test_names_that_collide() -> None:
    """Readers turn dots into underscores, which would lose one of two layers."""
    net = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(16, 16)}), "a_b": nn.Linear(16, 8)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net["a_b"](self.net["a"]["b"](x))

    refused(folded(Both()), torch.rand(3, 16), "'net.a.b' and 'net.a_b' collide")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s + 1.0, r"a constant \(1.0\) is added"),
        (lambda s: s + s, "doubled branch"),
        (lambda s: s * 0.5, "no product"),
        (lambda s: torch.cat([s, s], -1), "cannot concatenate"),
        (lambda s: torch.relu(s), "no ReLU"),
    ],
)
def test_what_nir_cannot_say(change, words: str) -> None:
    """Constants, doubled branches, products: by name, none is dropped."""

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = jelly_mlp(), nn.LazyLinear(4)

        def forward(self, x):
            return self.head(change(self.body(x)))

    model = Changed()
    model(over_time(16))
    spikingjelly_reset(model)
    refused(folded(model), over_time(16), words)


def spikingjelly_reset(model: nn.Module) -> None:
    from spikingjelly.activation_based import functional

    functional.reset_net(model)


def test_layers_that_nir_has_not() -> None:
    """A transposed convolution and circular padding are refused by the layer's name and shape."""
    up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2))
    refused(folded(up), torch.rand(1, 4, 4, 4), r"0 \(ConvTranspose2d\) \(4, 4, 2, 2\)")
    ring = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    refused(folded(ring), torch.rand(1, 4, 4, 4), "pads by 'circular'")
    norm = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    refused(folded(norm), torch.rand(3, 16), "no batch norm")


def test_a_missing_package_is_named(monkeypatch) -> None:
    """With the command that installs it."""
    import sys

    monkeypatch.setitem(sys.modules, "nir", None)
    refused(folded(jelly_mlp()), over_time(16), r'nir, which is not installed: pip install "spike')


def test_other_versions_are_told(monkeypatch) -> None:
    """A reader that was never measured is no proof, unless one insists."""
    model, x = folded(jelly_mlp()), over_time(16)
    graph = export.nir(model, x, "spikingjelly")
    changed = {**TESTED, "spikingjelly": "1.0"}
    monkeypatch.setattr("spikenm_fx.export.packages.TESTED", changed)
    with pytest.raises(ExportError, match=r"spikingjelly 2.0.0 is installed.*spikingjelly==1.0"):
        export.verify_nir(graph, "spikingjelly", x)
    assert export.verify_nir(graph, "spikingjelly", x, any_version=True)


def test_nothing_half_written(tmp_path, monkeypatch) -> None:
    """Where writing fails the older file stays, and no other is there."""
    file = tmp_path / "model.nir"
    file.write_bytes(b"older")

    def full(path, graph):
        with open(path, "wb") as out:
            out.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(nir, "write", full)
    with pytest.raises(CheckpointError, match="no space left"):
        export.nir(folded(jelly_mlp()), over_time(16), file=file)
    assert file.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_are_no_nir(tmp_path) -> None:
    """Named, with the reader's own words."""
    (tmp_path / "model.nir").write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError, match="cannot be read as NIR"):
        export.verify_nir(tmp_path / "model.nir", "norse", over_time(16))


def test_state_between_calls_that_no_neuron_holds() -> None:
    """A model that remembers beside its neurons differs from its graph: refused, not exported."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.count = jelly_mlp("s"), 0.0

        def forward(self, x):
            self.count += 0.1
            return self.body(x * (1.0 + self.count))

    with pytest.raises(ExportError):
        export.nir(folded(Remembers()), torch.rand(3, 16))


def test_the_example_model_of_the_readme_needs_its_rule() -> None:
    """A neuron that nobody told the rule of is refused by how to tell it."""
    from export_nets import HandLIF

    refused(folded(by_hand(HandLIF)), over_time(16), "register_neuron")
