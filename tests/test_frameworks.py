# SPDX-License-Identifier: Apache-2.0
"""Real models of real frameworks: sparsified, trained two steps, folded, verified."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from zoo_cases import quarter_width

import spikenm_fx


def spike_rates(model: nn.Module, kinds: tuple[type, ...]) -> tuple[list[float], list]:
    """Hooks that collect the mean output of every neuron layer."""
    rates: list[float] = []

    def collect(module, inputs, output):
        spikes = output[0] if isinstance(output, tuple) else output
        rates.append(float(spikes.detach().float().mean()))

    handles = [m.register_forward_hook(collect) for m in model.modules() if isinstance(m, kinds)]
    assert handles, "the network has neurons"
    return rates, handles


def learn_fold_verify(model, run, inputs, neurons, *, nm="2:4", rules=(), classes=4):
    """The whole way of one network; asserts each stage.

    ``run(model, inputs)`` resets all state and returns class scores.
    """
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    classes_before = {name: type(module) for name, module in model.named_modules()}
    decided = spikenm_fx.plan(model, nm, rules=rules)
    assert [layer.name for layer in decided.layers] == layers
    assert all(layer.reason for layer in decided.layers)
    keys = list(model.state_dict())

    spikenm_fx.sparsify(model, nm, rules=rules)
    optimizer = torch.optim.Adam(spikenm_fx.param_groups(model, 1e-3))
    rates, handles = spike_rates(model, neurons)
    labels = torch.arange(len(run(model, inputs))) % classes
    assert sum(rate > 0 for rate in rates) >= len(rates) / 2, "the network really spikes"
    for handle in handles:
        handle.remove()
    first = decided.sparse[0].name
    last = decided.sparse[-1].name
    for step in range(2):
        before = {n: model.get_submodule(n).weight_logits.clone() for n in (first, last)}
        optimizer.zero_grad()
        F.cross_entropy(run(model, inputs), labels).backward()
        optimizer.step()
        for layer in decided.sparse:
            assert torch.isfinite(model.get_submodule(layer.name).weight_logits).all()
        assert not torch.equal(before[last], model.get_submodule(last).weight_logits)
        assert spikenm_fx.progress(model).step == step + 1
    assert int(model.get_submodule(first).weight_nm[4]) == 2
    assert not torch.equal(before[first], model.get_submodule(first).weight_logits)
    assert spikenm_fx.verify(model, decided).valid

    model.eval()
    with torch.no_grad():
        scores = run(model, inputs)
        spikenm_fx.fold(model)
        assert torch.equal(run(model, inputs), scores)
    assert spikenm_fx.verify(model, decided).valid
    assert list(model.state_dict()) == keys
    assert {name: type(module) for name, module in model.named_modules()} == classes_before
    return decided


@pytest.mark.filterwarnings("ignore")
class TestSpikingJelly:
    @pytest.fixture(autouse=True)
    def _available(self):
        pytest.importorskip("spikingjelly")

    @staticmethod
    def run(model, inputs, steps=2):
        """Multi-step: the network sees ``[T, B, ...]`` at once."""
        from spikingjelly.activation_based import functional

        functional.reset_net(model)
        return model(inputs.unsqueeze(0).expand(steps, *inputs.shape)).mean(0)

    @staticmethod
    def run_single(model, inputs, steps=2):
        """Single step: the user's Python loop over time."""
        from spikingjelly.activation_based import functional

        functional.reset_net(model)
        return torch.stack([model(inputs) for _ in range(steps)]).mean(0)

    @pytest.mark.parametrize("step_mode", ["m", "s"])
    def test_resnet(self, torchvision_stub, step_mode):
        """spiking_resnet18 learns and folds in both step modes; its layer.Conv2d are found."""
        from spikingjelly.activation_based import functional, layer, neuron, surrogate
        from spikingjelly.activation_based.model import spiking_resnet

        with quarter_width("spikingjelly/spiking_resnet18"):
            model = spiking_resnet.spiking_resnet18(
                num_classes=4,
                spiking_neuron=neuron.IFNode,
                surrogate_function=surrogate.ATan(),
                detach_reset=True,
            )
        functional.set_step_mode(model, step_mode)
        for module in model.modules():  # fresh batch norms leave deep neurons silent
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 2.0)
        run = self.run if step_mode == "m" else self.run_single
        inputs = torch.rand(4, 3, 32, 32)
        decided = learn_fold_verify(model, run, inputs, (neuron.BaseNode,))
        assert len(decided.layers) == 21
        assert len(decided.sparse) == 19
        assert all(
            isinstance(model.get_submodule(entry.name), layer.Conv2d) for entry in decided.sparse
        )

    def test_vgg(self, torchvision_stub):
        """A small spiking_vgg11_bn at 1:8 learns and folds."""
        from spikingjelly.activation_based import functional, layer, neuron, surrogate
        from spikingjelly.activation_based.model import spiking_vgg

        model = spiking_vgg.SpikingVGG(
            cfg=[16, "M", 32, "M", 32, 32, "M"],
            batch_norm=True,
            norm_layer=layer.BatchNorm2d,
            num_classes=4,
            spiking_neuron=neuron.LIFNode,
            surrogate_function=surrogate.ATan(),
            detach_reset=True,
        )
        model.classifier = layer.Linear(32 * 49, 4)  # instead of its 4096 hidden neurons
        functional.set_step_mode(model, "m")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 3.0)
        learn_fold_verify(model, self.run, torch.rand(4, 3, 16, 16), (neuron.BaseNode,), nm="1:8")

    def test_linear_net_with_parametric_neurons(self):
        """layer.Linear with PLIF neurons in a Python loop over time."""
        from spikingjelly.activation_based import layer, neuron

        model = nn.Sequential(
            layer.Flatten(),
            layer.Linear(64, 64),
            neuron.ParametricLIFNode(v_threshold=0.2),
            layer.Linear(64, 32),
            neuron.ParametricLIFNode(v_threshold=0.2),
            layer.Linear(32, 4),
        )
        inputs = torch.rand(4, 8, 8) * 3
        decided = learn_fold_verify(model, self.run_single, inputs, (neuron.BaseNode,))
        assert [entry.name for entry in decided.sparse] == ["3"]


@pytest.mark.filterwarnings("ignore")
class TestSnnTorch:
    @pytest.fixture(autouse=True)
    def _available(self):
        self.snn = pytest.importorskip("snntorch")

    def test_init_hidden(self):
        """Leaky neurons that keep their state, reset by snntorch.utils, in a loop over time."""
        from snntorch import utils

        leaky = {"beta": 0.9, "init_hidden": True, "threshold": 0.3}
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            self.snn.Leaky(**leaky),
            nn.Conv2d(8, 16, 3, padding=1),
            self.snn.Leaky(**leaky),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(64, 4),
            self.snn.Leaky(**leaky, output=True),
        )

        def run(model, inputs):
            utils.reset(model)
            return sum(model(inputs)[1] for _ in range(3))  # membranes

        learn_fold_verify(model, run, torch.rand(4, 1, 8, 8) * 2, (self.snn.Leaky,))

    def test_explicit_state(self):
        """The tutorials' fully connected network, state carried by hand, one hidden layer."""
        snn = self.snn

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc1, self.lif1 = nn.Linear(32, 64), snn.Leaky(beta=0.9, threshold=0.3)
                self.fc2, self.lif2 = nn.Linear(64, 4), snn.Leaky(beta=0.9)

            def forward(self, x):
                mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
                out = []
                for _ in range(4):
                    spikes, mem1 = self.lif1(self.fc1(x), mem1)
                    _, mem2 = self.lif2(self.fc2(spikes), mem2)
                    out.append(mem2)
                return torch.stack(out).sum(0)

        decided = learn_fold_verify(
            Net(), lambda m, x: m(x), torch.rand(8, 32) * 2, (snn.Leaky,), nm="1:4"
        )
        assert [entry.name for entry in decided.sparse] == ["fc1", "fc2"]  # it drives a neuron


@pytest.mark.filterwarnings("ignore")
class TestNorse:
    @pytest.fixture(autouse=True)
    def _available(self):
        self.norse = pytest.importorskip("norse.torch")

    def test_sequential_state(self):
        """SequentialState with LIFCell, state returned and passed on by the user's loop."""
        norse = self.norse
        parameters = norse.LIFParameters(v_th=torch.tensor(0.1))
        model = norse.SequentialState(
            nn.Conv2d(1, 8, 3, padding=1),
            norse.LIFCell(parameters),
            nn.Conv2d(8, 8, 3, padding=1),
            norse.LIFCell(parameters),
            nn.Flatten(),
            nn.Linear(512, 4),
            norse.LICell(),
        )

        def run(model, inputs):
            state, out = None, 0
            for _ in range(6):
                value, state = model(inputs, state)
                out = out + value
            return out

        learn_fold_verify(model, run, torch.rand(4, 1, 8, 8) * 5, (norse.LIFCell,))

    def test_cells_by_hand(self):
        """LIFCell and a linear readout in a module of the user's own."""
        norse = self.norse

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                parameters = norse.LIFParameters(v_th=torch.tensor(0.1))
                self.inputs, self.lif1 = nn.Linear(16, 32), norse.LIFCell(parameters)
                self.hidden, self.lif2 = nn.Linear(32, 32), norse.LIFCell(parameters)
                self.readout = nn.Linear(32, 4)

            def forward(self, x):
                state1 = state2 = None
                out = 0
                for _ in range(8):
                    spikes, state1 = self.lif1(self.inputs(x), state1)
                    spikes, state2 = self.lif2(self.hidden(spikes), state2)
                    out = out + self.readout(spikes)
                return out

        learn_fold_verify(
            Net(), lambda m, x: m(x), torch.rand(8, 16) * 8, (norse.LIFCell,), nm="2:8"
        )
