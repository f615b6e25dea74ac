# SPDX-License-Identifier: Apache-2.0
"""Synaptic operations equal a count made one by one, for every kind of layer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from profiles import tries
from torch import Tensor, nn

from spikenm_fx.report import report
from spikenm_fx.report.synops import LayerCounter, fan_out, signal_kind

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def brute_force(layer: nn.Module, inputs: Tensor) -> int:
    """Count by probing: each input value, alone, through a layer of zeros and ones.

    A unit impulse at one input position adds one to the output for each non-zero weight it meets.
    """
    probe = type(layer).__new__(type(layer))
    probe.__dict__ = dict(layer.__dict__)
    probe._parameters = {"weight": nn.Parameter((layer.weight != 0).double()), "bias": None}
    total = 0.0
    for index in itertools.product(*map(range, inputs.shape)):
        value = float(inputs[index])
        if value:
            impulse = torch.zeros_like(inputs, dtype=torch.float64)
            impulse[index] = abs(value)
            with torch.no_grad():
                total += float(probe(impulse).sum())
    return round(total)


@st.composite
def layers_and_inputs(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A small layer of any kind with random zeros in its weight, and spikes or counts for it."""
    seed = draw(st.integers(0, 2**16))
    dims = draw(st.sampled_from([0, 1, 1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    torch.manual_seed(seed)
    if dims == 0:
        layer: nn.Module = nn.Linear(channels, outputs, bias=draw(st.booleans()))
        shape = draw(st.sampled_from([(2, channels), (2, 3, channels), (channels,)]))
    else:
        kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        dilation, padding = draw(st.integers(1, 2)), draw(st.integers(0, 2))
        sides = tuple(draw(st.integers(3, 5 if dims < 3 else 3)) for _ in range(dims))
        options = {"stride": stride, "dilation": dilation, "groups": groups}
        if draw(st.booleans()):
            assume(dilation * (kernel - 1) >= padding)
            extra = draw(st.integers(0, max(stride, dilation) - 1))
            layer = TRANSPOSED[dims](
                channels, outputs, kernel, padding=padding, output_padding=extra, **options
            )
        else:
            assume(all(side + 2 * padding >= dilation * (kernel - 1) + 1 for side in sides))
            mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"]))
            layer = CONVS[dims](
                channels, outputs, kernel, padding=padding, padding_mode=mode, **options
            )
        shape = (draw(st.integers(1, 2)), channels, *sides)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < draw(st.sampled_from([0.0, 0.4, 1.0])))
    inputs = torch.randint(0, draw(st.sampled_from([2, 4])), shape).float()
    return layer, inputs


@pytest.mark.slow
@tries(120)
@given(layers_and_inputs())
def test_synops_equal_a_count_one_by_one(case: tuple[nn.Module, Tensor]) -> None:
    """Exact for any kind, stride, padding, dilation, groups, output padding and weight zeros."""
    layer, inputs = case
    counter = LayerCounter(layer, layer.weight.detach() != 0)
    counter.add(inputs, layer(inputs).detach())
    done = counter.operations()
    assert done.synops == brute_force(layer, inputs)
    assert done.weight_sparse == brute_force(layer, torch.ones_like(inputs))
    assert done.macs == 0
    assert done.synops <= done.weight_sparse * max(int(inputs.max()), 1)
    assert done.weight_sparse <= done.dense <= done.padded or layer.padding_mode != "zeros"


@tries(40)
@given(layers_and_inputs())
def test_synops_equal_the_convolution_of_masks(case: tuple[nn.Module, Tensor]) -> None:
    """The definition, sum of conv(spikes, weight != 0), gives the same figure."""
    layer, inputs = case
    probe = type(layer).__new__(type(layer))
    probe.__dict__ = dict(layer.__dict__)
    probe._parameters = {"weight": nn.Parameter((layer.weight != 0).double()), "bias": None}
    counter = LayerCounter(layer, layer.weight.detach() != 0)
    counter.add(inputs, layer(inputs).detach())
    with torch.no_grad():
        assert counter.operations().synops == round(float(probe(inputs.double()).sum()))


def test_string_padding_is_counted() -> None:
    """``padding="same"`` counts like the padding it stands for."""
    named = nn.Conv2d(2, 3, 3, padding="same")
    inputs = (torch.rand(1, 2, 5, 5) < 0.5).float()
    counter = LayerCounter(named, named.weight.detach() != 0)
    counter.add(inputs, named(inputs).detach())
    assert counter.operations().synops == brute_force(named, inputs)


def test_transposed_output_size_is_counted() -> None:
    """An ``output_size`` given at the call, not the layer's output_padding, decides the edge."""
    layer = nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1)
    inputs = torch.ones(1, 2, 4)
    for size in (7, 8):
        found = fan_out(layer, torch.ones_like(layer.weight), (2, 4), (size,))
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.zero_()
            assert float(found.sum()) == float(layer(inputs, output_size=[size]).sum())


def test_analog_input_counts_as_macs() -> None:
    """Analog values are multiplied: MACs by the non-zero weights, no SynOps."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0], [1, 1, 1, 1]]))
    counter = LayerCounter(layer, layer.weight.detach() != 0)
    counter.add(torch.tensor([[0.5, 0.0, 1.5, 2.0]] * 5), torch.zeros(5, 3))
    done = counter.operations()
    assert (done.synops, done.macs, done.dense) == (0, 5 * 6, 5 * 12)


def test_one_analog_batch_makes_the_layer_analog() -> None:
    """A layer that sees spikes in one batch and analog values in another needs multipliers."""
    layer = nn.Linear(4, 3)
    counter = LayerCounter(layer, layer.weight.detach() != 0)
    counter.add(torch.ones(1, 4), torch.zeros(1, 3))
    counter.add(torch.full((1, 4), 0.5), torch.zeros(1, 3))
    assert counter.operations().synops == 0
    assert counter.operations().macs == 24


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.0, 1.0], "spike"),
        ([0.0, 0.0], "spike"),
        ([1.0, 1.0], "spike"),
        ([0.0, 2.0], "integer"),
        ([-1.0, 1.0], "integer"),
        ([0.0, 0.5], "analog"),
        ([0.0, 255.0], "analog"),
        ([0.0, float("nan")], "analog"),
        ([0.0, float("inf")], "analog"),
    ],
)
def test_signal_kinds(values: list[float], kind: str) -> None:
    """{0,1} is spike, small whole numbers integer, all else analog, NaN included."""
    assert signal_kind(torch.tensor(values)) == kind


class Spikes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).float()


def test_agrees_with_rate_times_operations_where_its_assumptions_hold() -> None:
    """On a dense net of linear and unpadded 1x1 layers, operations x rate is the exact count.

    syops-counter multiplies a layer's operations (batch x outputs x weights per output) by the
    mean of its binary input; without padding, overlap and weight zeros that is no approximation.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), Spikes(), nn.Conv2d(8, 6, 1, bias=False), Spikes(),
        nn.Flatten(), nn.Linear(6 * 16, 10, bias=False),
    )  # fmt: skip
    x = torch.randn(5, 3, 4, 4)
    result = report(net, x)
    with torch.no_grad():
        first, second = net[:2](x), net[:4](x)
    macs, conv, head = (layer.operations for layer in result.layers)
    assert macs.macs == 5 * 16 * 3 * 8
    assert conv.synops == round(5 * 16 * 8 * 6 * float(first.double().mean()))
    assert head.synops == round(5 * 96 * 10 * float(second.double().mean()))
    assert 0 < conv.synops < conv.dense


def test_rate_times_operations_is_off_at_padded_edges() -> None:
    """With padding the two differ, and the exact one is the count of real meetings."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    inputs = torch.ones(1, 1, 4, 4)
    counter = LayerCounter(layer, layer.weight.detach() != 0)
    counter.add(inputs, layer(inputs).detach())
    done = counter.operations()
    assert done.padded == 16 * 9
    assert done.synops == int(F.conv2d(inputs, torch.ones(1, 1, 3, 3), padding=1).sum()) == 100


def syops_counter(layer: nn.Module, inputs: Tensor, output: Tensor) -> tuple[float, float]:
    """ACs and MACs of one call, by the rule of syops-counter 0.0.5.

    Operations are batch x outputs x weights per output, padding and bias included; where the input
    holds at most two values within [0, 1] they are accumulations, scaled by its mean, else MACs.
    """
    distinct = inputs.unique()
    spikes = len(distinct) <= 2 and float(distinct.min()) >= 0 and float(distinct.max()) <= 1
    positions = output.numel() // (
        layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    )
    done = positions * layer.weight.numel()
    return (done * float(inputs.double().mean()), 0.0) if spikes else (0.0, float(done))


@pytest.mark.parametrize("padding", [0, 1])
def test_reproduces_the_figures_of_syops_counter(padding: int) -> None:
    """The conventional count of a dense spiking net, layer by layer, to the last operation.

    Held once against syops-counter itself on three third-party models: all layers with binary or
    analog input agreed. Sums of residual branches it calls MACs; here they are SynOps.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=padding, bias=False), Spikes(),
        nn.Conv2d(8, 6, 3, stride=2, padding=padding, groups=2, bias=False), Spikes(),
        nn.Flatten(), nn.LazyLinear(12, bias=False), Spikes(), nn.Linear(12, 4, bias=False),
    )  # fmt: skip
    x = torch.randn(5, 3, 8, 8)
    net(x)
    expected: dict[str, tuple[float, float]] = {}
    for name, layer in net.named_children():
        if list(layer.parameters()):
            layer.register_forward_hook(
                lambda layer, args, output, name=name: expected.__setitem__(
                    name, syops_counter(layer, args[0], output)
                )
            )
    with torch.no_grad():
        net(x)
    for layer in report(net, x).layers:
        acs, macs = expected[layer.name]
        done = layer.operations
        assert done.padded * (layer.rate_in or 0) == pytest.approx(acs)
        assert (done.padded if layer.signal == "analog" else 0) == macs
        if isinstance(net.get_submodule(layer.name), nn.Linear):
            assert done.synops == pytest.approx(acs)
