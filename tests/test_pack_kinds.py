# SPDX-License-Identifier: Apache-2.0
"""Layers and forwards of every kind: an engine computes what the model does, whatever they do."""

from __future__ import annotations

import copy
import functools
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from few_rounds import few_rounds
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from pack_strategies import prune
from profiles import tries
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.pack import PackedLayer, pack, packing
from spikenm_fx.pattern import NM

pytestmark = pytest.mark.usefixtures("few_rounds")
__all__ = ["few_rounds"]

functional = pytest.importorskip("spikingjelly.activation_based.functional")
jelly = pytest.importorskip("spikingjelly.activation_based.layer")
monitor = pytest.importorskip("spikingjelly.activation_based.monitor")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

STEPS, BATCH, WIDTH = 3, 2, 16


class Loop(nn.Linear):
    """One product per time step."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(step, self.weight, self.bias) for step in x])


class Around(nn.Linear):
    """A product with code before and after it, and an argument more."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return F.linear(x * factor, self.weight, self.bias) * self.gain


class OtherWeight(nn.Linear):
    """A product with what is computed of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / (1 + self.weight.norm()), self.bias)


class OtherBias(nn.Linear):
    """A product without the layer's bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) - self.bias


class Transposed(nn.Linear):
    """A product that is no call of F.linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Standardised(jelly.WSLinear):
    """Derived from a layer that multiplies another weight than its own."""


class Named(nn.Linear):
    """Attributes whose names packed layers use as well."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale, self.name, self.choice = 2.0, "mine", "mine"

    def forward(self, x: Tensor) -> Tensor:
        assert self.choice == "mine"
        return super().forward(x) * self.scale


LAYERS = [nn.Linear, Loop, Around, OtherWeight, OtherBias, Transposed, Standardised, Named]


def _hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _m, _a, out: 2 * out)


def _pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _m, args: (0.5 * args[0],))


def _hook_with_kwargs(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _m, _a, _k, out: out + 1, with_kwargs=True)


def _pre_hook_with_kwargs(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _m, a, k: ((a[0] + 0.1,), k), with_kwargs=True)


def _backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda _m, _i, _o: None)


def _bound(layer: nn.Module) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return 3 * type(self).forward(self, x)

    layer.forward = types.MethodType(forward, layer)


def _partial(layer: nn.Module) -> None:
    layer.forward = functools.partial(_tripled, layer)


def _tripled(layer: nn.Module, x: Tensor) -> Tensor:
    return 3 * F.linear(x, layer.weight, layer.bias)


def _closure(layer: nn.Module) -> None:
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)


def _weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)


def _nothing(_layer: nn.Module) -> None: ...


CHANGES = [
    _nothing,
    _hook,
    _pre_hook,
    _hook_with_kwargs,
    _pre_hook_with_kwargs,
    _backward_hook,
    _bound,
    _partial,
    _closure,
    _weight_norm,
]


class Chain(nn.Module):
    """Layers of given kinds with neurons between, called, shared or read as ``how`` says."""

    def __init__(self, kinds: list[type[nn.Linear]], how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(WIDTH, WIDTH) for kind in kinds)
        self.neurons = nn.ModuleList(neuron.IFNode(0.3, step_mode="m") for _ in kinds)
        self.how, self.held = how, list(self.layers)
        self.head = nn.Linear(WIDTH, WIDTH)
        if how == "tied":
            self.head.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        layers = self.held if self.how == "listed" else self.layers
        for layer, fire in zip(layers, self.neurons, strict=True):
            if self.how == "exact" and type(layer) is not nn.Linear:
                continue
            x = fire(layer(x) + (layer(x) if self.how == "twice" else 0))
        if self.how == "read":
            return F.linear(x, self.head.weight, self.head.bias) + self.layers[0].weight.mean()
        sizes = torch.zeros(self.head.out_features, device=next(self.parameters()).device)
        return self.head(x) + sizes


HOWS = ["called", "twice", "read", "listed", "tied", "exact"]


def _chain(kinds: list[type[nn.Linear]], how: str, changes: list[Callable[..., None]]) -> Chain:
    torch.manual_seed(0)
    model = Chain(kinds, how).eval()
    for layer in [*model.layers, model.head]:
        layer.weight.data = prune(layer.weight.data * 3, NM(2, 4))
    for layer, change in zip(model.layers, changes, strict=False):
        change(layer)
    return model


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x).clone()
    functional.reset_net(model)
    return out


def _x() -> Tensor:
    return torch.rand(STEPS, BATCH, WIDTH, generator=torch.Generator().manual_seed(1)) * 2


@tries(25, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3),
    st.sampled_from(HOWS),
    st.lists(st.sampled_from(CHANGES), max_size=3),
    st.sampled_from(["fma", "event", "dense"]),
)
def test_engines_compute_what_their_models_do(kinds, how, changes, backend):
    """Any mixture of layer classes, hooks, replaced forwards and uses gives the model's output."""
    model, x = _chain(kinds, how, changes), _x()
    expected = _run(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpikeNMWarning)
        engine = pack(model, x, backend=backend)
    torch.testing.assert_close(_run(engine, x), expected, rtol=1e-4, atol=1e-4)
    for row in packing(engine).layers:
        assert row.pattern or _is_advice(row.note), row


def _is_advice(note: str) -> bool:
    """A sentence that gives the reason and, after it, something to do."""
    return bool(re.match(r"^[A-Z\d].*[;:.,] .*\w\.$", note))


def _one_call(conv: nn.Module, x: Tensor) -> Tensor:
    return conv._conv_forward(x.flatten(0, 1), conv.weight, conv.bias).unflatten(0, x.shape[:2])


def _each_step(conv: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([conv._conv_forward(step, conv.weight, conv.bias) for step in x])


def _each_sample(conv: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([_each_step(conv, sample) for sample in x[:, :, None]])[:, :, 0]


def _by_name(conv: nn.Module, x: Tensor) -> Tensor:
    options = {n: getattr(conv, n) for n in ("stride", "padding", "dilation", "groups")}
    convolve = F.conv1d if isinstance(conv, nn.Conv1d) else F.conv2d
    return torch.stack([convolve(t, weight=conv.weight, bias=conv.bias, **options) for t in x])


def _other_stride(conv: nn.Module, x: Tensor) -> Tensor:
    convolve = F.conv1d if isinstance(conv, nn.Conv1d) else F.conv2d
    return torch.stack(
        [convolve(t, conv.weight, conv.bias, stride=3, groups=conv.groups) for t in x]
    )


@tries(25, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([_one_call, _each_step, _each_sample, _by_name, _other_stride]),
    st.sampled_from([1, 2]),
    st.fixed_dictionaries(
        {
            "stride": st.integers(1, 2),
            "padding": st.integers(0, 2),
            "dilation": st.integers(1, 2),
            "groups": st.sampled_from([1, 2]),
            "bias": st.booleans(),
        }
    ),
    st.booleans(),
    st.sampled_from(["fma", "event", "dense"]),
)
def test_convolutions_in_a_forward_of_their_own(how, spatial, options, same, backend):
    """However often and with whatever arguments the convolution is called, outputs agree."""
    if same:
        options = options | {"padding": "same", "stride": 1}
    base = nn.Conv1d if spatial == 1 else nn.Conv2d
    kind = type("Own", (base,), {"forward": how})
    torch.manual_seed(0)
    first, second = kind(4, 8, 3, **options), kind(8, 8, 3, **options)
    model = nn.Sequential(first, neuron.IFNode(0.1, step_mode="m"), second).eval()
    second.weight.data = prune(second.weight.data, NM(2, 4))
    x = torch.rand(STEPS, BATCH, 4, *[17] * spatial)
    engine = pack(model, x, backend=backend)
    torch.testing.assert_close(_run(engine, x), _run(model, x), rtol=1e-4, atol=1e-4)
    packed = [isinstance(layer, PackedLayer) for layer in (engine[0], engine[2])]
    assert packed == [how is not _other_stride] * 2


@pytest.mark.parametrize("kind", [Loop, Around])
def test_products_inside_a_forward_of_its_own_are_packed(kind):
    """The layer keeps its forward and its parameters; what it multiplies runs on packed weights."""
    model, x = _chain([kind, kind], "called", []), _x()
    engine = pack(model, x, backend="fma")
    for layer, before in zip(engine.layers, model.layers, strict=True):
        assert isinstance(layer, PackedLayer)
        assert isinstance(layer, kind)
        assert type(layer).forward is not kind.forward
        calls = []
        layer.run = functools.partial(_counting, calls, layer.run)
        layer(x)
        assert len(calls) == (STEPS if kind is Loop else 1)
        assert torch.equal(layer.weight, before.weight)
    torch.testing.assert_close(_run(engine, x), _run(model, x), rtol=1e-4, atol=1e-4)


def _counting(calls: list[Tensor], run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    calls.append(x)
    return run(x)


def test_a_forward_that_skips_other_classes_is_told_and_right():
    """``type(layer) is nn.Linear``: the layers are torch's again, and the warning names them."""
    model, x = _chain([nn.Linear, nn.Linear], "exact", []), _x()
    with pytest.warns(SpikeNMWarning, match=r"layers\.\d .*runs 0 times.*isinstance"):
        engine = pack(model, x, backend="fma")
    torch.testing.assert_close(_run(engine, x), _run(model, x))
    assert {"layers.0", "layers.1"} <= set(packing(engine).proof.put_back)
    assert type(engine.layers[0]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unproven = pack(model, x, backend="fma", check=False)
    assert packing(unproven).proof is None
    assert not torch.allclose(_run(unproven, x), _run(model, x))


@pytest.mark.parametrize("neurons", [True, False])
def test_a_wrong_kernel_is_put_back_alone(neurons, monkeypatch):
    """One layer that computes something else is torch's afterwards; the others stay packed."""
    model, x = _chain([nn.Linear, nn.Linear], "called", []), _x()
    if not neurons:
        model.neurons = nn.ModuleList(nn.ReLU() for _ in model.layers)
    run = PackedLayer.run

    def wrong(self: PackedLayer, x: Tensor, *, rows: bool = False) -> Tensor:
        out = run(self, x, rows=rows)
        return out + 0.1 if self.name == "layers.1" else out

    monkeypatch.setattr(PackedLayer, "run", wrong)
    with pytest.warns(SpikeNMWarning, match=r"(layers|neurons)\.1"):
        engine = pack(model, x, backend="fma")
    monkeypatch.undo()
    assert type(engine.layers[1]) is nn.Linear
    assert isinstance(engine.layers[0], PackedLayer)
    assert isinstance(engine.head, PackedLayer)
    notes = {row.name: row.note for row in packing(engine).layers}
    assert _is_advice(notes["layers.1"])


def test_states_of_a_training_step_are_left_behind():
    """Right after a backward pass an engine starts at rest, and the model keeps its state."""
    model, x = _chain([nn.Linear, Loop], "called", []), _x()
    model.train()(x).sum().backward()
    model.eval()
    states = [fire.v for fire in model.neurons]
    engine = pack(model, x[:, :1], backend="dense")
    assert all(fire.v is state for fire, state in zip(model.neurons, states, strict=True))
    assert all(state.grad_fn is not None for state in states)
    functional.reset_net(model)
    torch.testing.assert_close(_run(engine, x), _run(model, x), rtol=1e-4, atol=1e-4)


def test_monitors_stay_as_they_were():
    """What monitors and counting hooks record while a model is packed does not stay."""
    model, x = _chain([nn.Linear, Loop], "called", []), _x()
    records: list[Tensor] = []
    counts = {"calls": 0}

    def count(_module: nn.Module, _args: object, out: Tensor) -> None:
        counts["calls"] += 1
        records.append(out)

    model.layers[0].register_forward_hook(count)
    spikes = monitor.OutputMonitor(model, neuron.IFNode)
    everywhere: list[Tensor] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda _m, _a, out: everywhere.append(out)
    )
    try:
        engine = pack(model, x)
    finally:
        handle.remove()
    assert everywhere == []
    assert counts["calls"] == len(records) == len(spikes.records) == 0
    _run(engine, x)
    assert counts["calls"] == 1
    assert type(records[0]) is Tensor
    assert all(type(record) is Tensor for record in spikes.records)


def test_spikes_can_be_handed_to_numpy():
    """A forward that reads its spikes as numpy arrays or lists reads them in an engine, too."""

    class Reading(Chain):
        def forward(self, x: Tensor) -> Tensor:
            spikes = self.neurons[0](self.layers[0](x))
            return self.head(spikes) + float(spikes.numpy().mean()) + spikes.tolist()[0][0][0]

    torch.manual_seed(0)
    model, x = Reading([nn.Linear], "called").eval(), _x()
    engine = pack(model, x, backend="fma")
    assert packing(engine).proof.put_back == ()
    torch.testing.assert_close(_run(engine, x), _run(model, x), rtol=1e-4, atol=1e-4)


def test_without_examples_the_report_says_what_was_not_done():
    """No example inputs: nothing is measured or compared, and the report says so."""
    report = packing(pack(_chain([nn.Linear, Loop], "called", [])))
    assert report.whole is None
    assert report.proof is None
    assert "nothing was measured" in str(report)
    assert "pack(model, example_inputs)" in report.verdict


def test_the_whole_forward_is_what_gains():
    """The gain that is printed is of the measured forwards; where there is none, it says so."""
    report = packing(pack(_chain([nn.Linear] * 2, "called", []), _x()))
    whole = report.whole
    assert whole.gain == whole.model / whole.engine
    assert ("keep your model" in report.verdict) == (whole.gain < 1.02)
    assert report.verdict in str(report)
    assert report.to_dict()["whole"]["gain"] == whole.gain
    assert report.proof.rounds == 1
    assert report.proof.put_back == ()
    for each in report.neurons:
        assert each.layer or _is_advice(each.note), each
    for row in report.layers[:-1]:
        assert row.neuron or _is_advice(row.note), row


def _timed(monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
    """Forms take these times, whatever they are; the fastest way of each layer is its kernel."""
    forms = pytest.importorskip("spikenm_fx.pack.forms")
    monkeypatch.setattr(
        forms.Forms, "_take_turns", lambda _s, ways, *_: {w: [times[w]] for w in ["model", *ways]}
    )
    choose = pytest.importorskip("spikenm_fx.pack.engine.choose")
    monkeypatch.setattr(choose, "_fastest", lambda seen: min(seen, key=len))  # no "dense"


def _calls_of_ours(engine: nn.Module, x: Tensor) -> set[str]:
    """Functions of this library that one forward of the engine calls."""
    ours, found = str(Path(spikenm_fx.__file__).parent), set()

    def see(frame: types.FrameType, event: str, _arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            found.add(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        _run(engine, x)
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("unfused", [0.7, 0.99, 1.1])
def test_what_gains_nothing_is_the_models_own_code(monkeypatch, unfused):
    """A form slower than the model, or as fast, is not chosen, though some layer gain."""
    _timed(monkeypatch, model=1.0, fused=3.0, unfused=unfused, some=1.3)
    model, x = _chain([nn.Linear, Loop], "called", []), _x()
    engine = pack(model, x)
    report = packing(engine)
    gains = unfused == 0.7
    assert report.whole.form == ("unfused" if gains else "torch")
    assert ("keep your model" in report.verdict) != gains
    layers = [layer for layer in engine.modules() if isinstance(layer, PackedLayer)]
    assert bool(layers) == gains
    assert all(layer.choice != "dense" for layer in layers)
    assert all(type(fire) is neuron.IFNode for fire in engine.neurons)
    assert bool(_calls_of_ours(engine, x)) == gains
    if not gains:
        assert [type(m) for m in engine.modules()] == [type(m) for m in model.modules()]
        assert report.whole.gain == 1.0
        assert torch.equal(_run(engine, x), _run(copy.deepcopy(model), x))
        for row in report.layers:
            assert row.choice == "torch"
            assert _is_advice(row.note)


@pytest.mark.parametrize("norm", [False, True])
def test_an_engine_that_gains_nothing_has_nothing_of_ours_in_its_forward(monkeypatch, norm):
    """Norms, hooks, classes, attributes and parameters are the model's, in order and by name."""
    _timed(monkeypatch, model=1.0, fused=1.0, unfused=1.0, dense=1.0, some=1.0)
    torch.manual_seed(0)
    layer, fire = jelly.Conv2d(4, 8, 3, step_mode="m"), neuron.IFNode(step_mode="m")
    parts = [layer, jelly.BatchNorm2d(8, step_mode="m"), fire] if norm else [layer, fire]
    model = nn.Sequential(*parts, jelly.Conv2d(8, 4, 3, step_mode="m")).eval()
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _m, _a, out: seen.append(out))
    x = (torch.rand(3, 2, 4, 8, 8) < 0.4).float()
    before = [list(vars(m)) for m in model.modules()]
    engine = pack(model, x)
    assert packing(engine).whole.form == "torch"
    assert _calls_of_ours(engine, x) == set()
    assert type(seen[-1]) is Tensor
    assert list(engine.state_dict()) == list(model.state_dict())
    assert [type(m) for m in engine.modules()] == [type(m) for m in model.modules()]
    own = [[k for k in vars(m) if k != "_spikenm_packing"] for m in engine.modules()]
    assert own == before
    again = pack(model, x, backend=packing(engine).choices)
    assert _calls_of_ours(again, x) == set()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_layers_that_save_least_are_put_back_until_the_whole_gains(monkeypatch, kept):
    """By measured savings, by halves: what remains packed is what the whole forward gains by."""
    forms = pytest.importorskip("spikenm_fx.pack.forms")

    def times(self: Any, ways: Any, *_: Any) -> dict[str, list[float]]:
        packed = len(self.builder.layers)
        some = 0.5 if packed == kept else 1.5
        return {"model": [1.0], **{w: [some if w == "some" else 2.0] for w in ways}}

    def saves(self: Any) -> float:
        return 1e3 * (1 + ["layers.0", "layers.1", "head"].index(self.packed.name))

    _timed(monkeypatch)
    monkeypatch.setattr(forms.Forms, "_take_turns", times)
    monkeypatch.setattr(forms, "_saved", saves)
    model, x = _chain([nn.Linear] * 2, "called", []), _x()
    engine = pack(model, x)
    report = packing(engine)
    # 3 layers, then the better one of them (half, rounded down), then none
    expected = {0: "torch", 1: "some", 2: "torch"}[kept]
    assert report.whole.form == expected
    packed = [n for n, layer in engine.named_modules() if isinstance(layer, PackedLayer)]
    assert packed == (["head"] if kept == 1 else [])
    torch.testing.assert_close(_run(engine, x), _run(copy.deepcopy(model), x), rtol=1e-4, atol=1e-4)


def test_what_was_asked_for_is_not_undone_but_said(monkeypatch):
    """A backend, small memory or rounded weights stay, and the report says what that may cost."""
    _timed(monkeypatch, model=1.0, fused=2.0, unfused=3.0, some=3.0)
    model, x = _chain([nn.Linear] * 2, "called", []), _x()
    for asked in ({"backend": "dense"}, {"memory": "small"}, {"dtype": torch.int8}):
        engine = pack(model, x, **asked)
        assert isinstance(engine.head, PackedLayer), asked
        verdict = packing(engine).verdict
        assert "may be slower than" in verdict or "keep your model" in verdict, asked


def test_the_form_that_runs_is_the_fastest_measured(monkeypatch):
    """Where it is fastest to leave neurons as they are, none is fused."""
    _timed(monkeypatch, model=1.0, fused=0.9, unfused=0.5)
    model, x = _chain([nn.Linear] * 2, "called", []), _x()
    engine = pack(model, x)
    report = packing(engine)
    assert report.whole.form == "unfused"
    assert all(row.neuron == "" for row in report.layers)
    assert all(type(fire) is neuron.IFNode for fire in engine.neurons)
    assert "gains 2.00x" in report.verdict
    assert not any(layer.waits for layer in engine.modules() if isinstance(layer, PackedLayer))
    torch.testing.assert_close(_run(engine, x), _run(copy.deepcopy(model), x), rtol=1e-4, atol=1e-4)
