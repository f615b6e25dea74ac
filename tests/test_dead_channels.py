# SPDX-License-Identifier: Apache-2.0
"""Channels that nothing depends on are removed; the model computes what it did."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from snn_strategies import random_nets
from torch import Tensor, nn
from zoo_cases import build

import spikenm_fx
from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.bench.permutation import in_double, outputs_of
from spikenm_fx.channels import remove_channels, remove_dead_channels
from spikenm_fx.channels.blocks import Columns, staying
from spikenm_fx.channels.left_alone import named_tensors
from spikenm_fx.channels.reachable import can_spike
from spikenm_fx.errors import PlanError
from spikenm_fx.pattern import NM
from spikenm_fx.trace import NeuronSpec, Synapse, coupled_groups, simulate, trace

sj = pytest.importorskip("spikingjelly.activation_based")
from spikingjelly.activation_based import functional, layer, neuron  # noqa: E402


class Net(nn.Module):
    """Three convolutions in multi-step mode, the last two coupled by a residual."""

    def __init__(self, width: int = 16, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = layer.Conv2d(2, width, 3, padding=1, bias=bias)
        self.bn1, self.sn1 = layer.BatchNorm2d(width), neuron.LIFNode()
        self.conv2 = layer.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn2, self.sn2 = layer.BatchNorm2d(width), neuron.LIFNode()
        self.conv3 = layer.Conv2d(width, 8, 1, bias=bias)
        self.bn3, self.sn3 = layer.BatchNorm2d(8), neuron.LIFNode()
        self.flatten, self.fc = layer.Flatten(), layer.Linear(8 * 16, 4)
        functional.set_step_mode(self, "m")
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.uniform_(norm.weight, 4.0, 8.0)
            nn.init.uniform_(norm.bias, 0.2, 1.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.sn1(self.bn1(self.conv1(x)))
        x = self.sn2(self.bn2(self.conv2(x)))
        x = self.sn3(self.bn3(self.conv3(x)))
        return self.fc(self.flatten(x))


X = torch.rand(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 4


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    functional.reset_net(model)
    with torch.no_grad():
        out = model(x)
    functional.reset_net(model)
    return out


def agrees(model: nn.Module, reference: nn.Module, x: Tensor = X) -> None:
    """In float64, on inputs that the removal has not seen."""
    doubled, plain = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    for seed in range(3):
        other = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).double() * 6 - 1
        torch.testing.assert_close(run(doubled, other), run(plain, other), atol=1e-8, rtol=0)


def test_channels_that_no_weight_reads_are_removed() -> None:
    """Zero columns; sizes, identity and values of what stays fit."""
    model = Net()
    with torch.no_grad():
        model.conv2.weight[:, [1, 5, 7]] = 0
        model.conv3.weight[:, [0, 2]] = 0
    reference, parameter = copy.deepcopy(model), model.conv2.weight
    saved = remove_dead_channels(model, X)
    assert saved.removed == 5
    assert model.conv2.weight is parameter
    assert parameter.shape == (14, 13, 3, 3)
    assert (model.conv1.out_channels, model.conv2.in_channels) == (13, 13)
    assert (model.bn1.num_features, model.bn2.num_features) == (13, 14)
    assert saved.parameters[1] == sum(p.numel() for p in model.parameters())
    assert saved.bytes[1] == 4 * saved.parameters[1] < saved.bytes[0]
    agrees(model, reference)
    assert "5 channels removed" in str(saved)
    assert "output of the model" in str(saved)
    assert saved.to_dict()["removed"] == 5


def test_torch_pruning_cuts_what_it_couples_as_we_do() -> None:
    """Plain layers and norms, on the single-step copy of a multi-step model."""
    model = Net()
    with torch.no_grad():
        model.conv2.weight[:, [1, 5, 7]] = 0
    saved = remove_dead_channels(model, X)
    assert [g.by for g in saved.groups if g.removed] == ["torch-pruning"]


def test_our_groups_cut_what_torch_pruning_does_not_couple() -> None:
    """Thresholds of each channel, which it knows nothing of."""

    class PerChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
            self.lif = SequenceLIF()
            self.lif.threshold = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.lif(self.a(x)))

    model, x = PerChannel().eval(), torch.rand(3, 2, 6) * 3
    with torch.no_grad():
        model.b.weight[:, 3] = 0
    reference, before = copy.deepcopy(model), model.lif.threshold.detach().clone()
    saved = remove_dead_channels(model, x)
    assert [g.by for g in saved.groups if g.removed] == ["groups"]
    torch.testing.assert_close(model.lif.threshold, before[[0, 1, 2, 4, 5, 6, 7]])
    torch.testing.assert_close(model(x), reference(x))


def test_removal_goes_on_to_what_it_has_killed() -> None:
    """A channel that only a removed one read is removed in the next round."""
    model = Net()
    with torch.no_grad():
        model.conv3.weight[:, 4] = 0
        model.conv2.weight[:, 9] = 0
        model.conv2.weight[4, 9] = 1.0  # read by that one alone
    reference = copy.deepcopy(model)
    assert remove_dead_channels(model, X).removed == 2
    assert model.conv1.out_channels == model.bn2.num_features == 15
    agrees(model, reference)


def test_neurons_that_can_never_spike_are_removed() -> None:
    """Their norm holds them below the threshold whatever spikes arrive."""
    model = Net()
    with torch.no_grad():
        model.bn2.bias[[2, 3, 11]] = -1000.0
        model.bn2.weight[6], model.bn2.bias[6] = 0.0, 0.5  # a constant below the threshold
        model.bn1.weight[0], model.bn1.bias[0] = 0.0, -1.0  # sees the analog input, yet constant
    reference = copy.deepcopy(model)
    saved = remove_dead_channels(model, X)
    assert saved.removed == 5
    assert model.conv3.in_channels == 12
    agrees(model, reference)


def test_neurons_that_might_spike_stay() -> None:
    """Silent on the examples is not enough, unless batches are given to count."""
    model = Net()
    with torch.no_grad():
        model.bn1.bias[3] = -30.0  # the analog input could be large
    reference = copy.deepcopy(model)
    assert not bool((model.sn1(model.bn1(model.conv1(X)))[:, :, 3] != 0).any())
    functional.reset_net(model)
    assert remove_dead_channels(model, X).removed == 0
    saved = remove_dead_channels(model, X, silent_on=[X, X * 0.5])
    assert saved.removed >= 1
    torch.testing.assert_close(run(model), run(reference), atol=1e-5, rtol=0)


class PreNorm(nn.Module):
    """A norm between the neuron and the layer: dead neurons are constants there."""

    def __init__(self, kernel: int, padding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.sn1 = nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), neuron.LIFNode()
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, kernel, padding=padding, bias=False)
        self.sn2, self.conv3 = neuron.LIFNode(), nn.Conv2d(8, 2, 1)
        nn.init.uniform_(self.norm.bias, 0.5, 1.0)
        nn.init.uniform_(self.norm.weight, 4.0, 8.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.sn1(self.bn1(self.conv1(x))))
        return self.conv3(self.sn2(self.conv2(x)))


def test_constants_go_into_the_next_bias() -> None:
    """A dead neuron's norm still adds its shift: the layer behind takes it over."""
    model = PreNorm(kernel=1, padding=0)
    with torch.no_grad():
        model.bn1.weight[:3], model.bn1.bias[:3] = 0.0, -1.0
    reference = copy.deepcopy(model)
    remove_dead_channels(model, X[0])
    assert model.conv2.in_channels == 5
    assert model.conv2.bias is not None
    agrees(model, reference, X[0])


def test_constants_that_padding_cuts_off_stay() -> None:
    """At the border a padded convolution does not see the constant: no bias can say that."""
    model = PreNorm(kernel=3, padding=1)
    with torch.no_grad():
        model.bn1.weight[:3], model.bn1.bias[:3] = 0.0, -1.0
    assert remove_dead_channels(model, X[0]).removed == 0


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_surviving_layers_stay_n_m(pattern: str) -> None:
    """Whole dead blocks go, single dead channels stay as padding, joined blocks are N:M."""
    model = Net(width=32)
    nm = NM.parse(pattern)
    spikenm_fx.sparsify(model, pattern, method="magnitude", example_inputs=X)
    spikenm_fx.fold(model)
    with torch.no_grad():
        model.conv2.weight[:, :8] = 0
        model.conv2.weight[:, 9] = 0
        model.conv3.weight[:, 16:24] = 0
    reference = copy.deepcopy(model)
    saved = remove_dead_channels(model, X, nm=pattern)
    assert saved.removed >= 16
    assert model.conv2.in_channels % nm.of == 0
    assert model.conv2.in_channels <= 24
    assert model.conv3.in_channels <= 24
    found = {check.name: check for check in spikenm_fx.verify(model).layers}
    for name in ("conv2", "conv3"):
        assert found[name].found is not None
        assert found[name].density <= nm.density
    agrees(model, reference)


@tries(60)
@given(
    nm=st.sampled_from([NM(2, 4), NM(1, 4), NM(1, 8), NM(1, 2)]),
    blocks=st.integers(1, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_chosen_channels_hold_all_live_ones_in_n_m_blocks(
    nm: NM, blocks: int, share: float, seed: int
) -> None:
    """The definition: no live channel is lost, none comes twice, every block stays N:M."""
    torch.manual_seed(seed)
    size = blocks * nm.of
    scores = torch.rand(blocks, nm.of, 3)
    kept = scores.topk(nm.keep, dim=1).indices
    nonzero = torch.zeros(blocks, nm.of, 3, dtype=torch.bool).scatter_(1, kept, True)
    nonzero = nonzero.flatten(0, 1)
    dead = torch.rand(size) < share
    nonzero[dead] = False
    stay = staying(dead, [Columns(nonzero, nm)])
    assert len(set(stay.tolist())) == len(stay)
    assert set((~dead).nonzero().flatten().tolist()) <= set(stay.tolist())
    assert len(stay) % nm.of == 0
    counts = nonzero[stay].unflatten(0, (-1, nm.of)).sum(1)
    assert int(counts.max() if len(stay) else 0) <= nm.keep


@st.composite
def neurons(draw: st.DrawFn) -> NeuronSpec:
    number = st.floats(0, 1.2)
    return NeuronSpec(
        **{"framework": "test", "class_name": "N", "kind": "lif", "exact": True},
        decay=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        gain=draw(st.sampled_from([0.5, 1.0])),
        rest=draw(st.floats(-0.5, 0.5)),
        bias=draw(st.floats(-0.3, 0.3)),
        threshold=draw(st.floats(0.1, 1.5)),
        strict=draw(st.booleans()),
        reset=draw(st.sampled_from(["hard", "subtract", "none"])),
        reset_value=draw(st.floats(-0.5, 0.9)),
        reset_timing=draw(st.sampled_from(["now", "next", "corrected"])),
        initial=draw(number),
        synapse=draw(
            st.none()
            | st.builds(
                Synapse,
                decay=st.sampled_from([0.0, 0.5, 0.9]),
                gain=st.sampled_from([0.5, 1.0]),
                drives=st.sampled_from(["new", "undecayed"]),
            )
        ),
    )


@tries(300)
@given(spec=neurons(), largest=st.floats(-1.5, 1.0), seed=st.integers(0, 999))
def test_what_cannot_spike_does_not(spec: NeuronSpec, largest: float, seed: int) -> None:
    """Simulated with inputs up to the bound, no spike ever comes where it is ruled out."""
    torch.manual_seed(seed)
    bound = torch.full((64,), largest, dtype=torch.float64)
    possible = bool(can_spike(spec, bound)[0])
    inputs = largest - torch.rand(40, 64, dtype=torch.float64) * torch.rand(64).double() * 2
    inputs[:, 0] = largest
    spikes, _ = simulate(spec, inputs)
    assert possible or not bool(spikes.any())


def test_bounds_rule_something_out() -> None:
    """The other side: a neuron held below its threshold is found."""
    spec = NeuronSpec("test", "N", kind="lif", exact=True, decay=0.5, gain=0.5, threshold=1.0)
    assert not bool(can_spike(spec, torch.tensor(0.9)))
    assert bool(can_spike(spec, torch.tensor(1.1)))
    assert not bool(can_spike(spec, torch.tensor(-math.inf)))
    assert bool(can_spike(NeuronSpec("test", "N"), torch.tensor(-9.0)))  # not known exactly


# -- what stays, with a reason ---------------------------------------------------------------------


def test_channels_that_meet_elsewhere_stay() -> None:
    """A LayerNorm, a mean over channels: leaving out a zero changes them."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.norm, self.lif = nn.LayerNorm(8), SequenceLIF()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.a(x))
            spikes = self.lif(self.b(x))
            return self.c(spikes) + spikes.mean(-1, keepdim=True)

    model = Mixes().eval()
    with torch.no_grad():
        model.b.weight[:, 0] = 0
        model.c.weight[:, 0] = 0
    saved = remove_dead_channels(model, torch.rand(3, 2, 6))
    assert saved.removed == 0
    reasons = " ".join(group.reason for group in saved.groups)
    assert "normalises over these channels" in reasons
    assert "reduces over these channels" in reasons


def test_code_written_for_the_old_size_stays_with_a_reason() -> None:
    """A forward with the width in it cannot run narrower: the model is as it was."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.lif = nn.Linear(6, 8), nn.Linear(8, 2), SequenceLIF()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.lif(self.a(x)).view(3, 2, 8))

    model = Fixed().eval()
    with torch.no_grad():
        model.b.weight[:, 0] = 0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saved = remove_dead_channels(model, torch.rand(3, 2, 6))
    assert saved.removed == 0
    assert any("does not run with fewer channels" in group.reason for group in saved.groups)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.a.out_features == 8


def test_masked_models_and_models_in_training_are_refused() -> None:
    """Both verbs, before anything is touched."""
    masked = spikenm_fx.sparsify(Net())
    trained = Net()
    run(trained)
    trained(X).sum().backward()
    functional.reset_net(trained)
    for verb in (remove_dead_channels, remove_channels):
        with pytest.raises(PlanError, match="still masked"):
            verb(masked, X)
        with pytest.raises(PlanError, match="holds a gradient"):
            verb(trained, X)


def test_an_exception_half_way_leaves_the_model_as_it_was() -> None:
    """The caller's batches end in an error after the model was read."""
    model = Net()
    with torch.no_grad():
        model.conv2.weight[:, 1] = 0
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def batches():
        yield X
        raise KeyError("no more data")

    with pytest.raises(KeyError):
        remove_dead_channels(model, X, silent_on=batches())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- the least active ------------------------------------------------------------------------------


def test_the_least_active_channels_are_removed() -> None:
    """A share of each group stays, the channels that spike most, and the model trains on."""
    model = Net()
    with torch.no_grad():
        model.bn1.bias[4:] -= 30.0  # only the first four spike
    firing = model.conv1.weight[:4].detach().clone()
    saved = remove_channels(model, X, keep=0.25)
    assert model.conv1.out_channels == model.conv2.in_channels == 4
    torch.testing.assert_close(model.conv1.weight.detach(), firing)
    assert model.conv3.out_channels == 2
    assert model.fc.in_features == 2 * 16
    assert saved.parameters[1] < saved.parameters[0] / 4
    assert run(model).shape == (3, 2, 4)
    model.train()
    model(X).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_by_magnitude_and_in_multiples() -> None:
    """The channels with the largest outgoing weights; numbers that N:M can use."""
    model = Net()
    with torch.no_grad():
        model.conv2.weight[:, 5:7] *= 100
    big = model.conv1.weight[5:7].detach().clone()
    remove_channels(model, X, keep=0.01, score="magnitude", multiple_of=2)
    assert model.conv2.in_channels == 2
    torch.testing.assert_close(model.conv1.weight.detach(), big)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"score": "size"}, "is not known"),
        ({"multiple_of": 0}, "must be 1 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, says: str) -> None:
    """With the value and the range."""
    with pytest.raises(PlanError, match=says):
        remove_channels(Net(), X, **options)


# -- whole models ----------------------------------------------------------------------------------

WHOLE = [
    *(f"spikingjelly/{n}/m" for n in ("sew_resnet18", "spikformer", "qkformer")),
    *("snntorch/conv", "norse/loop", "hand/module"),
]


def kill_some(model: nn.Module, x: tuple[Tensor, ...]) -> int:
    """Zero the weights that read every fifth channel of each free group."""
    killed = 0
    tensors = named_tensors(model)
    for group in coupled_groups(trace(model, x)):
        if group.frozen or not group.consumers:
            continue
        for member in group.consumers:
            length = member.outer * group.size * member.inner
            part = tensors[member.tensor].data.narrow(member.axis, member.offset, length)
            part = part.movedim(member.axis, 0)
            kept = torch.arange(length) // member.inner % group.size % 5 != 3
            part.mul_(kept.reshape(-1, *[1] * (part.dim() - 1)))
        killed += len(range(3, group.size, 5))
    return killed


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_agree_after_removal(name: str) -> None:
    """Residual streams, attention, flattened maps: float64 outputs to 1e-8 on other inputs."""
    # built twice: a copy of an snnTorch model is not reset by snnTorch
    case, reference = build(name), build(name)
    assert kill_some(case.model, case.inputs) == kill_some(reference.model, reference.inputs) > 0
    saved = remove_dead_channels(case.model, case.inputs, nm="1:32")
    assert saved.removed > 0
    with in_double(case) as (smaller, precise):
        found = outputs_of(smaller)
    with in_double(reference) as (whole, _):
        expected = outputs_of(whole)
    tolerance = 1e-8 if precise else 1e-3
    for x, y in zip(expected, found, strict=True):
        assert float((x - y).abs().max()) <= tolerance


@tries(10)
@given(net=random_nets())
def test_random_networks_agree_after_removal(net: tuple[nn.Module, Tensor]) -> None:
    """Joins, heads, groups, gates, concatenations and per-channel thresholds."""
    model, x = net
    kill_some(model, (x,))
    reference = copy.deepcopy(model)
    remove_dead_channels(model, x)
    other = x.flip(0) * 1.3
    torch.testing.assert_close(model(other), reference(other), atol=1e-8, rtol=0)
