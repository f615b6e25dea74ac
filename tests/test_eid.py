# SPDX-License-Identifier: Apache-2.0
"""Eligibility-inspired distillation: credits against a loop, targets, gradients, state, hooks."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from loops import Triangle
from strategies import ALL_LAYERS, Case, cases, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spikenm_fx
from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.masks import EID, eid_loss, masked_layers
from spikenm_fx.masks.eid import soft_targets
from spikenm_fx.masks.eid.eligibility import correlate, filtered_slopes
from spikenm_fx.masks.methods.spikenm import SpikeNM
from spikenm_fx.masks.rule import KEEP
from spikenm_fx.trace import NeuronSpec, Surrogate, Synapse, register_neuron

DECAY, GAIN, THRESHOLD = 0.6, 0.5, 0.3


class Leaky(nn.Module):
    """A hand-written neuron over ``[T, B, *]``; nothing but its code tells its rule."""

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(x[0]), []
        for current in x:
            v = DECAY * v + GAIN * current
            spike = Triangle.apply(v - THRESHOLD)
            v = v - THRESHOLD * spike.detach()
            out.append(spike)
        return torch.stack(out)


class KnownLeaky(Leaky):
    """The same, its rule told to the library."""


class Stepper(nn.Module):
    """The same, one step a call, state in the module."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Tensor | None = None

    def reset(self) -> None:
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        self.v = GAIN * x if self.v is None else DECAY * self.v + GAIN * x
        spike = Triangle.apply(self.v - THRESHOLD)
        self.v = self.v - THRESHOLD * spike.detach()
        return spike


class Cell(nn.Module):
    """The same, one step a call, state carried by the caller."""

    def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        v = GAIN * x if v is None else DECAY * v + GAIN * x
        spike = Triangle.apply(v - THRESHOLD)
        return spike, v - THRESHOLD * spike.detach()


def leaky_spec(module: nn.Module) -> NeuronSpec:
    return NeuronSpec(
        "mine",
        "KnownLeaky",
        kind="lif",
        exact=True,
        decay=DECAY,
        gain=GAIN,
        threshold=THRESHOLD,
        reset="subtract",
        detach_reset=True,
        surrogate=Surrogate("Triangle", function=Triangle.apply),
        state=(),
        time_axis=0,
        step_mode="multi",
    )


register_neuron(KnownLeaky, leaky_spec)


class Folded(nn.Module):
    """A layer over folded time."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def spiking(settings: EID | None = None, **options) -> SpikeNM:
    return SpikeNM(eid=settings or EID("eligibility", ema=0.0, every=1), **options)


def sparse(model: nn.Module, nm="2:4", settings: EID | None = None, **options) -> nn.Module:
    method = options.pop("method", None) or spiking(settings)
    return spikenm_fx.sparsify(
        model, nm, method=method, rules=ALL_LAYERS, remainder="pad", **options
    ).train()


def average_of(model: nn.Module, name: str) -> Tensor | None:
    """The running credit without the factor |W|, as a checkpoint holds it; None for zeros."""
    average = model.state_dict()[f"{name}.weight_eid"]
    return average.clone() if average.any() else None


def credit_of(model: nn.Module, name: str, *outputs: Tensor) -> Tensor:
    """The credits of one step in which the model gave these outputs; its weights stay."""
    torch.stack([out.sum() for out in outputs]).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    credit = average_of(model, name)
    assert credit is not None
    return credit


def close(got: Tensor, expected: Tensor) -> None:
    """Credits are kept in float32."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)


def watch_of(model: nn.Module) -> Any:
    """What watches the model; nothing public tells which neuron it has found."""
    return next(layer._nm_mask.guide.observed.watch for _, layer in masked_layers(model))


def oracle(layer: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """E_ij = batch mean of sum_t psi_i[t] * trace_j[t], synapse by synapse and step by step."""
    steps, batch = x.shape[:2]
    v, slopes = torch.zeros_like(z[0]), []
    for current in z:
        v = DECAY * v + GAIN * current
        slopes.append((1 - (v - THRESHOLD).abs()).clamp(min=0))
        v = v - THRESHOLD * (v >= THRESHOLD).to(v.dtype)
    traces, trace = [], torch.zeros_like(x[0])
    for inputs in x:
        trace = DECAY * trace + GAIN * inputs
        traces.append(trace)
    weight = layer.weight_dense
    out = torch.zeros_like(weight)
    for synapse in itertools.product(*map(range, weight.shape)):
        total = 0.0
        for t in range(steps):
            if isinstance(layer, nn.Linear):
                i, j = synapse
                total += float((slopes[t][:, i] * traces[t][:, j]).sum())
                continue
            o, c, *kernel = synapse
            per_group = layer.out_channels // layer.groups
            channel = (o // per_group) * (layer.in_channels // layer.groups) + c
            height, width = slopes[t].shape[-2:]
            for row, column in itertools.product(range(height), range(width)):
                at = [
                    p * layer.stride[d] + kernel[d] * layer.dilation[d] - layer.padding[d]
                    for d, p in enumerate((row, column))
                ]
                inside = all(0 <= a < n for a, n in zip(at, x.shape[-2:], strict=True))
                if inside:
                    pre = traces[t][:, channel, at[0], at[1]]
                    total += float((slopes[t][:, o, row, column] * pre).sum())
        out[synapse] = total / batch
    return out


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "conv": (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 5, 4)),
    "strided": (lambda: nn.Conv2d(4, 2, (3, 2), stride=(2, 1), padding=(1, 0)), (4, 6, 5)),
    "grouped": (lambda: nn.Conv2d(8, 4, 2, groups=2, dilation=2, bias=False), (8, 4, 5)),
}


def plain_output(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer over folded time gives, without a call that a hook sees."""
    with torch.no_grad():
        return type(layer).forward(layer, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def spikes(*shape: int) -> Tensor:
    return (torch.rand(*shape) < 0.5).double()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("neuron", [KnownLeaky, Leaky])
@pytest.mark.parametrize("steps", [1, 5])
def test_credit_is_the_double_loop(kind: str, neuron: type[nn.Module], steps: int) -> None:
    """E equals a loop over time and synapses, for neurons with and without a known rule."""
    make, shape = LAYERS[kind]
    model = nn.Sequential(Folded(make()), neuron()).double()
    x = spikes(steps, 3, *shape) * 6
    sparse(model)
    expected = oracle(model[0].layer, x, plain_output(model[0].layer, x))
    out = model(x)
    assert 0.01 < out.mean() < 0.99
    got = credit_of(model, "0.layer", out)
    assert expected.abs().max() > 0
    close(got, expected)


@given(cases(dtypes=(torch.float64,), batches=(2,)))
def test_correlation_is_the_weight_gradient(case: Case) -> None:
    """Slopes times inputs equals what autograd gives for the layer's weight, for every kind."""
    model = case.model()
    layer, x = model[0], case.inputs()
    y = layer(x)
    slopes = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, layer.weight, slopes)
    torch.testing.assert_close(correlate(layer, x, slopes), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("drives", ["new", "undecayed"])
def test_synapses_are_part_of_the_trace(drives: str) -> None:
    """Filtered slopes equal autograd through the linear path of a neuron with a synapse."""
    synapse = Synapse(0.7, 0.4, drives)  # type: ignore[arg-type]
    spec = copy.copy(leaky_spec(nn.Identity()))
    object.__setattr__(spec, "synapse", synapse)
    object.__setattr__(spec, "reset", "none")
    z = torch.randn(6, 2, 3, dtype=torch.float64).requires_grad_()
    v, i, out = torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), []
    for x in z:
        new = 0.7 * i + 0.4 * x
        v = DECAY * v + GAIN * (new if drives == "new" else i + x)
        i = new
        out.append(Triangle.apply(v - THRESHOLD))
    (expected,) = torch.autograd.grad(torch.stack(out).sum(), z)
    torch.testing.assert_close(filtered_slopes(spec, z.detach()), expected)


class Looped(nn.Module):
    """One step at a time, ``step`` being layer and neuron."""

    def __init__(self, layer: nn.Module, neuron: nn.Module, style: str) -> None:
        super().__init__()
        self.layer, self.neuron, self.style = layer, neuron, style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "multi":
            return self.neuron(self.layer(x))
        if hasattr(self.neuron, "reset") and self.style == "single":
            self.neuron.reset()
        state, out = None, []
        for current in self.layer(x) if self.style == "folded" else x:
            z = current if self.style == "folded" else self.layer(current)
            if self.style in ("state", "folded"):
                spike, state = self.neuron(z, state)
            else:
                spike = self.neuron(z)
            out.append(spike)
        return torch.stack(out)


STYLES = {
    "multi, known": (KnownLeaky, "multi"),
    "multi, unknown": (Leaky, "multi"),
    "single": (Stepper, "single"),
    "functional": (Cell, "state"),
    "layer over all steps, functional": (Cell, "folded"),
}


@pytest.mark.parametrize("style", STYLES)
def test_styles_agree(style: str) -> None:
    """Multi-step, single-step and functional neurons give the same credits on the same data."""
    torch.manual_seed(3)
    layer = nn.Linear(8, 6).double()
    x = spikes(5, 4, 8) * 2
    reference = sparse(Looped(copy.deepcopy(layer), KnownLeaky(), "multi"))
    neuron, how = STYLES[style]
    model = sparse(Looped(layer, neuron(), how))
    out, other = reference(x), model(x)
    assert 0.02 < out.mean() < 0.98
    assert torch.equal(out, other)
    close(credit_of(model, "layer", other), credit_of(reference, "layer", out))


def framework_nets(layer: nn.Linear) -> dict[str, nn.Module]:
    """The same LIF after the same layer: v = v + (x - v) / 2, threshold 0.12, soft reset."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    snn = pytest.importorskip("snntorch")
    norse = pytest.importorskip("norse.torch")
    boxes = pytest.importorskip("norse.torch.functional.lif_box")
    resets = pytest.importorskip("norse.torch.functional.reset")
    surrogate = snn.surrogate.fast_sigmoid(slope=1.0)  # Norse's "super" knows no other
    jelly = {
        "tau": 2.0,
        "v_threshold": 0.12,
        "v_reset": None,
        "detach_reset": True,
        "surrogate_function": surrogate,
    }
    box = boxes.LIFBoxParameters(
        tau_mem_inv=torch.tensor(500.0),
        v_th=torch.tensor(0.12),
        alpha=torch.tensor(1.0),
        reset_method=resets.reset_subtract,
    )
    half = copy.deepcopy(layer)  # snnTorch's Leaky does not scale its input
    with torch.no_grad():
        half.weight /= 2
        half.bias /= 2
    leaky = snn.Leaky(beta=0.5, threshold=0.12, reset_delay=False, spike_grad=surrogate)
    fresh = lambda: copy.deepcopy(layer)  # noqa: E731
    return {
        "spikingjelly multi": Looped(fresh(), neuron.LIFNode(step_mode="m", **jelly), "multi"),
        "spikingjelly single": Looped(fresh(), neuron.LIFNode(step_mode="s", **jelly), "single"),
        "snntorch": Looped(half, leaky, "state"),
        "norse": Looped(fresh(), norse.LIFBoxCell(box), "state"),
    }


def test_frameworks_agree() -> None:
    """SpikingJelly, snnTorch and Norse versions of one network have the same credits."""
    torch.manual_seed(1)
    layer = nn.Linear(8, 6)
    with torch.no_grad():  # small positive currents: one reset always brings v below the threshold
        layer.weight.uniform_(0.03, 0.09)
        layer.bias.zero_()
    nets = framework_nets(layer)
    x = spikes(5, 4, 8).float()
    credits, outputs = {}, {}
    for name, net in nets.items():
        sparse(net)
        outputs[name] = net(x)
        credit = credit_of(net, "layer", outputs[name])
        credits[name] = credit * 0.5 if name == "snntorch" else credit
    reference = "spikingjelly multi"
    assert 0.02 < outputs[reference].mean() < 0.98
    for name in nets:
        assert torch.equal(outputs[name], outputs[reference]), name
        torch.testing.assert_close(credits[name], credits[reference], rtol=1e-4, atol=1e-6)


def test_the_users_own_loop_over_time() -> None:
    """A model called once per step has the credits of the whole sequence, two sequences apart."""
    model = sparse(nn.Sequential(nn.Linear(8, 6), Stepper()).double())
    x = spikes(2, 5, 4, 8) * 2
    expected, outputs = [], []
    for sequence in x:
        expected.append(oracle(model[0], sequence, plain_output(model[0], sequence)))
    for sequence in x:
        model[1].reset()
        outputs += [model(step) for step in sequence]
    close(credit_of(model, "0", *outputs), torch.stack(expected).mean(0))


class Turns(nn.Module):
    """One layer in turn before two neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first, self.second = nn.Linear(6, 6), Stepper(), Stepper()

    def forward(self, x: Tensor) -> Tensor:
        self.first.reset()
        self.second.reset()
        return torch.stack([self.second(self.layer(self.first(self.layer(s)))) for s in x])


def test_a_layer_used_twice_gets_both_credits() -> None:
    """Each use counts with the neuron that it drives."""
    model = sparse(Turns().double())
    x = spikes(4, 3, 6) * 3
    z1 = plain_output(model.layer, x)
    between = leaky_spikes(z1)
    z2 = plain_output(model.layer, between)
    expected = oracle(model.layer, x, z1) + oracle(model.layer, between, z2)
    # samples are counted at the first neuron
    close(credit_of(model, "layer", model(x)), expected)


def leaky_spikes(z: Tensor) -> Tensor:
    return Leaky()(z).detach()


class Pooled(nn.Module):
    """Pooling between layer and neuron: places differ, so the graph must be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.neuron = nn.Conv2d(4, 3, 3), nn.AvgPool2d(2), KnownLeaky()

    def between(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.between(x))


class Swapped(Pooled):
    """The same number of values in another order."""

    def between(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(2, 4)


@pytest.mark.parametrize("cls", [Pooled, Swapped])
def test_other_places_go_through_the_graph(cls: type[Pooled]) -> None:
    """Pooled or transposed outputs get their slopes back through the layer's own graph."""
    model = sparse(cls().double())
    x = spikes(3, 2, 4, 8, 8) * 3
    plain = copy.deepcopy(model)
    spikenm_fx.fold(plain)
    with torch.no_grad():
        plain.conv.weight.copy_(model.conv.weight)
    z = plain.between(x)
    slopes = filtered_slopes(leaky_spec(model), z.detach())
    (expected,) = torch.autograd.grad(z, plain.conv.weight, slopes)
    close(credit_of(model, "conv", model(x)), expected / 2)


# -- targets and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", ["mean", "zscore"])
def test_targets(normalise: str) -> None:
    """Targets are distributions over what is present, uniform where credits are all alike."""
    credit = torch.rand(5, 4, 3)
    credit[0], credit[1] = 0.0, 2.5
    present = torch.ones(5, 4, 1, dtype=torch.bool)
    present[2, 3] = False
    q = soft_targets(credit, present, 0.5, normalise)
    torch.testing.assert_close(q.sum(1), torch.ones(5, 3))
    torch.testing.assert_close(q[:2], torch.full((2, 4, 3), 0.25))
    assert (q[2, 3] == 0).all()
    torch.testing.assert_close(q[2, :3], soft_targets(credit[2:3, :3], None, 0.5, normalise)[0])
    assert torch.equal(q[3:].argmax(1), credit[3:].argmax(1))


def pair(settings: EID | None = None, nm: str = "2:4", **options) -> tuple[nn.Module, nn.Module]:
    """The same sparse network with and without EID."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 12), KnownLeaky(), nn.Linear(12, 7), Leaky())

    settings = settings or EID("weight*eligibility", weight=(0.7, 0.7))
    return (
        sparse(build(), nm, method=SpikeNM(eid=settings, **options)),
        sparse(build(), nm, method=SpikeNM(eid=None, **options)),
    )


def drive(scale: float = 5.0) -> Tensor:
    return spikes(4, 8, 10).float() * scale


def backward(model: nn.Module, x: Tensor, scale: float = 1.0) -> None:
    out = model(x)
    assert 0.01 < out.mean() < 0.99
    torch.manual_seed(7)
    (out * torch.randn_like(out)).sum().mul(scale).backward()


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far one step has moved the logits."""
    now = logits_of(model)
    return {key: now[key] - value for key, value in before.items()}


def logits_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    found = {key: value for key, value in state.items() if key.endswith("_logits")}
    return {key: value.flatten(0, 1).clone() for key, value in found.items()}


def sampling(logits: Tensor, weight: Tensor, present: Tensor, kappa: float) -> Tensor:
    """P of the first step: softmax of kappa / spread times logits and prior, block by block."""
    spread = (logits - logits.mean(1, keepdim=True)).square().mean().sqrt()
    mean = (weight.abs() * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
    raised = logits + 3.0 * spread * weight.abs() / mean
    return torch.softmax((raised * kappa / spread).masked_fill(~present, -torch.inf), 1)


def blocks_of(weight: Tensor, of: int) -> tuple[Tensor, Tensor]:
    """A linear weight in blocks ``(lead, M, 1)``, and which positions are no padding."""
    rows, columns = weight.shape
    padded = -(-columns // of) * of
    out = torch.zeros(rows, padded, dtype=weight.dtype)
    out[:, :columns] = weight
    there = torch.arange(padded).expand(rows, -1) < columns
    return out.view(-1, of, 1), there.reshape(-1, of, 1)


def one_step(model: nn.Module, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """A step without movement of the weights; returns that of the logits."""
    before = logits_of(model)
    backward(model, x, scale)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    return moved(model, before)


def momentum_added(model: nn.Module, without: nn.Module, name: str) -> Tensor:
    """What a pull of weight 0.7 has added to the logits' gradient, in units of the task's own.

    The first momentum is (1 - 0.99) times the gradient: logits themselves move by its sign.
    """
    found, task = (m.state_dict()[f"{name}.weight_momentum"] for m in (model, without))
    return (found - task).flatten(0, 1) / (0.7 * (1 - KEEP))


@pytest.mark.parametrize("nm", ["2:4", "1:8", "1:5"])
def test_what_is_added_is_p_minus_q(nm: str) -> None:
    """EID adds weight * (p - q) in units of the task's own step, and nothing to the weights."""
    with_eid, without = pair(nm=nm)
    x, of = drive(), int(nm[-1])
    before = logits_of(with_eid)
    one_step(with_eid, x), one_step(without, x)
    method = SpikeNM()
    kappa = method.schedule(None, spikenm_fx.NM(int(nm[0]), of)).kappa_at(0)
    for name in ("0", "2"):
        one, other = with_eid.get_submodule(name), without.get_submodule(name)
        assert torch.equal(one.weight_dense.grad, other.weight_dense.grad)
        key = f"{name}.weight_logits"
        weight, present = blocks_of(one.weight_dense.detach(), of)
        average, _ = blocks_of(with_eid.state_dict()[f"{name}.weight_eid"], of)
        p = sampling(before[key], weight, present, kappa)
        q = soft_targets(average * weight.abs(), present, 1.0)
        added = momentum_added(with_eid, without, name)
        expected = p - q
        torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-4)
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(added.sum(1), torch.zeros_like(added.sum(1)), atol=1e-2, rtol=0)


def test_loss_scaling_leaves_the_balance_alone() -> None:
    """Task and EID move the logits alike under any factor of the loss."""
    (one, _), (other, _) = pair(), pair()
    x = drive()
    first, second = one_step(one, x), one_step(other, x, 1024.0)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-4, atol=1e-7)


def test_explicit_loss() -> None:
    """eid_loss has the gradient (p - q) * kappa per block, and replaces the automatic one."""
    model, without = pair(EID("weight*eligibility", automatic=False))
    x = drive()
    before = logits_of(model)
    assert eid_loss(without).item() == 0
    out = model(x)
    loss = eid_loss(model)
    assert loss.item() > 0
    parameters = dict(model.named_parameters())
    keys = [key for key in before if parameters[key].requires_grad]
    grads = dict(
        zip(keys, torch.autograd.grad(loss, [parameters[k] for k in keys]), strict=True)
        if keys
        else ()
    )
    kappa = SpikeNM().schedule(None, spikenm_fx.NM(2, 4)).kappa_at(0)
    for key, grad in grads.items():
        layer = model.get_submodule(key.split(".")[0])
        weight, present = blocks_of(layer.weight_dense.detach(), 4)
        p = sampling(before[key], weight, present, kappa)
        spread = (before[key] - before[key].mean(1, keepdim=True)).square().mean().sqrt()
        average, _ = blocks_of(model.state_dict()[f"{key.split('.')[0]}.weight_eid"], 4)
        q = soft_targets(average * weight.abs(), present, 1.0)
        expected = (p - q) * kappa / spread / len(p)
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
    out.sum().backward()
    other = without(x)
    other.sum().backward()
    for net in (model, without):
        torch.optim.SGD(net.parameters(), lr=0.0).step()
    for key, value in moved(model, before).items():
        assert torch.equal(value, logits_of(without)[key] - before[key]), key


def test_explicit_loss_moves_logits() -> None:
    """Added to the loss it pulls the logits towards the targets, or it is refused with a reason."""
    model, without = pair(EID("weight*eligibility", automatic=False))
    x = drive()
    before = logits_of(model)
    for net in (model, without):
        out = net(x)
        total = out.square().sum()
        if net is model:
            total = total + 1e3 * eid_loss(net)
        total.backward()
        torch.optim.SGD(net.parameters(), lr=0.0).step()
    moves, task = moved(model, before), moved(without, before)
    assert any(not torch.equal(value, task[key]) for key, value in moves.items())


@pytest.mark.parametrize("credit", ["weight", "weight*rate", "eligibility", "weight*eligibility"])
def test_credit_variants(credit: str) -> None:
    """|W| and |W| * sqrt(rate) are what they say; the factor |W| can be left out."""
    settings = EID(credit, ema=0.0, weight=(0.7, 0.7))
    model, without = pair(settings)
    x = drive()
    before = logits_of(model)
    one_step(model, x), one_step(without, x)
    weight, present = blocks_of(model[0].weight_dense.detach(), 4)
    size = model[0].weight_dense.detach().abs()
    rate = x.square().mean((0, 1)).sqrt().expand_as(size)
    average = average_of(model, "0")
    if credit == "weight*rate":
        torch.testing.assert_close(average, rate)
    known = torch.ones_like(size) if credit == "weight" else average
    assert known is not None
    credits_, _ = blocks_of(known * size if "weight" in credit else known, 4)
    kappa = SpikeNM().schedule(None, spikenm_fx.NM(2, 4)).kappa_at(0)
    p = sampling(before["0.weight_logits"], weight, present, kappa)
    q = soft_targets(credits_, present, 1.0)
    added = momentum_added(model, without, "0")
    torch.testing.assert_close(added, p - q, rtol=1e-3, atol=1e-4)


def test_refresh_rhythm_and_average() -> None:
    """Credits are measured every K steps, once a step, and averaged."""
    model, _ = pair(EID("weight*rate", every=3, ema=0.75))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen, expected, before = [], None, None
    for step in range(7):
        optimizer.zero_grad()
        x = drive(4.0 + step)
        for _ in range(2):  # accumulation: no second refresh
            backward(model, x)
        if step % 3 == 0:
            rate = x.square().mean((0, 1)).sqrt().expand(12, 10)
            expected = rate if expected is None else 0.75 * expected + 0.25 * rate
        optimizer.step()
        now = average_of(model, "0")
        assert now is not None
        if before is None or not torch.equal(now, before):
            seen.append(step)
        before = now
    assert seen == [0, 3, 6]
    torch.testing.assert_close(before, expected)


# -- bad and unusual input ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast credits are float32 and everything stays finite."""
    model, _ = pair()
    with torch.autocast("cpu", dtype):
        out = model(drive())
    before = logits_of(model)
    out.float().square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    for name, _ in masked_layers(model):
        average = average_of(model, name)
        assert average is not None
        assert average.dtype == torch.float32
    for value in moved(model, before).values():
        assert torch.isfinite(value).all()
        assert value.any()


def test_overflow_keeps_the_old_average() -> None:
    """Infinite activations of a half-precision run never enter the average."""
    model, _ = pair(EID("eligibility", every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    backward(model, drive())
    optimizer.step()
    before = average_of(model, "0")
    assert before is not None
    x = drive()
    x[0, 0, 0] = torch.inf
    optimizer.zero_grad()
    model(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpikeNMWarning)  # that gradients are not finite
        optimizer.step()
    assert torch.equal(average_of(model, "0"), before)


def test_silent_neuron() -> None:
    """E = 0 (a slope of zero everywhere) leaves the task's gradient and gives no NaN."""
    model, without = pair()
    with torch.no_grad():
        for net in (model, without):
            net[0].bias.fill_(-100.0)
            net[0].weight_dense.zero_()
    x, before = drive(), logits_of(model)
    for net in (model, without):
        net(x).sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.0).step()
    assert average_of(model, "0") is None
    first, second = moved(model, before), moved(without, before)
    assert torch.equal(first["0.weight_logits"], second["0.weight_logits"])
    assert all(torch.isfinite(value).all() for value in first.values())
    half = soft_targets(torch.zeros(3, 4, 1), None, 1.0)
    torch.testing.assert_close(half, torch.full((3, 4, 1), 0.25))


def test_constant_and_zero_input() -> None:
    """Constant input gives uniform targets without |W|; zero input gives no credits."""
    model, _ = pair(EID("eligibility"))
    credit = credit_of(model, "0", model(torch.ones(4, 8, 10)))
    blocks, present = blocks_of(credit, 4)
    q = soft_targets(blocks, present, 1.0)
    torch.testing.assert_close(q[:, :2], q[:, :1].expand(-1, 2, -1), atol=1e-6, rtol=0)
    model, _ = pair(EID("eligibility"))
    model(torch.zeros(4, 8, 10)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert average_of(model, "0") is None
    assert torch.isfinite(model.state_dict()["0.weight_logits"]).all()


def test_layer_without_neuron() -> None:
    """A readout learns from the task alone, and the watch says so."""
    model = sparse(network(), settings=EID())
    model(torch.randn(8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert average_of(model, "4") is None
    assert average_of(model, "2") is not None
    assert "no neuron" in watch_of(model).notes["4"]


def test_eval_in_the_middle() -> None:
    """Evaluation sees no hooks at work and changes nothing of the run."""
    one, other = pair()[0], pair()[0]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (one, other)]
    for step in range(4):
        x = drive()
        for model, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        if step == 1:
            one.eval()
            one(drive())
            with torch.no_grad():
                one(drive())
            one.train()
    for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_examples_show_the_neurons_before_training() -> None:
    """With example_inputs the neurons are known at once; a wrong example changes nothing."""
    model = nn.Sequential(nn.Linear(10, 12), Leaky())
    with pytest.raises(spikenm_fx.SpikeNMError):
        sparse(model, example_inputs=torch.rand(3, 2, 99))
    assert not list(masked_layers(model))
    sparse(model, example_inputs=torch.rand(3, 2, 10))
    assert watch_of(model).connected
    assert [neuron.name for neuron in watch_of(model).sources[0].posts] == ["1"]


# -- life of the hooks ----------------------------------------------------------------------------


def test_a_first_forward_in_a_transform_is_no_example() -> None:
    """Tensors of torch.func cannot be traced: EID says so, and waits for a plain forward."""

    class Trick(nn.Module):
        """A firing that torch.func can differentiate: the detach trick."""

        def forward(self, x: Tensor) -> Tensor:
            soft = torch.sigmoid(4 * x)
            return ((x > 0).to(x.dtype) - soft).detach() + soft

    model = sparse(nn.Sequential(nn.Linear(16, 16), Trick(), nn.Linear(16, 8)))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.rand(3, 16)

    @torch.func.grad
    def gradients(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, x).square().sum()

    with pytest.warns(SpikeNMWarning, match="outside of torch.func") as caught:
        grads = [gradients(values) for _ in range(2)][1]
    assert len(caught) == 1
    assert grads["0.weight"].any()
    assert not watch_of(model).connected
    model(x)
    assert watch_of(model).connected


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_fold_leaves_no_hook() -> None:
    """After fold there is no hook, no credit and no key of ours."""
    model, _ = pair()
    keys = list(nn.Sequential(nn.Linear(10, 12), Leaky(), nn.Linear(12, 7), Leaky()).state_dict())
    backward(model, drive())
    assert hooks_of(model) > 0
    assert not any("weight_eid" in key for key in spikenm_fx.dense_state_dict(model))
    spikenm_fx.fold(model)
    assert hooks_of(model) == 0
    assert list(model.state_dict()) == keys


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])
def test_resume_is_bit_exact(at: int) -> None:
    """A run resumed from disk, credits included, ends in the same bits."""
    data = [drive() for _ in range(7)]
    settings = EID(every=2, weight=(3.0, 1.0))

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = pair(settings)
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer = build()
    for x in data[:at]:
        step(model, optimizer, x)
    disk = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, disk)
    for x in data[at:]:
        step(model, optimizer, x)
    disk.seek(0)
    saved = torch.load(disk, weights_only=True)
    resumed, other = build()
    resumed.load_state_dict(saved["model"], strict=True)
    other.load_state_dict(saved["optimizer"])
    for x in data[at:]:
        step(resumed, other, x)
    for (key, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert average_of(model, "0") is not None


def test_strict_loading_asks_for_credits() -> None:
    """A checkpoint without credits does not silently start them anew."""
    with_eid, without = pair()
    with pytest.raises(RuntimeError, match="weight_eid"):
        with_eid.load_state_dict(without.state_dict())
    with_eid.load_state_dict(without.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="weight_eid"):
        without.load_state_dict(with_eid.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_their_own_credits(how: str) -> None:
    """Copies go on as the original would, and share nothing with it."""
    model, _ = pair()
    x = drive()
    model(x)  # in the middle of a step
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    one_step(twin, x)
    assert average_of(twin, "0") is not None
    assert average_of(model, "0") is None
    model.zero_grad()
    one_step(model, x)
    same_credits(model, twin)
    spikenm_fx.fold(twin)
    assert hooks_of(twin) == 0
    assert hooks_of(model) > 0


def same_credits(model: nn.Module, other: nn.Module) -> None:
    """Both have credits, and they agree."""
    states = model.state_dict(), other.state_dict()
    keys = [key for key in states[0] if key.endswith("_eid")]
    assert keys
    for key in keys:
        assert states[0][key].any()
        torch.testing.assert_close(states[0][key], states[1][key])


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, *, plain: bool = False) -> None:
        super().__init__()
        self.inner, self.plain = inner, plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=False)


def test_recomputation_is_not_seen_twice() -> None:
    """Activation checkpointing gives the credits and gradients of the plain model."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 12), KnownLeaky(), nn.Linear(12, 7), KnownLeaky())

    x = drive()
    plain, stored = Checkpointed(build(), plain=True), Checkpointed(build())
    sparse(plain, settings=EID())
    sparse(stored, settings=EID())
    one_step(plain, x)
    one_step(stored, x)
    same_credits(plain, stored)


@pytest.mark.slow
def test_compiled_models_keep_their_credits() -> None:
    """torch.compile sees the same credits as eager execution."""
    model, _ = pair()
    twin = copy.deepcopy(model)
    x = drive()
    one_step(model, x)
    torch._dynamo.reset()
    backward(torch.compile(twin, backend="eager"), x)
    torch.optim.SGD(twin.parameters(), lr=0.0).step()
    same_credits(model, twin)


def test_neurons_get_their_state_back() -> None:
    """Asking a stateful neuron for its slopes leaves its membrane as the user left it."""
    model = sparse(nn.Sequential(nn.Linear(8, 6), Stepper()))
    for x in spikes(3, 4, 8).float():
        out = model(x)
    before = model[1].v.detach().clone()
    assert credit_of(model, "0", out).any()
    assert torch.equal(model[1].v.detach(), before)
