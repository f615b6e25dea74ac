# SPDX-License-Identifier: Apache-2.0
"""Sums and pools of spikes as bit planes: exact, read by every kernel, never visible outside."""

import pytest
import torch
import torch.nn.functional as F
from few_rounds import fastest_of, few_rounds
from hypothesis import given
from hypothesis import strategies as st
from pack_strategies import prune
from profiles import tries
from torch import Tensor, nn
from zoo_cases import quarter_width

from spikenm_fx.native.library import available_kernels
from spikenm_fx.pack import LayerGeometry, PackedLayer, native_status, pack, pack_weight, packing
from spikenm_fx.pack.engine import layer as layer_module
from spikenm_fx.pack.engine.fused import FusedNeuron
from spikenm_fx.pack.engine.lazy import LazyTensor, SpikeBits
from spikenm_fx.pattern import NM

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds"]


def _bits(spikes: Tensor) -> LazyTensor:
    """Spikes ``(B, C, H, W)`` as a fused neuron would hand them on."""
    images, channels, height, width = spikes.shape
    words = -(-channels // 64)
    rows = F.pad(spikes.permute(0, 2, 3, 1).reshape(-1, channels), [0, words * 64 - channels])
    place = 2 ** torch.arange(63, dtype=torch.int64)
    grouped = rows.view(-1, words, 64).long()
    bits = (grouped[..., :63] * place).sum(-1) + torch.where(grouped[..., 63] > 0, -(2**63), 0)
    layout = torch.empty(spikes.shape, device="meta").to(memory_format=torch.channels_last)
    return LazyTensor(SpikeBits(bits, images, (height, width), layout, channels))


def _spikes(generator: torch.Generator, shape: tuple[int, ...], rate: float = 0.4) -> Tensor:
    return (torch.rand(shape, generator=generator) < rate).float()


def _apply(op: str, x: Tensor, other: Tensor) -> Tensor:
    match op:
        case "add":
            return x + other
        case "add itself":
            return x + x
        case "multiply":
            return x * other
        case "invert":
            return other * (1.0 - x)
        case "average":
            return F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        case "average wide":
            return F.avg_pool2d(x, (1, 4), 1) if x.shape[3] > 3 else x
        case "maximum":
            return F.max_pool2d(x, 3, 2, 1)
        case "copy":
            return x.contiguous()
        case "tokens":
            return x.flatten(2).contiguous().view(x.shape)
    return x.unflatten(0, (2, -1)).flatten(0, 1)


OPS = st.sampled_from(
    (
        *("add", "add itself", "multiply", "invert", "average", "average wide"),
        *("maximum", "copy", "tokens", "fold"),
    )
)


@given(
    ops=st.lists(OPS, max_size=6),
    channels=st.sampled_from([1, 3, 63, 64, 65, 128, 130]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
@tries(150)
def test_operations_on_bits_are_exact(ops, channels, size, seed):
    """Any sequence of operations on waiting spikes gives, bit for bit, what torch gives."""
    generator = torch.Generator().manual_seed(seed)
    x = _spikes(generator, (4, channels, *size))
    lazy = _bits(x)
    assert torch.equal(lazy.materialize(), x)
    for op in ops:
        other = _spikes(generator, tuple(x.shape))
        x, lazy = _apply(op, x, other), _apply(op, lazy, _bits(other))
        assert lazy.shape == x.shape
    found = lazy.materialize() if isinstance(lazy, LazyTensor) else lazy
    assert torch.equal(found, x)


def test_sums_and_pools_stay_bits():
    """What residual networks do between fused layers makes no fp32 spikes."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (_bits(_spikes(generator, (4, 70, 8, 8))) for _ in range(3))
    for value, planes in (
        (a + b, 2),
        (a + b + c, 2),
        ((a + b) + (a + c), 3),
        (a * (1.0 - b), 1),
        (F.avg_pool2d(a, 2), 3),
        (F.avg_pool2d(a + b, 2), 4),
        ((a + b).flatten(2).contiguous().view(4, 70, 8, 8), 2),
    ):
        assert isinstance(value, LazyTensor)
        assert isinstance(value.source, SpikeBits)
        assert value.source.planes == planes
    for value in (F.avg_pool2d(a, 3), F.max_pool2d(a + b, 2), a + b.materialize(), a + a.mT, a - b):
        assert not isinstance(value, LazyTensor)


def test_writing_to_a_sum_or_a_copy_changes_nothing_else():
    """A copy and its original are independent, whichever is written to."""
    x = _spikes(torch.Generator().manual_seed(0), (2, 8, 4, 4))
    original = _bits(x)
    copied = original.contiguous()
    total = original + copied
    copied.mul_(3)
    assert torch.equal(original.materialize(), x)
    assert torch.equal(copied.materialize(), 3 * x)
    again = original.flatten(2).contiguous()
    again.view(-1).zero_()
    original.add_(1)
    assert torch.equal(again.view(-1)[:5] + 0, torch.zeros(5))
    assert torch.equal(original.materialize(), x + 1)
    assert torch.equal(total.materialize(), 2 * x)


@given(
    kernel=st.sampled_from(available_kernels()),
    nm=st.sampled_from(["2:4", "1:4", "1:8", "1:16", "1:1", "3:5"]),
    channels=st.sampled_from([5, 40, 64, 96]),
    outputs=st.sampled_from([1, 7, 64]),
    spatial=st.sampled_from([0, 1, 2]),
    stride=st.sampled_from([1, 2]),
    terms=st.sampled_from([1, 2, 3, "average"]),
    seed=st.integers(0, 2**31),
)
@tries(120)
def test_layers_read_counts(kernel, nm, channels, outputs, spatial, stride, terms, seed):
    """Every kernel on counts computes the dense layer on their values, integers bit-exactly."""
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, channels, *[3] * spatial)
    pattern = NM.parse(nm) if channels >= NM.parse(nm).of else NM(1, 1)
    weight = prune(torch.randn(shape, generator=generator), pattern)
    geometry = LayerGeometry.conv(spatial, stride=stride, padding=1) if spatial else LayerGeometry()
    dtype = torch.int8 if kernel.endswith("8") else None
    packed = pack_weight(weight, pattern, geometry=geometry, dtype=dtype)
    parts = [_bits(_spikes(generator, (4, channels, 6, 6))) for _ in range(3)]
    x: Tensor = F.avg_pool2d(parts[0], 2) if terms == "average" else sum(parts[1:terms], parts[0])
    if spatial == 1:
        x = x.flatten(2)
    elif not spatial:
        x = x.flatten(2).transpose(1, 2)
    bias = torch.randn(outputs, generator=generator)
    dense = PackedLayer(packed, bias)
    spiking = PackedLayer(packed, bias, choice=kernel if kernel in dense.candidates() else "event")
    reads_bits = spiking.bits_of(x) is not None
    assert reads_bits or ((isinstance(terms, str) or terms > 1) and 64 % pattern.of)
    expected, found = dense(x.materialize()), spiking(x)
    scale = float(expected.abs().max().clamp_min(1e-3))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * scale


def _block(join: str) -> tuple[nn.Module, Tensor]:
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer, neuron

    class Net(nn.Module):
        """A residual block after a pool between convolution and neuron."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = layer.Conv2d(3, 24, 3, padding=1, bias=False)
            self.norm = layer.BatchNorm2d(24)
            self.pool = layer.MaxPool2d(3, 2, 1)
            self.one, self.two = (layer.Conv2d(24, 24, 3, padding=1) for _ in range(2))
            self.a, self.b, self.c, self.d = (neuron.LIFNode(v_threshold=0.4) for _ in range(4))
            self.average = layer.AvgPool2d(2)
            self.last = layer.Conv2d(24, 40, 1)

        def forward(self, x: Tensor) -> Tensor:
            """``[T, B, 3, H, W]`` to spikes."""
            x = self.a(self.pool(self.norm(self.stem(x))))
            y = self.c(self.two(self.b(self.one(x))))
            y = x + y if join == "add" else x * y if join == "and" else x * (1.0 - y)
            return self.d(self.last(self.average(y)))

    from spikingjelly.activation_based import functional

    torch.manual_seed(1)
    model = Net().eval()
    functional.set_step_mode(model, "m")
    model.norm.running_var.fill_(0.05)
    model.norm.bias.data.fill_(0.4)
    for conv in (model.one, model.two, model.last):
        conv.weight.data = prune(conv.weight.data * 5, NM(2, 4))
    return model, torch.rand(1, 3, 3, 17, 15).repeat(4, 1, 1, 1, 1)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("join", ["add", "and", "iand"])
@pytest.mark.parametrize("backend", ["auto", "dense", "event", "lut", "fma"])
def test_a_residual_block(join, backend, constant):
    """Pool before the neuron, SEW join, average pool: the model's spikes, in two calls."""
    from spikingjelly.activation_based import functional

    model, x = _block(join)
    x = x if constant else x + torch.rand_like(x) * 0.2
    with torch.no_grad():
        expected = [model(x), model(x)]
        functional.reset_net(model)
        engine = pack(model, x, backend=backend)
        if backend == "auto":  # whether the whole gains enough to stay fused is not asked here
            engine = pack(model, x, backend=fastest_of(engine))
        found = [engine(x), engine(x)]
        functional.reset_net(engine)
        again = engine(x)
    assert 0.02 < float(expected[0].mean()) < 0.98
    assert all(isinstance(getattr(engine, n), FusedNeuron) for n in "abcd")
    assert [row.neuron for row in packing(engine).layers] == ["a", "b", "c", "d"]
    for seen, wanted in zip(found, expected, strict=True):
        assert type(seen) is Tensor
        assert float((seen != wanted).float().mean()) < 1e-3
    assert torch.equal(again, found[0])


def test_a_constant_input_is_convolved_once(monkeypatch):
    """All steps alike: one step is computed; steps that differ in one value are all computed."""
    model, x = _block("add")
    engine = pack(model, x, backend="dense")
    sizes: list[int] = []
    plain = layer_module.dense_layer

    def seen(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        sizes.append(x.shape[0])
        return plain(x, weight, *rest)

    monkeypatch.setattr(layer_module, "dense_layer", seen)
    with torch.no_grad():
        engine(x)
        assert sizes[0] == 3
        sizes.clear()
        x[3, 2, 2, 16, 14] += 1e-6
        engine(x)
    assert sizes[0] == 12


def test_report_counts_digits():
    """The report tells spikes from sums of spikes, and gives the rate of both."""
    model, x = _block("add")
    rows = {row.name: row for row in packing(pack(model, x)).layers}
    assert rows["stem"].rate is None
    assert (rows["one"].planes, rows["last"].planes) == (1, 4)
    assert 0 < rows["one"].rate < 1
    assert "x4" in str(packing(pack(model, x)))


def test_one_layout_for_counts_or_for_spikes():
    """A layer that reads counts keeps no second layout for spikes, and still reads spikes."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(64, 32, 3, padding=1).requires_grad_(False)
    packed = pack_weight(plain.weight, "1:1", geometry=LayerGeometry.of_layer(plain))
    layer = PackedLayer(packed, plain.bias, choice="event")
    spikes = _bits(_spikes(generator, (2, 64, 6, 6)))
    before = layer.resident_bytes
    layer.expect_counts()
    assert layer.resident_bytes == before
    counts = layer(spikes + spikes)
    both = layer.resident_bytes
    layer.expect_counts()
    assert layer.resident_bytes < both
    assert torch.equal(layer(spikes + spikes), counts)
    for x in (spikes, spikes.materialize()):
        assert float((layer(x) - plain(spikes.materialize())).abs().max()) < 1e-5


def test_nan_survives_the_pool():
    """A NaN that reaches the pool before the neuron keeps it from firing, as in torch."""
    from spikingjelly.activation_based import functional

    model, x = _block("add")
    engine = pack(model, x)
    x = x.clone()
    x[:, 0, 0, 3, 3] = float("nan")
    spikes = {}
    for name, net in (("model", model), ("engine", engine)):
        functional.reset_net(net)
        net.a.register_forward_hook(lambda _m, _a, out, name=name: spikes.update({name: out + 0}))
        with torch.no_grad():
            net(x)
    assert torch.equal(spikes["model"], spikes["engine"])


def test_a_residual_block_compiles_and_exports():
    """Sums of spikes reach the operators as fp32 there, and the result is the same."""
    from spikingjelly.activation_based import functional

    model, x = _block("add")
    engine = pack(model, x, backend="event")
    with torch.no_grad():
        expected = engine(x)
        functional.reset_net(engine)
        compiled = torch.compile(engine, backend="aot_eager", fullgraph=True)
        assert float((compiled(x) != expected).float().mean()) < 1e-3
        functional.reset_net(engine)
        exported = torch.export.export(engine, (x,))
        assert float((exported.module()(x) != expected).float().mean()) < 1e-3
    assert sum("sparse_layer" in str(node.target) for node in exported.graph.nodes) == 4


@pytest.mark.framework
@pytest.mark.parametrize(
    ("name", "backend"), [("sew_resnet18", "event"), ("spikformer-4-256", "lut")]
)
def test_whole_networks_against_the_eager_model(name, backend):
    """Neuron by neuron the model's spikes; where rounding flips one, one in 100,000 at first."""
    from spikenm_fx.bench import subjects
    from spikenm_fx.bench.network import agreement

    torch.manual_seed(0)
    with quarter_width(f"spikingjelly/{name}"):
        network = subjects.NETWORKS[name]()
    subjects.prune(network.model, NM(2, 4))
    x = network.inputs(1)
    if name == "sew_resnet18":  # which takes images of any size
        x = x[..., ::2, ::2].contiguous()
    rates = subjects.calibrate_rates(network, x, 0.1)
    assert 0.05 < rates["mean"] < 0.2
    assert all(rate > 0.001 for rate in rates["neurons"].values())
    engine = pack(network.model, x, backend=backend)
    rows = packing(engine).layers
    assert sum(bool(row.neuron) for row in rows) == len(rows) - 1
    found = agreement(network, engine, x)
    assert found["first_mismatch"] < 1e-5
    if not found["spike_mismatch"]:
        assert found["same_predictions"] == 1.0
        assert found["largest_difference"] < 1e-4
