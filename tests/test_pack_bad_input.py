# SPDX-License-Identifier: Apache-2.0
"""What a user may do wrong with an engine, and what must work although it is unusual."""

import copy
import functools
import pickle

import pytest
import torch
from few_rounds import few_rounds
from pack_strategies import prune
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import spikenm_fx
from spikenm_fx.errors import PackError
from spikenm_fx.pack import PackedLayer, native_status, pack
from spikenm_fx.pattern import NM

pytestmark = pytest.mark.usefixtures("few_rounds")
__all__ = ["few_rounds"]

functional = pytest.importorskip("spikingjelly.activation_based.functional")
layer = pytest.importorskip("spikingjelly.activation_based.layer")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

BACKENDS = ["dense", "event", "lut", "fma"] if native_status().available else ["dense"]
backends = pytest.mark.parametrize("backend", BACKENDS)


class Residual(nn.Module):
    """Spikes, a sum of spikes, a norm that cannot be folded, a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = layer.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = layer.BatchNorm2d(16)
        self.a, self.b, self.c = (neuron.LIFNode(v_threshold=0.5) for _ in range(3))
        self.body = layer.Conv2d(16, 16, 3, padding=1)
        self.joined = layer.BatchNorm2d(16)
        self.tail = layer.Conv2d(16, 16, 3, stride=2)
        self.readout = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 3, H, W]`` or ``[B, 3, H, W]`` to logits."""
        x = self.a(self.norm(self.stem(x)))
        x = x + self.b(self.body(x))
        x = self.c(self.joined(x) + 0.1 + self.joined(x))
        return self.readout(self.tail(x).mean((-1, -2)))


def _net(step_mode: str = "m") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Residual().eval()
    functional.set_step_mode(model, step_mode)
    for module in (model.body, model.tail):
        module.weight.data = prune(module.weight.data * 4, NM(2, 4))
    return model, torch.rand(4, 2, 3, 12, 12) * 3


@functools.cache
def _once_packed(backend: str) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = _net()
    return model, pack(model, x, backend=backend), x


def _packed(backend: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, its engine and an input, for tests that only run them: both at rest."""
    model, engine, x = _once_packed(backend)
    functional.reset_net(model)
    functional.reset_net(engine)
    return model, engine, x


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@backends
def test_outside_no_grad(backend):
    """An engine called as it is, with parameters left in it, needs no no_grad around it."""
    model, engine, x = _packed(backend)
    y = engine(x)
    assert not y.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    assert _close(y, model(x).detach())


@backends
def test_inference_mode_and_back(backend):
    """State written in inference mode is no obstacle afterwards."""
    model, x = _net()
    engine = pack(model, x, backend=backend)
    with torch.no_grad():
        expected = [model(x), model(x)]
    with torch.inference_mode():
        first = engine(x)
    second = engine(x)
    assert _close(first, expected[0])
    assert _close(second, expected[1])


@backends
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: x.half(), "float16"),
        (lambda x: x.long(), "int64"),
        (lambda x: x > 0.5, "bool"),
        (lambda x: x.to("meta"), "meta"),
        (lambda x: x[:, :, :2], "3 channels"),
        (lambda x: x[..., 0], "(?i)dimension|shape|size"),
        (lambda x: x[..., :1, :1], "(?i)smaller than the kernel|kernel size"),
        (lambda x: x.requires_grad_(), "no gradients"),
    ],
)
def test_wrong_inputs(backend, change, match):
    """Dtype, device, channels, dimensions, size, gradients: an error that says what is wrong."""
    model, engine, x = _packed(backend)
    with pytest.raises((PackError, RuntimeError, ValueError), match=match):
        engine(change(x.clone()))
    functional.reset_net(engine)
    with torch.no_grad():
        assert _close(engine(x), model(x))


@backends
def test_tensors_on_a_gpu(backend):
    """Inputs and models on another device are refused by its name; no GPU is needed to try."""
    _, engine, x = _packed(backend)
    with FakeTensorMode():
        there = torch.rand(x.shape, device="cuda")
        elsewhere = nn.Linear(16, 16)
        elsewhere.weight = nn.Parameter(torch.empty(16, 16, device="cuda"))
    with pytest.raises(PackError, match="the input is on cuda"):
        engine(there)
    with pytest.raises(PackError, match=r"weight is on cuda.*move the model to the CPU"):
        pack(elsewhere, there)


@backends
def test_training_is_refused_everywhere(backend):
    """Neither the engine nor a part of it can be switched to training."""
    _, engine, _ = _packed(backend)
    for part in (engine, engine.body):
        with pytest.raises(PackError, match="train the original model"):
            part.train()
    assert not engine.body.training
    engine.eval()


@backends
@pytest.mark.parametrize("shape", [(4, 1, 3, 12, 12), (1, 2, 3, 12, 12), (7, 3, 3, 9, 15)])
def test_other_shapes(backend, shape):
    """Another batch, other steps, another size: as in the model."""
    model, engine, _ = _packed(backend)
    other = torch.rand(shape) * 3
    with torch.no_grad():
        assert _close(engine(other), model(other))


@backends
def test_an_empty_batch(backend):
    """No images, no spikes, no crash."""
    _, engine, x = _packed(backend)
    with torch.no_grad():
        assert engine(x[:, :0]).shape == (4, 0, 10)


@backends
def test_single_steps(backend):
    """A loop over time around the engine, with a reset in between."""
    model, x = _net("s")
    engine = pack(model, x[0], backend=backend)
    with torch.no_grad():
        for _ in range(2):
            for step in x:
                assert _close(engine(step), model(step))
            functional.reset_net(model)
            functional.reset_net(engine)


@backends
def test_loading_other_weights(backend):
    """What is loaded into an engine is what it runs; what is no packed weight is refused."""
    model, x = _net()
    other, _ = _net()
    for module in (other.body, other.tail):
        module.weight.data = prune(torch.randn_like(module.weight), NM(2, 4))
    engine, donor = pack(model, x, backend=backend), pack(other, x, backend=backend)
    engine.load_state_dict(donor.state_dict())
    with torch.no_grad():
        assert _close(engine(x), other(x))
    edited = copy.deepcopy(donor.state_dict())
    edited["body.indices"].fill_(0)
    with pytest.raises(PackError, match="ascend"):
        engine.load_state_dict(edited)


@backends
def test_copies_are_independent(backend):
    """A deepcopy and an unpickled engine run alike and share no state."""
    model, x = _net()
    engine = pack(model, x, backend=backend)
    with torch.no_grad():
        first = engine(x)
        twin = copy.deepcopy(engine)
        second = engine(x)
        assert torch.equal(twin(x), second)
        functional.reset_net(twin)
        assert torch.equal(twin(x), first)
    layers = [m for m in engine.modules() if isinstance(m, PackedLayer)]
    for one in layers:
        again = pickle.loads(pickle.dumps(one))
        assert again.packed == one.packed
        assert again.choice == one.choice


@backends
def test_threads_do_not_matter(backend):
    """One or two threads give the same bits."""
    model, x = _net()
    engine = pack(model, x, backend=backend)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            functional.reset_net(engine)
            with torch.no_grad():
                found.append(engine(x))
    finally:
        torch.set_num_threads(before)
    if backend == "dense":  # torch's own sums may differ
        assert _close(found[1], found[0])
    else:
        assert torch.equal(found[0], found[1])


class Viewing(nn.Module):
    """Code that relies on contiguous memory, and code that writes to what a layer has read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.lif = neuron.LIFNode(v_threshold=0.3, step_mode="m")
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = neuron.LIFNode(v_threshold=0.3, step_mode="m")
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 3, 6, 6]`` to ``[T, B, 5]``."""
        steps, batch = x.shape[:2]
        y = self.conv(x.flatten(0, 1))
        if self.how == "layer":
            return self.head(y.view(steps, batch, -1))
        if self.how == "input":
            x.view(-1)[0] += 5
        spikes = self.lif(y.view(steps, batch, *y.shape[1:]))
        if self.how == "spikes":
            return self.head(spikes.view(steps, batch, -1))
        if self.how == "step":
            return torch.stack([self.head(spikes[t].view(batch, -1)) for t in range(steps)])
        if self.how == "scaled":
            return self.head((spikes * 0.5).view(steps, batch, -1))
        z = self.second(spikes.flatten(0, 1))
        if self.how == "written":
            spikes.add_(1)
        return self.head(self.last(z.view(steps, batch, *z.shape[1:])).view(steps, batch, -1))


@backends
@pytest.mark.parametrize("how", ["layer", "spikes", "step", "scaled", "written", "deep"])
def test_views_and_writes_as_in_the_model(how, backend):
    """What works on the memory of torch's layers works on that of packed ones."""
    torch.manual_seed(0)
    model = Viewing(how).eval()
    x = (torch.rand(4, 2, 3, 6, 6) < 0.5).float()
    with torch.no_grad():
        expected = model(x)
        functional.reset_net(model)
        assert _close(pack(model, x, backend=backend)(x), expected)


@backends
@pytest.mark.parametrize("how", ["layer", "spikes"])
def test_views_under_the_compiler(how, backend):
    """The compiler sees contiguous outputs as well."""
    torch.manual_seed(0)
    model = Viewing(how).eval()
    x = (torch.rand(4, 2, 3, 6, 6) < 0.5).float()
    engine = pack(model, x, backend=backend)
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(engine, backend="eager", fullgraph=True)(x)
    assert _close(found, expected)


@pytest.mark.skipif(not native_status().available, reason="nothing waits without kernels")
def test_an_input_that_is_overwritten():
    """A layer that waits for its neuron says so when its input has changed meanwhile."""
    model = Viewing("deep").eval()
    x = (torch.rand(4, 2, 3, 6, 6) < 0.5).float()
    engine = pack(model, x)
    engine.how = "input"
    with pytest.raises(PackError, match="conv: its input was written to"):
        engine(x)


def test_packing_an_engine():
    """An engine is no model to pack, and the error says what is."""
    model, x = _net()
    engine = pack(model, x, backend="event")  # whatever the machine is fastest with
    with pytest.raises(PackError, match="stem is packed already"):
        pack(engine, x)


def test_forcing_a_kernel_on_a_layer_that_cannot():
    """The error names the layer, and what would be possible."""
    model, x = _net()
    model.body.weight.data = torch.randn_like(model.body.weight)
    with pytest.raises(PackError, match=r"body .* cannot run as 'event8'; possible here: dense"):
        pack(model, x, backend={"body": "event8"})


class _Asking(nn.Module):
    """A forward that asks its layers what they are, and the model where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 64), nn.Conv1d(1, 8, 3, padding=1, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                x = layer(x) + torch.zeros(layer.out_features, device=layer.weight.device)
            elif isinstance(layer, nn.Conv1d):
                x = layer(x[:, None]) + layer.kernel_size[0] + layer.out_channels
        return x.to(next(self.parameters()).device)


@backends
def test_packed_layers_are_instances_of_what_they_replace(backend):
    """isinstance, attributes, class name, device and state-dict keys hold in an engine."""
    torch.manual_seed(0)
    net, x = _Asking().eval(), torch.rand(4, 16)
    engine = pack(net, x, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), net(x))
    for before, after in zip(net.layers, engine.layers, strict=True):
        assert isinstance(after, PackedLayer)
        assert isinstance(after, type(before))
        assert type(after).__name__ == f"Packed{type(before).__name__}"
        assert torch.equal(after.weight, before.weight)
        assert vars(before).keys() <= vars(after).keys()
        again = pickle.loads(pickle.dumps(after))
        assert type(again) is type(after)
    assert spikenm_fx.verify(engine).layers[0].found is None


@backends
def test_an_engine_is_verified_by_what_its_layers_are_packed_to(backend):
    """Counted are the weights that an engine multiplies; each must be of its own pattern."""
    model, x = _net()
    engine = pack(model, x, backend=backend)
    found = spikenm_fx.verify(engine)
    layers = {n: m for n, m in engine.named_modules() if isinstance(m, PackedLayer)}
    required = {check.name: check.required for check in found.layers}
    packed_to = {n: m.nm if m.nm.keep < m.nm.of else None for n, m in layers.items()}
    assert {name: required[name] for name in layers} == packed_to
    assert found.valid
    assert not spikenm_fx.verify(pack(nn.Linear(8, 8), backend=backend))


class _Doubling(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def _hook(conv):
    conv.register_forward_hook(lambda module, args, output: 2 * output)


def _pre_hook(conv):
    conv.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def _own_forward(conv):
    conv.forward = lambda x: nn.functional.conv2d(x, 2 * conv.weight, conv.bias, padding=1)


@pytest.mark.parametrize("change", [_hook, _pre_hook, _own_forward, None])
@pytest.mark.parametrize("conv", [nn.Conv2d, _Doubling, layer.WSConv2d])
def test_what_a_layer_does_beside_its_product_is_kept(conv, change):
    """Hooks come along; a layer that computes something else stays torch's, with the reason."""
    torch.manual_seed(0)
    body = [conv(4, 16, 3, padding=1), nn.BatchNorm2d(16), neuron.IFNode(), nn.Conv2d(16, 8, 3)]
    model, x = nn.Sequential(*body).eval(), 4 * torch.rand(2, 4, 8, 8)
    if change is not None:
        change(model[0])
    with torch.no_grad():
        expected = model(x)
        functional.reset_net(model)
        engine = pack(model, x)
        functional.reset_net(engine)
        torch.testing.assert_close(engine(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("verb", [spikenm_fx.pack, spikenm_fx.verify])
@pytest.mark.parametrize("whole", [True, False], ids=["layers", "tensor"])
def test_quantised_weights_are_refused_with_the_way_out(verb, whole: bool) -> None:
    """Torch's quantised layers and tensors are named, and nothing is changed."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    if whole:
        kinds = {nn.Linear}
        model = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    else:
        small = torch.quantize_per_tensor(model[2].weight.detach(), 0.01, 0, torch.qint8)
        model[2].weight = nn.Parameter(small, requires_grad=False)
    kept, keys = list(model.modules()), list(model.state_dict())
    with pytest.raises(
        spikenm_fx.SpikeNMError, match=r"quantised weights.* before torch quantises"
    ):
        verb(model)
    assert list(model.modules()) == kept
    assert list(model.state_dict()) == keys
