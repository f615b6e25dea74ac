# SPDX-License-Identifier: Apache-2.0
"""The report: exact, pure, and the same figures in every form."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.demo.networks import LIF
from spikenm_fx.errors import ReportError
from spikenm_fx.pattern import NM, BlockView
from spikenm_fx.report import EnergyModel, Report, compare, report
from spikenm_fx.report.describe import packed_bytes
from spikenm_fx.report.masks import block_histogram, detect_pattern, mask_tile, pe_utilisation
from spikenm_fx.report.render.units import percent


def spikingjelly_net() -> nn.Module:
    """Multi-step SpikingJelly CNN of T=3 that surely spikes."""
    sj = pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based import functional, layer, neuron

    del sj

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = layer.Conv2d(2, 8, 3, padding=1)
            self.lif1 = neuron.LIFNode(v_threshold=0.2)
            self.conv2 = layer.Conv2d(8, 8, 3, padding=1, bias=False)
            self.norm = layer.BatchNorm2d(8)
            self.lif2 = neuron.LIFNode(v_threshold=0.2)
            self.fc = layer.Linear(8 * 36, 5)
            functional.set_step_mode(self, "m")

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(0).repeat(3, 1, 1, 1, 1)
            x = self.lif2(self.norm(self.conv2(self.lif1(self.conv1(x)))))
            return self.fc(x.flatten(2)).mean(0)

    return Net()


def snntorch_net() -> nn.Module:
    """Hidden-state snnTorch net, called once per step by its user."""
    snn = pytest.importorskip("snntorch")
    return nn.Sequential(
        nn.Linear(12, 16),
        snn.Leaky(beta=0.9, threshold=0.2, init_hidden=True),
        nn.Linear(16, 16),
        snn.Leaky(beta=0.9, threshold=0.2, init_hidden=True),
        nn.Linear(16, 4),
    )


def norse_net() -> nn.Module:
    """Norse layers that step through time themselves."""
    norse = pytest.importorskip("norse.torch")
    low = norse.LIFParameters(v_th=torch.as_tensor(0.02))
    return norse.SequentialState(
        nn.Linear(12, 16), norse.LIF(low), nn.Linear(16, 16), norse.LIF(low), nn.Linear(16, 4)
    )


class HandMade(nn.Module):
    """A neuron of nobody's framework, its state a plain attribute changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)
        self.memory: list[Tensor] = []
        self.lif = HandMadeLIF()

    def forward(self, x: Tensor) -> Tensor:
        self.memory.append(x)
        self.second.calls = getattr(self.second, "calls", 0) + 1
        return self.second(self.lif(self.first(x)))


class HandMadeLIF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.v.mul_(0.5).add_(x.mean(0))
        return ((x + self.v) > 0).float() * (torch.rand_like(x) < 2)


CASES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int, int]] = [
    ("spikingjelly", spikingjelly_net, (4, 2, 6, 6), 1, 0),
    ("snntorch", snntorch_net, (4, 12), 3, 0),
    ("norse", norse_net, (5, 4, 12), 1, 1),
    ("hand-made", HandMade, (4, 12), 2, 0),
]
case = pytest.mark.parametrize(("name", "make", "shape", "steps", "dim"), CASES, ids=lambda v: v)


def everything(model: nn.Module) -> dict[str, object]:
    """All state of a model that a forward could change, by value."""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        state[f"{name} mode"] = module.training
        state[f"{name} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        for key, value in vars(module).items():
            if key not in vars(nn.Module()):
                state[f"{name}.{key}"] = copy.copy(value) if type(value) in (list, dict) else value
        for key, value in module._buffers.items():
            state[f"{name}.buffer.{key}"] = None if value is None else value.clone()
        for key, value in module._parameters.items():
            grad = None if value is None or value.grad is None else value.grad.clone()
            state[f"{name}.parameter.{key}"] = (None if value is None else value.clone(), grad)
    return state


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a is b or a == b


def run_report(model: nn.Module, shape: tuple[int, ...], steps: int, dim: int) -> Report:
    torch.manual_seed(7)
    batches = [torch.randn(shape) * 2 for _ in range(2)]
    return report(model, batches, forward=lambda m, x: [m(x) for _ in range(steps)], batch_dim=dim)


@case
@pytest.mark.parametrize("live", [False, True])
def test_report_leaves_the_model_as_it_was(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    steps: int,
    dim: int,
    live: bool,
) -> None:
    """State (at rest or amid a sequence), buffers, mode, hooks and RNG are untouched."""
    torch.manual_seed(0)
    model = make()
    model.train()
    if live:
        model(torch.randn(shape))
    torch.manual_seed(11)
    before = everything(model)
    generators = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    batch = torch.ones(shape)
    report(model, batch, forward=lambda m, x: [m(x) for _ in range(steps)], batch_dim=dim)
    after = everything(model)
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (str(np.random.get_state()), random.getstate())


def test_failing_forward_leaves_the_model_as_it_was() -> None:
    """A batch of the wrong shape is an error with its shape; model and hooks are as before."""
    model = spikingjelly_net()
    before = everything(model)
    with pytest.raises(ReportError, match=r"batch 1 \(input \(4, 3, 6, 6\)\)"):
        report(model, [torch.rand(4, 2, 6, 6), torch.rand(4, 3, 6, 6)])
    assert all(same(value, everything(model)[key]) for key, value in before.items())


@case
def test_report_sees_spikes_in_every_framework(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], steps: int, dim: int
) -> None:
    """Inner layers see spikes, the first sees analog input, firing is measured and not nothing."""
    torch.manual_seed(0)
    result = run_report(make(), shape, steps, dim)
    assert result.samples == 8
    assert result.layers[0].signal == "analog"
    assert {layer.signal for layer in result.layers[1:]} == {"spike"}
    for layer in result.layers[1:]:
        assert layer.rate_in is not None
        assert 0 < layer.rate_in < 1
        assert layer.operations.synops > 0
    assert result.layers[0].rate_out == pytest.approx(result.layers[1].rate_in)
    assert result.layers[-1].rate_out is None


@case
def test_dense_sparse_and_folded_models_agree(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], steps: int, dim: int
) -> None:
    """A sparse model and its folded self have equal counts, fewer than the dense model's work."""
    torch.manual_seed(0)
    model = make()
    dense_state = {key: value.clone() for key, value in model.state_dict().items()}
    rules = [spikenm_fx.Rule("class:Linear"), spikenm_fx.Rule("class:Conv2d")]
    rules = [rule for rule in rules if any(rule.matches(n, m) for n, m in model.named_modules())]
    spikenm_fx.sparsify(model, "2:4", rules=rules, remainder="pad")
    sparse = run_report(model, shape, steps, dim)
    spikenm_fx.fold(model)
    folded = run_report(model, shape, steps, dim)
    assert sparse.operations == folded.operations
    assert sparse.density == folded.density == pytest.approx(0.5, abs=0.04)
    assert 0 < sparse.operations.effective < sparse.operations.weight_sparse
    assert sparse.operations.weight_sparse < sparse.operations.dense
    assert {layer.pattern for layer in sparse.layers} == {"2:4"}
    kept = [layer.kept_magnitude for layer in sparse.layers]
    assert all(value is not None and 0.5 < value <= 1 for value in kept)
    assert folded.layers[0].kept_magnitude is None
    torch.manual_seed(7)
    again = report(model, torch.randn(shape), reference=dense_state, batch_dim=dim)
    assert [layer.kept_magnitude for layer in again.layers] == pytest.approx(kept)
    assert sparse.packed_bytes < sparse.dense_bytes


class Branches(nn.Module):
    """Two branches whose layers run before either neuron does."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fires, self.rests = LIF(threshold=0.1), LIF(threshold=1e6)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        return self.head(self.rests(b) + self.fires(a))


def test_rate_out_follows_the_trace_and_not_the_order() -> None:
    """Each branch has the rate of its own neuron, although another one runs first."""
    torch.manual_seed(0)
    found = {
        layer.name: layer for layer in report(Branches(), torch.rand(3, 4, 8), batch_dim=1).layers
    }
    assert found["left"].rate_out > 0
    assert found["right"].rate_out == 0
    assert found["head"].rate_out is None


def test_what_cannot_be_traced_on_one_sample_is_said_to() -> None:
    """A model that only its user's loop can run is read by order, and a note says so."""

    class ByHand(Branches):
        def forward(self, x: Tensor, steps: int) -> Tensor:
            return sum(super(ByHand, self).forward(x) for _ in range(steps))

    found = report(ByHand(), torch.rand(3, 4, 8), forward=lambda model, x: model(x, 2))
    assert any("could not be traced" in note for note in found.notes)


def test_samples_come_from_targets_or_the_batch_dimension() -> None:
    """Of (input, target) the target tells the samples; a lone tensor its batch dimension."""
    net = nn.Linear(3, 2)
    x = torch.rand(5, 4, 3)
    assert report(net, [(x, torch.zeros(4))]).samples == 4
    assert report(net, x).samples == 5
    assert report(net, x, batch_dim=1).samples == 4
    assert report(net, [{"input": x}]).samples == 5


@pytest.mark.parametrize("batches", [[], None, 3, "text"])
def test_no_batch_is_an_error(batches: object) -> None:
    """Nothing to run, or no batches at all, says what to pass."""
    with pytest.raises(ReportError, match="pass a tensor"):
        report(nn.Linear(2, 2), batches)


def test_model_without_weight_layers_is_an_error() -> None:
    """A model without Linear and Conv has nothing to report."""
    with pytest.raises(ReportError, match="no Linear or Conv"):
        report(nn.ReLU(), torch.rand(1, 2))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layer_that_never_ran_is_said_to() -> None:
    """A layer without a call is listed with a note instead of silently counting nothing."""
    result = report(Unused(), torch.rand(2, 4))
    assert result.layers[1].calls == 0
    assert result.layers[1].note
    assert any("unused" in note for note in result.notes)
    assert "never ran" in str(result)


def test_weights_outside_of_layers_are_counted() -> None:
    """The recurrent weights that Norse keeps in its cell are no layer's, and are counted too."""
    norse = pytest.importorskip("norse.torch")
    model = norse.SequentialState(nn.Linear(6, 8), norse.LIFRecurrent(8, 8), nn.Linear(8, 3))
    described = report(model, torch.rand(4, 2, 6) * 5, batch_dim=1)
    raw = {one.name: one for one in described.layers if one.kind == "Parameter"}
    assert set(raw) == {"1.input_weights", "1.recurrent_weights"}
    assert all(one.calls == 4 and one.operations.dense for one in raw.values())
    assert raw["1.input_weights"].operations.dense == 4 * 2 * 8 * 8
    assert not any("not counted" in note for note in described.notes)
    others = report(norse_net(), torch.rand(4, 2, 12), batch_dim=1)
    assert not any("not counted" in note for note in others.notes)


def test_silent_network_is_said_to_be() -> None:
    """Neurons that never fire are named: SynOps of zero are no merit then."""
    net = spikingjelly_net()
    net.lif1.v_threshold = 1e9
    result = report(net, torch.rand(2, 2, 6, 6))
    assert any("never fired" in note and "lif1" in note for note in result.notes)


def test_energy_constants_are_the_callers() -> None:
    """Energy is constants times counts, with the caller's constants."""
    torch.manual_seed(0)
    net = spikingjelly_net()
    x = torch.rand(2, 2, 6, 6)
    usual, own = report(net, x), report(net, x, energy=EnergyModel(2.0, 10.0))
    total = usual.operations
    assert usual.picojoule * 2 == pytest.approx(0.9 * total.synops + 4.6 * total.macs)
    assert own.picojoule * 2 == pytest.approx(2 * total.synops + 10 * total.macs)
    for wrong in (-1, float("inf"), float("nan")):
        with pytest.raises(ReportError, match="pj_per_ac"):
            EnergyModel(pj_per_ac=wrong)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batches": torch.rand(0, 2, 6, 6)}, "no sample"),
        ({"batches": torch.full((2, 2, 6, 6), torch.nan)}, "batch 0 holds NaN"),
        ({"batch_dim": 7}, "batch_dim=7"),
        ({"pes": 0}, "pes=0"),
        ({"latency": True, "repeats": 0}, "repeats=0"),
        ({"model": nn.Linear}, "needs an nn.Module"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, Any], says: str) -> None:
    """Nothing to count, or numbers out of their range: an error instead of a table of zeros."""
    usual = {"model": spikingjelly_net(), "batches": torch.rand(2, 2, 6, 6)}
    with pytest.raises(ReportError, match=says):
        report(**{**usual, **arguments})


def test_dict_and_json_hold_the_same_figures() -> None:
    """JSON is strict, and equals the dict after a round trip."""
    result = run_report(spikingjelly_net(), (2, 2, 6, 6), 1, 0)
    data = result.to_dict()
    assert json.loads(result.to_json()) == json.loads(json.dumps(data))
    assert data["total"]["dense_per_sample"] == result.operations.dense / result.samples
    assert len(data["layers"]) == 3


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_one_well_formed_page_without_scripts_or_links() -> None:
    """Tags nest, figures are inline SVG, and nothing is loaded from anywhere."""
    net = spikingjelly_net()
    spikenm_fx.sparsify(net, "2:4")
    for text in (
        run_report(net, (2, 2, 6, 6), 1, 0).to_html(),
        run_report(net, (2, 2, 6, 6), 1, 0)._repr_html_(),
        report(nn.Linear(3, 1), torch.rand(1, 3)).to_html(),
    ):
        tags = Tags()
        tags.feed(text)
        assert tags.open == []
        assert "svg" in tags.seen
        assert "script" not in tags.seen
        assert tags.links == []
        assert not re.search(r"https?://(?!www\.w3\.org)", text)
        assert "nan" not in re.sub("<[^>]*title[^>]*>", "", text).lower().split('"')


def test_names_are_escaped() -> None:
    """A model whose names hold markup cannot inject it into the page."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert(1)</script>", nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return next(iter(self.children()))(x)

    Odd.__name__ = "<b>Odd</b>"
    text = report(Odd(), torch.rand(1, 2)).to_html()
    assert "<script" not in text
    assert "<b>Odd" not in text


def test_latency_is_measured_for_each_variant() -> None:
    """Each variant has a positive median in all and per layer."""
    net = spikingjelly_net()
    other = copy.deepcopy(net)
    result = report(net, torch.rand(2, 2, 6, 6), latency={"a": net, "b": other}, repeats=2)
    assert result.latency is not None
    assert set(result.latency.total) == {"a", "b"}
    assert all(seconds > 0 for seconds in result.latency.total.values())
    assert set(result.latency.layers) == {"conv1", "conv2", "fc"}
    assert "latency" in str(result)
    assert "Latency" in result.to_html()


def test_packed_engine_is_reported_like_its_folded_model() -> None:
    """Counts of an engine are those of the model it was packed from; kernels are named."""
    from spikenm_fx.pack import pack

    torch.manual_seed(0)
    net = spikingjelly_net()
    spikenm_fx.fold(spikenm_fx.sparsify(net, "2:4"))
    x = torch.randn(4, 2, 6, 6) * 2
    net.eval()
    folded = report(net, x)
    result = report(pack(net, x, backend="reference"), x, latency=True, repeats=1)
    assert [layer.operations for layer in result.layers] == [
        layer.operations for layer in folded.layers
    ]
    assert [layer.pattern for layer in result.layers] == [layer.pattern for layer in folded.layers]
    assert all("runs as" in layer.note for layer in result.layers)
    assert "packed layers run as" in str(result)
    assert result.latency is not None


@st.composite
def patterned(draw: st.DrawFn) -> tuple[nn.Module, Tensor, NM]:
    """A layer whose mask holds exactly ``keep`` ones in each block."""
    of = draw(st.sampled_from([2, 4, 8]))
    keep = draw(st.integers(1, of - 1))
    groups = draw(st.sampled_from([1, 2]))
    channels, outputs = groups * of * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    layer = draw(
        st.sampled_from(
            [
                nn.Linear(channels, outputs),
                nn.Conv2d(channels, outputs, 3, groups=groups),
                nn.ConvTranspose1d(channels, outputs, 2, groups=groups),
            ]
        )
    )
    view = BlockView.of_layer(layer, NM(keep, of))
    noise = torch.rand(view.blocked_shape, generator=torch.Generator().manual_seed(draw(
        st.integers(0, 999))))  # fmt: skip
    blocks = (noise.argsort(1).argsort(1) < keep).float()
    return layer, view.from_blocks(blocks), NM(keep, of)


@tries(60)
@given(patterned())
def test_pattern_is_found_in_the_zeros(case: tuple[nn.Module, Tensor, NM]) -> None:
    """The pattern found is obeyed, and is as tight as the one the mask was made with."""
    layer, mask, nm = case
    found = detect_pattern(layer, mask)
    assert found is not None
    assert found.density <= nm.density
    counts = block_histogram(layer, mask, nm)
    assert counts[nm.keep] == sum(counts) == mask.numel() // nm.of
    assert sum(block_histogram(layer, mask, found)[found.keep + 1 :]) == 0


def test_dense_mask_has_no_pattern() -> None:
    """A layer without zeros is dense."""
    assert detect_pattern(nn.Linear(8, 4), torch.ones(4, 8)) is None


@pytest.mark.parametrize(
    ("rows", "pes", "expected"),
    [
        ([[1, 1, 1, 1], [1, 1, 0, 0]], 2, 6 / 8),
        ([[1, 1, 1, 1], [1, 1, 0, 0]], 1, 1.0),
        ([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]], 2, 1.0),
        ([[0, 0, 0, 0], [0, 0, 0, 0]], 2, 1.0),
        ([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], 2, 5 / 9),
    ],
)
def test_pe_utilisation(rows: list[list[int]], pes: int, expected: float) -> None:
    """Mean over maximum work of the PEs of each round."""
    mask = torch.tensor(rows, dtype=torch.float32)
    assert pe_utilisation(nn.Linear(4, len(rows)), mask, pes) == pytest.approx(expected)


def test_exact_patterns_use_all_pes() -> None:
    """Masks with exactly N of M in each block keep every PE busy."""
    layer = nn.Conv2d(8, 20, 3)
    mask = torch.zeros_like(layer.weight)
    mask[:, [0, 3, 4, 5]] = 1
    assert pe_utilisation(layer, mask) == 1.0


def test_packed_bytes_of_known_shapes() -> None:
    """Kept values plus 2-bit indices for blocks of four; the bias stays as it is."""
    layer = nn.Linear(8, 4)
    assert packed_bytes(layer, NM(2, 4)) == 16 * 4 + 4 * 4 + 16 * 2 // 8
    assert packed_bytes(layer, NM(1, 8)) == 4 * 4 + 4 * 4 + 2
    assert packed_bytes(layer, None) == 32 * 4 + 4 * 4


def test_mask_tile_is_the_corner() -> None:
    """The drawn corner shows the mask's own zeros, output channels downwards."""
    layer = nn.Linear(4, 2)
    tile = mask_tile(layer, torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]]), 4)
    assert tile.rows == ("1001", "0110")


def test_words_of_the_trade_are_explained() -> None:
    """Text and page say what their abbreviations mean, and every column of the page has a word."""
    result = run_report(spikingjelly_net(), (2, 2, 6, 6), 1, 0)
    for word in ("kept |w|:", "dual sparsity:", "PE util.:"):
        assert word in str(result)
    page = result.to_html()
    heads = set(re.findall(r"<th[^>]*>([^<]*)</th>", page)) - {"layer"}
    assert heads <= set(re.findall(r"<dt>([^<]*)</dt>", page))


def test_page_is_written_to_a_file(tmp_path: Path) -> None:
    """The file holds the page that is returned; a folder that is not there is a clear error."""
    result = report(nn.Linear(3, 1), torch.rand(1, 3))
    page = result.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page == result.to_html()
    with pytest.raises(spikenm_fx.SpikeNMError, match="could not be written"):
        result.to_html(tmp_path / "nowhere" / "page.html")


def test_two_reports_side_by_side(tmp_path: Path) -> None:
    """Ratios are of the second over the first; layers are matched by name; all forms agree."""
    net = spikingjelly_net()
    before = run_report(net, (2, 2, 6, 6), 1, 0)
    spikenm_fx.sparsify(net, "2:4")
    after = run_report(net, (2, 2, 6, 6), 1, 0)
    both = compare(before, after, names=("dense", "2:4"))
    data = json.loads(json.dumps(both.to_dict(), allow_nan=False))
    assert data["before"]["density"] == before.density
    assert data["ratios"]["density"] == after.density / before.density
    assert data["ratios"]["packed_bytes"] < 1
    assert [layer["name"] for layer in data["layers"]] == [la.name for la in before.layers]
    changed = {layer["name"]: layer["pattern"] for layer in data["layers"]}
    assert changed["conv2"] == [None, "2:4"]
    for text in (str(both), both.to_html(tmp_path / "both.html"), both._repr_html_()):
        assert "conv2" in text
        assert percent(after.density) in text
    tags = Tags()
    tags.feed((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert tags.open == []
    assert "script" not in tags.seen
    assert tags.links == []


def test_a_comparison_tells_weights_bytes_and_times() -> None:
    """What a smaller model saves; both were timed in turn for the second report."""
    large, small = (nn.Sequential(nn.Linear(8, n), nn.Linear(n, 4)) for n in (8, 4))
    x = torch.rand(2, 8)
    timed = report(small, x, latency={"before": large, "after": small})
    both = compare(report(large, x), timed)
    rows = {line.split("  ")[0]: line.split() for line in str(both).splitlines()}
    weights = [sum(m.weight.numel() for m in net) for net in (large, small)]
    assert rows["weights"][1:3] == [str(n) for n in weights]
    assert "bytes" in rows
    assert "latency of one batch: before" in str(both)
    assert "latency of one batch: before" in both.to_html()
    assert list(both.to_dict()["latency"]) == ["before", "after"]
    assert compare(timed, report(large, x)).to_dict()["latency"] is None


def test_models_of_other_layers_can_be_compared_too() -> None:
    """A layer that only one of them has is listed; what is no report is refused."""
    one = report(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.rand(1, 4))
    two = report(nn.Sequential(nn.Linear(4, 4)), torch.rand(1, 4))
    assert [change["density"] for change in compare(one, two).to_dict()["layers"]] == [
        (1.0, 1.0),
        (1.0, None),
    ]
    with pytest.raises(ReportError, match="two reports"):
        compare(one, nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ReportError, match="names"):
        compare(one, two, names=("a",))  # type: ignore[arg-type]


def test_weights_that_are_no_numbers_are_named() -> None:
    """NaN weights count as non-zero, and the report says where they are."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        net[1].weight[0, 0] = float("nan")
    result = report(net, torch.rand(1, 4))
    assert [layer.not_finite for layer in result.layers] == [0, 1]
    assert "1 layers hold weights that are NaN or infinite" in str(result)


class Attends(nn.Module):
    """Spiking self-attention of torch's own module, or with its products written three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.fire = way, LIF()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        if way == "module":
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        else:
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, N, 6]``."""
        x = self.fire(4 * self.embed(x))
        y = x.flatten(0, 1)
        if self.way == "module":
            y = self.attention(y, y, y, need_weights=False)[0]
        else:
            q, k, v = (
                self.fire(4 * layer(x)).flatten(0, 1).unflatten(-1, (4, 4)).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            if self.way == "matmul":
                y = (q @ k.transpose(-2, -1)) @ v
            elif self.way == "einsum":
                scores = torch.einsum("bhnd,bhmd->bhnm", q, k)
                y = torch.einsum("bhnm,bhmd->bhnd", scores, v)
            else:
                y = nn.functional.scaled_dot_product_attention(q, k, v)
            y = self.out(self.fire(y.transpose(1, 2).flatten(2).view_as(x)))
        return self.head(self.fire(y.view_as(x))).mean((0, 2))


@pytest.mark.parametrize("way", ["module", "matmul", "einsum", "fused"])
def test_attention_is_counted_once_at_the_product(way: str) -> None:
    """Each weight has one row with its product's operations; what holds no weight is said."""
    torch.manual_seed(0)
    model, steps, tokens = Attends(way).eval(), 3, 5
    result = report(model, [2 * torch.rand(steps, 2, tokens, 6)], batch_dim=1)
    counted = {layer.name: layer.operations.dense for layer in result.layers}
    each = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}
    tokens_seen = 2 * steps * tokens  # of two samples
    expected = {n.removesuffix(".weight"): tokens_seen * size for n, size in each.items()}
    assert counted == expected
    number = 2 * steps * tokens * tokens * 16  # queries with keys, and with values
    said = [note for note in result.notes if "products of two signals" in note]
    assert len(said) == 1
    assert f" {number:,} multiplications" in said[0]
