# SPDX-License-Identifier: Apache-2.0
"""The engine: whole networks of each framework against the folded model, fused and not."""

import copy
import functools
import math
from typing import get_args

import pytest
import torch
from few_rounds import few_rounds
from hypothesis import given
from hypothesis import strategies as st
from pack_strategies import prune
from profiles import tries
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from zoo_cases import build

from spikenm_fx import sparsify
from spikenm_fx.bench.zoo import Case
from spikenm_fx.errors import PackError
from spikenm_fx.native.library import available_kernels
from spikenm_fx.pack import PackedLayer, load_packed, native_status, pack, packing, save_packed
from spikenm_fx.pack.engine.fused import FusedNeuron, fuse_neuron, why_not_fused
from spikenm_fx.pack.engine.layer import Choice
from spikenm_fx.pack.engine.lazy import LazyTensor, SpikeBits
from spikenm_fx.pattern import NM
from spikenm_fx.trace import NeuronSpec, Synapse, simulate

pytestmark = pytest.mark.usefixtures("few_rounds")
__all__ = ["few_rounds"]

native = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")

# Every framework, both step modes, functional and hidden state; those whose spikes reach the end.
NETWORKS = [
    "spikingjelly/sew_resnet18/s",
    "spikingjelly/sew_resnet18_and/m",
    "spikingjelly/sdt/m",
    "snntorch/loop",
    "snntorch/sequential",
    "snntorch/conv",
    "snntorch/synaptic",
    "norse/loop",
    "norse/lift",
    "sinabs/squeeze",
    "braincog/resnet18/s",
    "hand/module",
    "hand/functional",
]


def _case(name: str, nm: str = "2:4") -> Case:
    case = build(name)
    for module in case.model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            module.weight.data = prune(module.weight.data, NM.parse(nm))
    return case


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        flat = tree_flatten(model(*inputs))[0]
    values = [t.materialize() if isinstance(t, LazyTensor) else t for t in flat]
    return [t.clone().float() for t in values if isinstance(t, Tensor)]


def _spikes(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The spikes of every neuron, by name, of the last step."""
    found: dict[str, Tensor] = {}

    def keep(name):
        def hook(_module, _args, out):
            out = out[0] if isinstance(out, tuple) else out
            value = out.materialize() if isinstance(out, LazyTensor) else out
            found[name] = value.detach().clone()

        return hook

    hooks = [
        m.register_forward_hook(keep(n))
        for n, m in model.named_modules()
        if isinstance(m, FusedNeuron)
    ]
    _outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


@functools.cache
def _case_and_outputs(name: str) -> tuple[Case, list[Tensor]]:
    """A network, and what it gives in two calls, reset, and a third one; packing leaves it so."""
    case = _case(name)
    case.reset(case.model)
    expected = _outputs(case.model, case.inputs) + _outputs(case.model, case.inputs)
    case.reset(case.model)
    expected += _outputs(case.model, case.inputs)
    case.reset(case.model)
    return case, expected


@pytest.mark.parametrize("backend", ["dense", "event"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_they_did(name, backend):
    """Outputs equal the model's, also in a second call that goes on from the state, and reset."""
    case, expected = _case_and_outputs(name)
    assert any(bool((t != 0).any()) for t in expected), "the network is silent: nothing is tested"
    engine = pack(case.model, case.inputs, backend=backend)
    case.reset(engine)
    seen = _outputs(engine, case.inputs) + _outputs(engine, case.inputs)
    case.reset(engine)
    seen += _outputs(engine, case.inputs)
    assert len(seen) == len(expected)
    for a, b in zip(seen, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


@native
def test_spikes_of_a_deep_network_agree():
    """At most one spike in ten thousand differs from the folded model, layer by layer."""
    case = _case("spikingjelly/sew_resnet18/m")
    engine = pack(case.model, case.inputs, backend="event")
    dense = pack(case.model, case.inputs, backend="dense")
    case.reset(engine)
    case.reset(dense)
    fused, plain = _spikes(engine, case.inputs), _spikes(dense, case.inputs)
    assert len(fused) >= 9
    assert fused.keys() == plain.keys()
    wrong = sum(int((fused[n] != plain[n]).sum()) for n in fused)
    total = sum(t.numel() for t in fused.values())
    assert sum(int(t.sum()) for t in fused.values()) > 0.01 * total
    assert wrong < 1e-4 * total


@native
@pytest.mark.parametrize("kernel", available_kernels())
def test_small_net_every_kernel(kernel):
    """Conv, norm, neuron, pool, linear: fused in one kernel, spikes on as bits, for each kernel."""
    model, x = _jelly_net()
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    expected = _outputs(model, (x,))
    functional.reset_net(model)
    dtype = torch.int8 if kernel.endswith("8") else None
    engine = pack(model, x, backend=kernel, dtype=dtype)
    assert all(row.neuron for row in packing(engine).layers)
    if dtype is not None:  # quantised: compare with the dequantised dense layers
        dense = pack(model, x, backend="dense", dtype=dtype)
        expected = _outputs(dense, (x,))
    assert float(expected[0].mean()) > 0.01
    assert torch.equal(_outputs(engine, (x,))[0], expected[0])


def _jelly_net(steps: int = 4) -> tuple[nn.Module, Tensor]:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(8, 24, 3, padding=1, bias=False, step_mode="m"),
        layer.BatchNorm2d(24, step_mode="m"),
        neuron.LIFNode(tau=1.5, step_mode="m"),
        layer.MaxPool2d(2, step_mode="m"),
        layer.Conv2d(24, 40, 3, stride=2, padding=1, step_mode="m"),
        neuron.ParametricLIFNode(v_reset=None, step_mode="m"),
        layer.Flatten(step_mode="m"),
        layer.Linear(40 * 4, 72, step_mode="m"),
        neuron.IFNode(v_threshold=0.6, step_mode="m"),
    ).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = prune(module.weight.data * 3, NM(2, 4))
    net[1].running_var.fill_(0.7)
    net[1].bias.data.fill_(0.3)
    x = (torch.rand(steps, 3, 8, 8, 8) < 0.3).float()
    return net, x


@native
def test_spikes_travel_as_bits():
    """Between fused layers, max-pooling included, no fp32 spikes are made."""
    model, x = _jelly_net()
    engine = pack(model, x, backend="event")
    seen = []
    for index in (2, 3, 5):
        engine[index].register_forward_hook(lambda _m, _a, out: seen.append(out))
    _outputs(engine, (x,))
    assert [type(s) for s in seen] == [LazyTensor] * 3
    assert all(isinstance(s.source, SpikeBits) for s in seen)
    assert seen[0].source._dense is None
    assert seen[1].source._dense is None


@native
@given(
    shape=st.sampled_from([(5, 3, 24, 5, 7), (1, 2, 65, 4, 4), (3, 2, 70), (4, 1, 5, 16)]),
    decay=st.floats(0.0, 1.0),
    gain=st.floats(0.1, 2.0),
    rest=st.floats(-0.2, 0.2),
    reset=st.sampled_from(["hard", "subtract", "none"]),
    timing=st.sampled_from(["now", "next", "corrected"]),
    strict=st.booleans(),
    per_channel=st.booleans(),
    synapse=st.sampled_from([None, "new", "undecayed"]),
    seed=st.integers(0, 2**31),
)
@tries(80)
def test_neurons_follow_their_rule(
    shape, decay, gain, rest, reset, timing, strict, per_channel, synapse, seed
):
    """The native epilogue agrees with the executable rule of the spec, for any exact spec."""
    generator = torch.Generator().manual_seed(seed)
    linear = len(shape) < 5
    channels = shape[-1] if linear else shape[2]
    layout = (channels,) if linear else (channels, 1, 1)
    threshold = torch.rand(layout, generator=generator) + 0.5 if per_channel else 0.8
    if timing == "corrected" and reset == "hard":
        return
    spec = NeuronSpec(
        framework="norse",
        class_name="Rule",
        exact=True,
        decay=decay,
        gain=gain,
        rest=rest,
        bias=0.05,
        threshold=threshold,
        strict=strict,
        reset=reset,
        reset_value=0.1,
        reset_timing=timing,
        synapse=None if synapse is None else Synapse(0.7, 0.9, synapse),
        state=(),
        time_axis=0,
        returns_state=True,
    )
    neuron = nn.Identity()
    assert why_not_fused(neuron, spec, state_read=False) == ""
    fuse_neuron(neuron, spec)
    inputs = channels + 5
    if linear:
        plain: nn.Module = nn.Linear(inputs, channels)
        x = (torch.rand(*shape[:-1], inputs, generator=generator) < 0.4).float()
    else:
        plain = nn.Conv2d(inputs, channels, 3, padding=1)
        size = (*shape[:2], inputs, *shape[3:])
        x = (torch.rand(size, generator=generator) < 0.4).float()
    plain.weight.data = torch.randn(plain.weight.shape, generator=generator) * 0.3
    layer = _packed_layer(plain)
    with torch.no_grad():
        spikes, state = neuron(layer(x))
        layer.waits = False
        expected, _ = simulate(spec, layer(x))
    assert state is None
    assert isinstance(spikes, LazyTensor)
    spikes = spikes.materialize()
    assert spikes.shape == expected.shape
    # A membrane that rounding puts on the other side of the threshold is no error of the rule.
    assert float((spikes != expected).float().mean()) < 2e-3 + 2 / expected.numel()


def _packed_layer(plain: nn.Module) -> PackedLayer:
    from spikenm_fx.pack import LayerGeometry, pack_weight

    packed = pack_weight(plain.weight, "1:1", geometry=LayerGeometry.of_layer(plain))
    layer = PackedLayer(packed, plain.bias, choice="event")
    layer.waits = True
    return layer


def test_pack_leaves_the_model_alone():
    """The model is not changed by packing, and the engine shares nothing with it."""
    model, x = _jelly_net()
    before = copy.deepcopy(model.state_dict())
    engine = pack(model, x)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(isinstance(m, PackedLayer | FusedNeuron) for m in model.modules())
    mine = {t.data_ptr() for t in model.state_dict().values()}
    assert not mine & {t.data_ptr() for t in engine.state_dict().values()}


def test_report_and_forced_choices():
    """The report says what was chosen and why, and packs again alike without measuring."""
    model, x = _jelly_net()
    engine = pack(model, x)
    report = packing(engine)
    assert [row.pattern for row in report.layers] == ["2:4"] * 3
    assert all("dense" in row.milliseconds for row in report.layers)
    gains = report.whole.form in ("fused", "unfused")  # else layers may be torch's or the model's
    assert report.layers[0].rate == pytest.approx(float(x.mean()), abs=1e-6)
    for row in report.layers:
        best = min(row.milliseconds, key=lambda choice: row.milliseconds[choice])
        assert row.choice in (best, "dense") or not gains
        if gains and row.milliseconds[best] < 0.9 * row.milliseconds["dense"]:
            assert row.choice == best
        assert row.gain is not None
        assert row.packed_bytes < row.dense_bytes
    assert "runs as" in str(report)
    again = pack(model, x, backend=report.choices)
    assert packing(again).choices == report.choices
    assert report.to_dict()["layers"][0]["gain"] == report.layers[0].gain
    with pytest.raises(PackError, match="not made by pack"):
        packing(model)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_measured_layers_alone(form, kernel_size):
    """Layers without a neuron: measured choices are known ones, outputs as torch's in format."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, kernel_size)
    model = nn.Sequential(conv, nn.Conv2d(24, 8, kernel_size)).eval()
    conv.weight.data = prune(conv.weight.data, NM(2, 4))
    x = (torch.rand(2, 16, 9, 9) < 0.2).float().to(memory_format=form)
    engine = pack(model, x)
    for row in packing(engine).layers:
        assert set(row.milliseconds) <= set(get_args(Choice))
        assert "dense" in row.milliseconds
        assert row.choice in {*row.milliseconds, "torch"}
    with torch.no_grad():
        expected, found = model(x), engine(x)
    assert type(found) is Tensor
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.is_contiguous(memory_format=form)


def test_without_example_inputs():
    """Without examples layers are packed, nothing is fused or measured, results are the same."""
    model, x = _jelly_net()
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    expected = _outputs(model, (x,))
    functional.reset_net(model)
    for backend in ("auto", "reference"):
        engine = pack(model, backend=backend)
        functional.reset_net(engine)
        assert torch.equal(_outputs(engine, (x,))[0], expected[0])


def test_outputs_are_ordinary_tensors():
    """What the engine returns can be pickled, saved and handed to numpy, also after deepcopy."""
    model, x = _jelly_net()
    for engine in (pack(model, x), copy.deepcopy(pack(model, x))):
        with torch.no_grad():
            y = engine(x)
        assert type(y) is Tensor
        assert y.numpy().shape == (4, 3, 72)


@pytest.mark.slow
@native
def test_whole_engine_compiles_and_exports():
    """torch.compile finds no graph break in an engine, and export keeps its operators."""
    model, x = _jelly_net()
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    engine = pack(model, x, backend="event")
    with torch.no_grad():
        expected = engine(x)
        functional.reset_net(engine)
        assert torch._dynamo.explain(engine)(x).graph_break_count == 0
        functional.reset_net(engine)
        compiled = torch.compile(engine, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        functional.reset_net(engine)
        exported = torch.export.export(engine, (x,))
    assert sum("sparse_layer" in str(node.target) for node in exported.graph.nodes) == 3


def test_other_shapes_than_the_example():
    """Another batch and another number of steps work after a reset; without one, an error says."""
    model, x = _jelly_net()
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    engine = pack(model, x, backend="event" if native_status().available else "dense")
    other = (torch.rand(2, 5, 8, 8, 8) < 0.3).float()
    functional.reset_net(model)
    expected = _outputs(model, (other,))
    functional.reset_net(engine)
    assert torch.equal(_outputs(engine, (other,))[0], expected[0])
    if native_status().available:
        with pytest.raises(PackError, match="reset the network"):
            _outputs(engine, (x,))
    with pytest.raises(PackError, match=r"^0: input .*8 channels"):
        _outputs(engine, (other[:, :, :3],))


def test_refusals():
    """Training, gradients, other dtypes, masks, unknown backends: each has a clear error."""
    model, x = _jelly_net()
    engine = pack(model, x)
    with pytest.raises(PackError, match="cannot train"):
        engine.train()
    with pytest.raises(PackError, match="no gradients"):
        engine(x.clone().requires_grad_())
    with pytest.raises(PackError, match="float64"):
        engine(x.double())
    with pytest.raises(PackError, match="float32"):
        engine(x.bool())
    with pytest.raises(PackError, match="known are"):
        pack(model, x, backend="magic")
    with pytest.raises(PackError, match="no packed layer"):
        pack(model, x, backend={"nowhere": "dense"})
    with pytest.raises(PackError, match="meta"):
        pack(copy.deepcopy(model).to("meta"))
    with pytest.raises(PackError, match="not 1:4"):
        pack(model, x, nm="1:4")
    masked = sparsify(copy.deepcopy(model), "2:4")
    with pytest.raises(PackError, match="fold"):
        pack(masked, x)
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(PackError, match="NaN"):
        pack(broken)


def test_unknown_neurons_stay():
    """A neuron whose rule is not known keeps its own forward, and the report says why."""
    case = _case("hand/module")
    rows = packing(pack(case.model, case.inputs, backend="dense")).layers
    assert any("not fully known" in row.note for row in rows)


def test_analog_inputs_never_reach_spike_kernels():
    """A layer that was chosen for spikes computes the exact result for anything else."""
    model, x = _jelly_net()
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    engine = pack(model, x, backend="event" if native_status().available else "dense")
    analog = x * 0.7 + 0.1
    expected = _outputs(model, (analog,))
    functional.reset_net(engine)
    assert torch.equal(_outputs(engine, (analog,))[0], expected[0])


def test_engine_weights_go_to_a_file_and_back(tmp_path):
    """The packed weights of an engine can be saved and give the same layers again."""
    model, x = _jelly_net()
    engine = pack(model, x, backend="dense")
    layers = {n: m for n, m in engine.named_modules() if isinstance(m, PackedLayer)}
    assert len(layers) == 3
    save_packed(tmp_path / "net.safetensors", {n: m.packed for n, m in layers.items()})
    weights, _ = load_packed(tmp_path / "net.safetensors")
    assert weights == {n: m.packed for n, m in layers.items()}


def test_without_kernels(monkeypatch):
    """Where nothing is compiled, the engine runs torch's dense layers and says so."""
    from spikenm_fx.native import library as module

    monkeypatch.setattr(module, "_library", lambda: (None, module.NativeStatus(False, "none")))
    module.kernels.cache_clear()
    try:
        model, x = _jelly_net()
        expected = _outputs(model, (x,))
        pytest.importorskip("spikingjelly.activation_based.functional").reset_net(model)
        engine = pack(model, x)
        assert {row.choice for row in packing(engine).layers} <= {"dense", "torch"}
        assert torch.equal(_outputs(engine, (x,))[0], expected[0])
    finally:
        module.kernels.cache_clear()


class InPlace(nn.Module):
    """Residual additions in place, before and after the neuron, as ResNets write them."""

    def __init__(self, where: str) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron

        self.where = where
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.lif, self.last = (
            neuron.LIFNode(tau=2.0, v_threshold=0.3, step_mode="m") for _ in range(2)
        )
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, C, H, W]`` spikes in and out."""
        steps = x.shape[:2]
        out = self.first(x.flatten(0, 1))
        if self.where == "before":
            out += x.flatten(0, 1)
        spikes = self.lif(out.view(*steps, *out.shape[1:])).flatten(0, 1)
        if self.where == "after":
            spikes += x.flatten(0, 1)
        elif self.where == "slice":
            spikes[:, :8] = 0
        elif self.where == "view":
            half = spikes.view(2, 4, *spikes.shape[1:])[0]
            half.mul_(0)
        out = self.second(self.pool(spikes))
        return self.last(out.view(*steps, *out.shape[1:]))


@native
@pytest.mark.parametrize("kernel", ["event", "lut", "fma"])
@pytest.mark.parametrize("where", ["before", "after", "slice", "view", "nowhere"])
def test_writing_in_place_is_seen_by_everyone(where, kernel):
    """What is written to waiting values or to spikes reaches neurons, pools and layers alike."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    torch.manual_seed(0)
    model = InPlace(where).eval()
    for layer in (model.first, model.second):
        layer.weight.data = prune(layer.weight.data * 6, NM(2, 4))
    x = (torch.rand(4, 2, 16, 8, 8) < 0.3).float()
    with torch.no_grad():
        expected = model(x)
        assert 0.01 < expected.mean() < 0.99
        functional.reset_net(model)
        engine = pack(model, x, backend=kernel)
        assert isinstance(engine.lif, FusedNeuron)
        found = engine(x)
    assert (expected != found).float().mean() < 1e-3


class PadsWithItsNorm(nn.Module):
    """A norm whose parent reads it, as RepConv does to pad with what the norm makes of zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.pad(self.bn(x), [1] * 4)
        if self.bn.affine:
            scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
            edge = (self.bn.bias - self.bn.running_mean * scale).detach().view(1, -1, 1, 1)
            out[:, :, :1], out[:, :, -1:] = edge, edge
            out[:, :, :, :1], out[:, :, :, -1:] = edge, edge
        return out


def test_a_folded_norm_can_still_be_read():
    """A model that reads the values of a norm that moved into a layer computes what it did."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), PadsWithItsNorm(8), nn.Conv2d(8, 8, 3, bias=False)
    )
    x = torch.randn(2, 8, 6, 6)
    model(x)
    with torch.no_grad():
        for layer in (model.eval()[0], model[2]):
            layer.weight.copy_(prune(layer.weight, NM(2, 4)))
    engine = pack(model, x, backend="dense")
    assert type(engine[1].bn) is not nn.BatchNorm2d  # it was folded: the test means something
    with torch.no_grad():
        for either in (engine, copy.deepcopy(engine)):
            assert torch.allclose(either(x), model(x), atol=1e-5)
    assert not any("bn" in key for key in engine.state_dict())
