# SPDX-License-Identifier: Apache-2.0
"""Invariant 7: each weight layer is listed once, with an action and a reason; planning is pure."""

import copy
import json
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Wrapped, cases, network, patterns, trees
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import spikenm_fx
from spikenm_fx import NM, Rule, plan
from spikenm_fx.errors import PatternError, PlanError


def stack(*widths: int) -> nn.Module:
    """Linear layers of these widths."""
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])


def entry(result, name):
    return next(layer for layer in result.layers if layer.name == name)


@given(trees(), st.sampled_from(["skip", "pad"]))
def test_each_layer_is_listed_once(model, remainder):
    """Exactly the Linear and Conv modules appear, each once, with a reason; nothing is changed."""
    state = copy.deepcopy(model.state_dict())
    described, rng = repr(model), torch.random.get_rng_state()
    expected = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
    try:
        layers = plan(model, "2:4", remainder=remainder).layers
    except PlanError as error:
        text = str(error)
        assert all(name in text for name in expected[:20])
    else:
        assert [layer.name for layer in layers] == expected
        for layer in layers:
            module = model.get_submodule(layer.name)
            assert layer.reason
            assert layer.shape == tuple(module.weight.shape)
            assert (layer.action == "sparsify") == (layer.nm == NM(2, 4)) == (layer.nm is not None)
    assert repr(model) == described
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), rng)


@given(trees(), patterns(8))
def test_sparsify_does_what_the_plan_says(model, nm):
    """The layers that sparsify masks are those the plan lists, with those patterns."""
    try:
        decided = plan(model, nm, remainder="pad")
    except PlanError:
        with pytest.raises(PlanError):
            spikenm_fx.sparsify(model, nm, remainder="pad")
        return
    spikenm_fx.sparsify(model, nm, remainder="pad")
    masked = {
        name: NM(*module.weight_nm[1:3].tolist())
        for name, module in model.named_modules()
        if hasattr(module, "weight_nm")
    }
    assert masked == {layer.name: layer.nm for layer in decided.sparse}
    assert spikenm_fx.verify(model, decided).valid


@given(cases(depthwise=True), st.sampled_from(["skip", "pad", "error"]))
def test_remainder_policies(case, remainder):
    """Where M does not divide the channels: left dense, padded, or an error naming the layer."""
    model = nn.Sequential(nn.Linear(4, 4), case.layer(), nn.Linear(4, 4))
    divides = case.channels % case.nm.of == 0
    rules = [Rule("1"), Rule("0", "2:4")]
    if remainder == "error" and not divides and case.channels > 1:
        with pytest.raises(PatternError, match=r"1 \(.*not a multiple") as caught:
            plan(model, case.nm, rules=rules, remainder=remainder)
        assert "pad" in str(caught.value)
        return
    layer = entry(plan(model, case.nm, rules=rules, remainder=remainder), "1")
    if case.channels == 1:
        assert "one input channel" in layer.reason
        assert layer.nm is None
    elif divides or remainder == "pad":
        assert layer.nm == case.nm
        assert layer.padded == (not divides)
    else:
        assert layer.nm is None
        assert "not a multiple" in layer.reason


def test_defaults_and_their_reasons():
    """First and last layer and depthwise convolutions stay dense, each for its own reason."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
    )
    result = plan(model)
    reasons = [layer.reason for layer in result.layers]
    for seen, wanted in zip(
        reasons, ["input is analog", "depthwise", "drives nothing", "readout"], strict=True
    ):
        assert wanted in seen
    assert [layer.name for layer in result.sparse] == ["2"]
    assert [layer.kind for layer in result.layers] == ["Conv2d"] * 3 + ["Linear"]
    assert json.loads(json.dumps(result.to_dict()))["layers"][2]["nm"] == "2:4"
    assert "1 of 4 weight layers become N:M" in str(result)


@pytest.mark.parametrize("widths", [(8, 8), (8, 16, 4)])
def test_small_models_become_sparse_too(widths):
    """Of one or two layers the first becomes sparse: better than nothing; verify agrees."""
    model = stack(*widths)
    assert [layer.name for layer in plan(model).sparse] == ["0"]
    spikenm_fx.fold(spikenm_fx.sparsify(model))
    assert spikenm_fx.verify(model, "2:4").valid


def test_rules_turn_on_the_defaults_and_set_patterns():
    """A rule that names them turns on input layer and head, each with its own pattern."""
    result = plan(stack(8, 8, 8, 8), "2:4", rules=[Rule("0", "1:4"), Rule("2", "3:4", reason="y")])
    assert [layer.nm for layer in result.layers] == [NM(1, 4), NM(2, 4), NM(3, 4)]
    assert entry(result, "2").reason == "y"


def test_the_first_matching_rule_decides_and_ignore_wins():
    """Order matters among rules, except that ignore beats them all."""
    model = stack(8, 8, 8, 8, 8)
    rules = [Rule("1", "1:4"), Rule("re:[12]", "3:4"), Rule("2", action="ignore")]
    result = plan(model, rules=rules)
    assert entry(result, "1").nm == NM(1, 4)
    assert entry(result, "2").nm is None
    assert "ignore" in entry(result, "2").reason
    result = plan(model, rules=[Rule("1", action="keep_dense", reason="mine"), Rule("re:.*")])
    assert entry(result, "1").reason == "mine"
    assert len(result.sparse) == 3


def test_classes_match_by_inheritance():
    """class: rules know base classes by short and by full name; sub-string hits are no match."""
    model = nn.Sequential(nn.Linear(8, 8), Wrapped(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
    for name in ("Wrapped", f"{Wrapped.__module__}.Wrapped"):
        result = plan(model, rules=[Rule(f"class:{name}", "1:4")])
        assert [layer.name for layer in result.layers if layer.nm == NM(1, 4)] == ["1"]
    result = plan(model, rules=[Rule("class:Linear", "1:4")])
    assert [layer.nm for layer in result.layers] == [NM(1, 4)] * 3 + [None]
    with pytest.raises(PlanError, match="matches none"):
        plan(model, rules=[Rule("class:Line")])


def test_expressions_match_the_whole_name():
    """re: rules use fullmatch, plain rules equality."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"q": stack(8, 8, 8)}), nn.Linear(8, 8))
    assert len(plan(model, rules=[Rule(r"re:1\.q\..*", "1:4")]).sparse) == 2
    for rule in (Rule("re:q"), Rule("1"), Rule("1.q"), Rule("1.q.*"), Rule("re:1")):
        with pytest.raises(PlanError, match="matches none"):
            plan(model, rules=[rule])


def test_rules_in_vain_list_near_misses():
    """A rule that matches nothing is an error that shows what was probably meant."""
    model = nn.ModuleDict({"attention_query": nn.Linear(8, 8), "body": stack(8, 8, 8)})
    with pytest.raises(PlanError, match="near misses: attention_query"):
        plan(model, rules=[Rule("atention_query")])
    with pytest.raises(PlanError, match="near misses: Linear"):
        plan(model, rules=[Rule("class:linear")])


@pytest.mark.parametrize(
    "arguments",
    [
        {"match": ""},
        {"match": None},
        {"match": "re:("},
        {"match": "a", "action": "prune"},
        {"match": "a", "remainder": "wrap"},
        {"match": "a", "nm": "5:4"},
        {"match": "a", "nm": 124},
    ],
    ids=str,
)
def test_malformed_rules_are_refused_at_once(arguments):
    """A rule is checked when it is written, not when it is used."""
    with pytest.raises(spikenm_fx.SpikeNMError):
        Rule(**arguments)


def test_no_weight_layers_is_an_error():
    """A model without Linear or Conv says so; one whose layers all stay dense lists why."""
    with pytest.raises(PlanError, match="holds no Linear or Conv"):
        plan(nn.Sequential(nn.ReLU(), nn.Embedding(4, 4)))
    with pytest.raises(PlanError, match=r"none of the 2 weight layers") as caught:
        plan(stack(6, 6, 6), "2:4")
    assert "not a multiple of 4" in str(caught.value)
    assert "pad" in str(caught.value)


class _Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8), nn.Linear(8, 8))


def _with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8), nn.Linear(8, 8))


def _tied_to_embedding() -> nn.Module:
    model = _with(nn.Linear(8, 16))
    model.append(nn.Embedding(16, 8))
    model[4].weight = model[1].weight
    return model


def _tied_to_another_kind() -> nn.Module:
    model = _with(nn.Conv1d(8, 8, 3))
    other = nn.ConvTranspose1d(8, 8, 3)
    other.weight = model[1].weight
    model.insert(1, other)
    return model


def _integer() -> nn.Module:
    model = _with(nn.Linear(8, 8))
    del model[1].weight
    model[1].register_parameter(
        "weight", nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    )
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: _with(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))), "computed"),
        (lambda: _with(nn.utils.weight_norm(nn.Linear(8, 8))), "computed"),
        (lambda: _with(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))), "computed"),
        (lambda: _with(nn.utils.spectral_norm(nn.Linear(8, 8))), "computed"),
        (lambda: _with(nn.LazyLinear(8)), "lazy"),
        (lambda: _with(nn.LazyConv2d(8, 3)), "lazy"),
        (_integer, "int8, not floating"),
        (lambda: _with(nn.Linear(0, 8)), "empty"),
        (lambda: _with(nn.Linear(8, 0)), "empty"),
        (lambda: _with(nn.Conv2d(4, 4, 3, groups=4)), "depthwise"),
        (_tied_to_embedding, r"shares its weight with 4\.weight"),
        (_tied_to_another_kind, "layer of another kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_cannot_be_masked_say_why(build, reason):
    """Impossible layers stay dense with a reason, even if a rule asks for them; nothing changes."""
    model = build()
    state = None if "lazy" in reason else {k: v.clone() for k, v in model.state_dict().items()}
    for rules in ([], [Rule("1")], [Rule("re:.*")]):
        layer = entry(plan(model, rules=rules), "1")
        assert layer.action == "keep_dense"
        assert re.search(reason, layer.reason)
    if state is not None:
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    spikenm_fx.sparsify(model)
    assert not hasattr(model[1], "weight_nm")
    spikenm_fx.fold(model)


def test_tied_layers_that_differ_stay_dense():
    """Two layers with one weight cannot have two patterns: both stay dense and say so."""
    model = stack(8, 8, 8, 8)
    model[1].weight = model[2].weight
    result = plan(model)  # the head is dense by default
    assert not entry(result, "1").nm
    assert "shares its weight with 2" in entry(result, "1").reason
    result = plan(model, rules=[Rule("0"), Rule("1", "1:4"), Rule("2", "2:4")])
    assert [entry(result, name).nm for name in "12"] == [None, None]
    result = plan(model, rules=[Rule("1", "1:4"), Rule("2", "1:4")])
    assert [entry(result, name).nm for name in "12"] == [NM(1, 4), NM(1, 4)]


def test_planning_a_training_model_with_random_weights_is_pure():
    """Computed weights draw random numbers and move buffers: planning puts both back."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, weight):
            self.calls += 1
            return weight + torch.randn_like(weight)

    model = _with(nn.Linear(8, 8)).train()
    nn.utils.parametrize.register_parametrization(model[1], "weight", Noisy())
    noisy = model[1].parametrizations.weight[0]
    calls, rng = noisy.calls.clone(), torch.random.get_rng_state()
    plan(model)
    assert noisy.calls == calls
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_planning_a_sparse_model_is_pure():
    """Plan of a sparse model lists the same layers and does not disturb its masks."""
    model = spikenm_fx.sparsify(network())
    state = copy.deepcopy(model.state_dict())
    assert [layer.name for layer in plan(model).layers] == ["0", "2", "4"]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_plan_survives_json():
    """What to_dict wrote, from_dict reads back equal; anything else is an error that says so."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Linear(8, 6))
    decided = plan(model, "1:4", rules=[Rule("2", nm="2:8", remainder="pad"), Rule("0")])
    assert spikenm_fx.Plan.from_dict(json.loads(json.dumps(decided.to_dict()))) == decided
    for wrong in ({}, {"model": "Net", "layers": [{}]}, {"model": "Net", "layers": 3}, None):
        with pytest.raises(PlanError, match="plan"):
            spikenm_fx.Plan.from_dict(wrong)
    entry = decided.to_dict()["layers"][0]
    for changed in ({"action": "prune"}, {"colour": "red"}):
        with pytest.raises(PlanError, match="an entry of the plan"):
            spikenm_fx.Plan.from_dict({"model": "Net", "layers": [entry | changed]})


def test_notebooks_show_a_table():
    """The table of a notebook has every layer, and escapes what names may hold."""
    model = nn.ModuleDict({"a<b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d": nn.Linear(8, 8)})
    html = plan(model)._repr_html_()
    assert html.count("<tr>") == 4
    assert "a&lt;b" in html
    assert "a<b" not in html


def test_only_a_way_out_that_works_is_advised():
    """A rule is recommended for layers that it can turn on, and for no others."""
    with pytest.raises(PlanError, match="no rule can change that") as caught:
        plan(nn.Conv2d(1, 32, 3))
    assert "depthwise" not in str(caught.value)
    assert "one input channel" in str(caught.value)
    with pytest.raises(PlanError, match=r"rules=\[Rule\('1', remainder='pad'\)\]"):
        plan(nn.Sequential(nn.Conv2d(1, 32, 3), nn.Conv2d(6, 8, 3)))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    with pytest.raises(PlanError, match=r"rules=\[Rule\('1'\)\]") as caught:
        plan(model, rules=[Rule("1", action="keep_dense")])
    assert plan(model, rules=[Rule("1")]).sparse


def test_a_sparse_layer_is_not_explained_by_what_keeps_others_dense():
    """The one layer of a network that can become sparse says why it does, not why it should not."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
    (only,) = plan(model, example_inputs=torch.rand(2, 8)).sparse
    assert only.name == "0"
    assert "input is analog" not in only.reason
    assert "no other layer" in only.reason


class Multiplied(nn.Module):
    """Two spiking layers around one raw weight, multiplied after ``prepare``."""

    def __init__(self, prepare, shape=(16, 8)):
        super().__init__()
        self.first, self.w, self.prepare = nn.Linear(8, 8), nn.Parameter(torch.rand(shape)), prepare
        self.gain = nn.Parameter(torch.rand(shape[0], 1) + 0.5)
        self.register_buffer("mask", torch.ones(shape).tril())
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        """[B, 8] to [B, 4]."""
        x = torch.nn.functional.linear((self.first(x) > 0).float(), self.prepare(self))
        return self.last((x[:, :16] > 0).float())


KEEPS = {
    "repeated rows": lambda m: m.w.repeat(2, 1),
    "expanded": lambda m: m.w[None].expand(3, -1, -1).flatten(0, 1),
    "lower triangle": lambda m: m.w.tril(),
    "a filled diagonal": lambda m: m.w.clone().fill_diagonal_(0),
    "masked with zero": lambda m: m.w.masked_fill(m.mask == 0, 0.0),
    "written with zero": lambda m: m.w.clone().index_fill_(0, torch.tensor([1, 3]), 0.0),
    "masked and scaled": lambda m: m.w * m.mask * m.gain.exp(),
    "chunks and concatenation": lambda m: torch.cat(m.w.chunk(2)[::-1]),
    "normalised by its rows": lambda m: m.gain * m.w / m.w.norm(dim=1, keepdim=True),
    "a constant of the forward": lambda m: m.w * torch.arange(1.0, 9.0),
}
FILLS = {
    "standardised": lambda m: m.w - m.w.mean(1, keepdim=True),
    "softmax": lambda m: torch.softmax(m.w, 1),
    "rolled along inputs": lambda m: m.w.roll(1, 1),
    "rows mixed": lambda m: m.w + m.w.flip(0),
    "filled with one": lambda m: m.w.masked_fill(m.mask == 0, 1.0),
}


@pytest.mark.parametrize("kind", KEEPS)
def test_what_keeps_zeros_in_place_keeps_the_pattern(kind):
    """The raw weight becomes N:M, and so is what the model multiplies."""
    torch.manual_seed(0)
    model, x = Multiplied(KEEPS[kind]), torch.randn(4, 8)
    decided = plan(model, "2:4", example_inputs=x)
    assert entry(decided, "w").nm == NM(2, 4), entry(decided, "w").reason
    spikenm_fx.fold(spikenm_fx.sparsify(model, decided, example_inputs=x))
    blocks = KEEPS[kind](model).detach().unflatten(1, (-1, 4))
    assert int((blocks != 0).sum(-1).max()) == 2


@pytest.mark.parametrize("kind", FILLS)
def test_what_moves_or_fills_zeros_is_dense_with_the_reason(kind):
    """A mask on the parameter would be none on the product."""
    decided = plan(Multiplied(FILLS[kind]), "2:4", example_inputs=torch.randn(4, 8))
    assert entry(decided, "w").nm is None
    assert "zeros" in entry(decided, "w").reason
    with pytest.raises(PlanError, match="cannot have it"):
        plan(
            Multiplied(FILLS[kind]),
            example_inputs=torch.randn(4, 8),
            rules=[Rule("w", "2:4"), Rule("re:.*")],
        )


class Standardised(nn.Linear):
    """Subtracts the mean of each row before it multiplies."""

    def forward(self, x):
        """As a Linear's."""
        return torch.nn.functional.linear(x, self.weight - self.weight.mean(1, keepdim=True))


class Doubled(nn.Linear):
    """Scales its weight before it multiplies."""

    def forward(self, x):
        """As a Linear's."""
        return torch.nn.functional.linear(x, 2 * self.weight)


@pytest.mark.parametrize(("kind", "sparse"), [(Standardised, False), (Doubled, True)])
def test_layers_that_compute_their_weight(kind, sparse):
    """What is multiplied decides: a scaled weight keeps its zeros, a standardised one does not."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), kind(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    decided = plan(model, "2:4", example_inputs=torch.rand(2, 8), rules=[])
    assert (entry(decided, "2").nm is not None) == sparse
    assert sparse or "zeros do not stay in place" in entry(decided, "2").reason
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class PartlyUsed(nn.Module):
    """Layers in a row with neurons between them, of which the forward uses some.

    ``readable``: without a branch on data, so that the code alone can be read.
    """

    def __init__(self, used: list[bool], *, readable: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in used)
        self.used, self.readable = used, readable

    def forward(self, x: Tensor) -> Tensor:
        which = [layer for layer, used in zip(self.layers, self.used, strict=True) if used]
        if not self.readable and float(x.sum()) < -1e9:
            return x
        for layer in which[:-1]:
            x = (layer(x) > 0.1).float()
        return which[-1](x)


@given(st.lists(st.booleans(), min_size=3, max_size=6), st.booleans())
@settings(max_examples=12, deadline=None)
def test_with_examples_at_least_as_much_becomes_sparse(used: list[bool], readable: bool) -> None:
    """Examples show inputs and heads, and leave no layer dense because no forward uses it."""
    used[used.index(True) if True in used else 0] = True
    used = used if sum(used) > 2 else [*used, True, True]
    model, x = PartlyUsed(used, readable=readable), torch.rand(2, 16)
    shown = plan(model, "2:4", example_inputs=x)
    sparse = {entry.name for entry in shown.sparse}
    assert len(sparse) >= len(plan(model, "2:4").sparse)
    places = [i for i, each in enumerate(used) if each]
    dense = {f"layers.{places[0]}", f"layers.{places[-1]}"}
    assert {entry.name for entry in shown.layers} - sparse == dense
    for entry in shown.layers:
        unused = not used[int(entry.name.rpartition(".")[2])]
        assert ("not used in the traced forward" in entry.reason) == unused


def test_a_head_that_the_code_does_not_show_is_the_last_layer() -> None:
    """Where the forward cannot be read, plan without examples leaves the same head dense."""
    model = PartlyUsed([True] * 4, readable=False)
    with_examples = plan(model, "2:4", example_inputs=torch.rand(2, 16))
    without = plan(model, "2:4")
    assert [e.name for e in without.sparse] == [e.name for e in with_examples.sparse]
