# SPDX-License-Identifier: Apache-2.0
"""Weights that no Linear or Conv module holds: planned, trained, stored and folded like others."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_cases import build

import spikenm_fx
from spikenm_fx import NM, Rule
from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.bench.zoo import Case
from spikenm_fx.checkpoint import load_metadata, load_state, save_state
from spikenm_fx.cli import main
from spikenm_fx.errors import CheckpointError, PlanError
from spikenm_fx.fold import dense_state_dict
from spikenm_fx.trace import trace

EVERY = (Rule("re:.*"),)  # input layer and head included
MODELS = ("hand/raw", "rockpool/lif")
AXES = {"w1": 1, "w2": 1, "w3": 0, "0_LinearTorch.weight": 0, "2_LinearTorch.weight": 0}


def built(name: str) -> Case:
    case = build(name)
    if name.startswith("rockpool"):
        with torch.no_grad():  # few inputs, and inhibition: at 1:8 they would not reach thresholds
            for layer in ("0_LinearTorch", "2_LinearTorch"):
                case.model.get_submodule(layer).weight.abs_().mul_(2.0)
    return case


def most_nonzero(weight: Tensor, axis: int, of: int) -> int:
    """The fullest block, counted here and by no code of the library."""
    rows = (weight.detach() != 0).movedim(axis, -1)
    return max(int(block.sum(-1).max()) for block in rows.split(of, -1))


def used(case: Case, name: str) -> Tensor:
    """What the model's own code gets when it asks for the parameter."""
    owner, _, key = name.rpartition(".")
    return getattr(case.model.get_submodule(owner), key)


def first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def step(case: Case, optimizer: torch.optim.Optimizer) -> Tensor:
    case.reset(case.model)
    loss = (first(case.run()).float() - 1.0).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    case.reset(case.model)
    return loss.detach()


@pytest.mark.parametrize("nm", ["2:4", "1:8"])
@pytest.mark.parametrize("name", MODELS)
def test_from_plan_to_fold(name: str, nm: str) -> None:
    """Raw weights are planned by name, N:M at each of three steps, and fold bit by bit."""
    case, pattern = built(name), NM.parse(nm)
    keys = list(case.model.state_dict())
    plain, identities = type(case.model), dict(nn.Module.named_parameters(case.model))
    decided = spikenm_fx.plan(
        case.model, nm, example_inputs=case.inputs, rules=EVERY, remainder="pad"
    )
    planned = {entry.name: entry for entry in decided.layers if entry.kind == "Parameter"}
    assert {n: entry.axis for n, entry in planned.items()} == {
        n: axis for n, axis in AXES.items() if n in identities
    }
    assert spikenm_fx.sparsify(case.model, decided) is case.model
    assert isinstance(case.model, plain)
    if name == "hand/raw":
        assert f"w1={nm}, w2={nm}, w3={nm}, method=spikenm" in repr(case.model)
    optimizer = torch.optim.SGD(spikenm_fx.param_groups(case.model, 1e-5), momentum=0.9)
    case.model.train()
    before = {n: p.detach().clone() for n, p in nn.Module.named_parameters(case.model)}
    for _ in range(3):
        step(case, optimizer)
        for each in planned:
            assert most_nonzero(used(case, each), AXES[each], pattern.of) <= pattern.keep
    moved = {n for n, p in nn.Module.named_parameters(case.model) if not torch.equal(p, before[n])}
    assert planned.keys() <= moved
    assert {f"{each}_logits" for each in planned} <= moved
    case.model.eval()
    expected = first(case.run())
    case.reset(case.model)
    spikenm_fx.verify(case.model).raise_if_invalid()
    spikenm_fx.fold(case.model)
    assert torch.equal(first(case.run()), expected)
    case.reset(case.model)
    assert list(case.model.state_dict()) == keys
    assert type(case.model) is plain
    after = dict(nn.Module.named_parameters(case.model))
    assert all(after[n] is p for n, p in identities.items())
    found = spikenm_fx.verify(case.model, decided)
    found.raise_if_invalid()
    assert {layer.name for layer in found.layers} == planned.keys()
    with torch.no_grad():
        after[list(planned)[1]].fill_(1.0)
    assert not spikenm_fx.verify(case.model, decided).valid


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints(name: str) -> None:
    """Resuming is bit-exact; dense checkpoints load; foreign axes and patterns are refused."""

    def sparse(nm: str = "2:4") -> tuple[Case, torch.optim.Optimizer]:
        case = built(name)
        dense.update(case.model.state_dict())
        spikenm_fx.sparsify(
            case.model, nm, example_inputs=case.inputs, rules=EVERY, remainder="pad", total_steps=6
        )
        case.model.train()
        return case, torch.optim.SGD(spikenm_fx.param_groups(case.model, 1e-5), momentum=0.9)

    dense: dict[str, Tensor] = {}
    (straight, one), (stopped, two) = sparse(), sparse()
    for _ in range(2):
        assert torch.equal(step(straight, one), step(stopped, two))
    stored, optimizer_stored = io.BytesIO(), copy.deepcopy(two.state_dict())
    torch.save(stopped.model.state_dict(), stored)
    stored.seek(0)
    resumed, three = sparse()
    resumed.model.load_state_dict(torch.load(stored, weights_only=True))
    three.load_state_dict(optimizer_stored)
    for _ in range(3):
        assert torch.equal(step(straight, one), step(resumed, three))
    end, same = straight.model.state_dict(), resumed.model.state_dict()
    assert end.keys() == same.keys()
    assert all(torch.equal(end[key], same[key]) for key in end)

    plain = built(name)  # the sparse weights, under dense keys
    plain.model.load_state_dict(dense_state_dict(straight.model))
    straight.model.eval()
    straight.reset(straight.model)
    assert torch.equal(first(plain.run()), first(straight.run()))
    fresh, _ = sparse()
    fresh.model.load_state_dict(built(name).model.state_dict())  # strictly
    with pytest.raises(CheckpointError, match="checkpoint 2:4, model 1:4"):
        sparse("1:4")[0].model.load_state_dict(end)


def test_a_mask_along_another_axis_is_foreign() -> None:
    """What was masked along axis 0 does not load where blocks lie along axis 1."""

    class Net(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.w, self.transposed, self.lif = nn.Parameter(torch.rand(8, 8)), transposed, lif()
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            w = self.w.T if self.transposed else self.w
            return self.head(self.lif(F.linear(self.lif(x), w)))

    x = torch.rand(3, 2, 8) * 3
    one, other = (
        spikenm_fx.sparsify(Net(t), example_inputs=x, rules=[Rule("w")]) for t in (False, True)
    )
    before = other.state_dict()
    with pytest.raises(CheckpointError, match="axis 1 in 1 groups and axis 0 in 1 groups"):
        other.load_state_dict(one.state_dict())
    after = other.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def lif() -> SequenceLIF:
    return SequenceLIF()


class Product(nn.Module):
    """One raw weight in whatever product, between two neurons and before a head."""

    def __init__(self, shape: tuple[int, ...], product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(shape) - 0.3)
        self.gain = nn.Parameter(torch.full((1,), 1.5))
        self.product, self.lif1, self.lif2 = product, lif(), lif()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif2(self.product(self, self.lif1(x)))


def _conv_transpose(m: Product, x: Tensor) -> Tensor:
    return F.conv_transpose1d(x.flatten(0, 1), m.w, groups=2).unflatten(0, x.shape[:2])


DECIDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor], int]] = {
    "linear": ((3, 2, 8), (16, 8), lambda m, x: F.linear(x, m.w), 1),
    "linear by keyword": ((3, 2, 8), (16, 8), lambda m, x: F.linear(input=x, weight=m.w), 1),
    "linear of the transposed": ((3, 2, 8), (8, 16), lambda m, x: F.linear(x, m.w.T), 0),
    "scaled": ((3, 2, 8), (16, 8), lambda m, x: F.linear(x, m.gain * m.w / 2), 1),
    "cast": ((3, 2, 8), (16, 8), lambda m, x: F.linear(x.half(), m.w.half()).float(), 1),
    "matmul": ((3, 2, 8), (8, 16), lambda m, x: x @ m.w, 0),
    "matmul from the left": ((3, 8, 2), (16, 8), lambda m, x: m.w @ x, 1),
    "one weight per head": ((4, 5, 8), (4, 8, 16), lambda m, x: torch.bmm(x, m.w), 1),
    "permuted": ((3, 2, 8), (16, 8), lambda m, x: x @ m.w.permute(1, 0), 1),
    "einsum": ((3, 2, 8), (16, 8), lambda m, x: torch.einsum("tni,oi->tno", x, m.w), 1),
    "conv1d": (
        (3, 2, 8, 5),
        (16, 4, 3),
        lambda m, x: F.conv1d(x.flatten(0, 1), m.w, groups=2).unflatten(0, x.shape[:2]),
        1,
    ),
    "conv transpose": ((3, 2, 8, 5), (8, 6, 3), _conv_transpose, 0),
}


@pytest.mark.parametrize("kind", DECIDED)
def test_products(kind: str) -> None:
    """The axis that a product sums over is found, and masked weights make an N:M product."""
    shape, weight, product, axis = DECIDED[kind]
    model, x = Product(weight, product), torch.rand(shape) * 3
    record = trace(model, x).layers["w"]
    assert (record.axis, record.undecided, record.pre) == (axis, "", ("lif1",))
    assert record.groups == (2 if kind == "conv transpose" else 1)
    spikenm_fx.sparsify(model, "2:4", example_inputs=x, rules=EVERY)
    w = model.w.detach().unflatten(0, (record.groups, -1)) if axis == 0 else model.w[None]
    assert most_nonzero(w, axis + 1 if axis else 1, 4) == 2
    expected = model.eval()(x)
    assert torch.equal(spikenm_fx.fold(model)(x), expected)
    assert bool(expected.any())


UNDECIDED: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], str]] = {
    "standardised": (
        (16, 8),
        lambda m, x: F.linear(x, m.w - m.w.mean(1, keepdim=True)),
        "passes through sub",
    ),
    "reshaped": ((4, 4, 8), lambda m, x: F.linear(x, m.w.reshape(16, 8)), "is reshaped"),
    "a divisor": ((16, 8), lambda m, x: F.linear(x, 1.0 / (m.w + 2)), "before the product"),
    "two axes": ((16, 8), lambda m, x: F.linear(F.linear(x, m.w), m.w.T), "axes 0, 1"),
    "bilinear": ((16, 8, 8), lambda m, x: F.bilinear(x, x, m.w), "no one axis"),
    "einsum over two": (
        (16, 8, 2),
        lambda m, x: torch.einsum("tni,oin->to", x, m.w).unsqueeze(1),
        "does not sum over one axis",
    ),
}


@pytest.mark.parametrize("kind", UNDECIDED)
def test_what_cannot_be_decided_stays_dense_with_the_reason(kind: str) -> None:
    """Where zeros would not stay in place, or lie along no one axis, the plan says so."""
    shape, product, why = UNDECIDED[kind]
    model, x = Product(shape, product), torch.rand(3, 2, 8) * 3
    with pytest.raises(PlanError, match=why):
        spikenm_fx.sparsify(model, "2:4", example_inputs=x, rules=EVERY)
    assert type(model) is Product
    assert [name for name, _ in model.named_parameters()] == ["w", "gain"]


class Holders(nn.Module):
    """Weights of other modules' making, used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.tied = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.several = nn.ParameterList([torch.rand(8, 8), torch.rand(8, 8)])
        self.named = nn.ParameterDict({"a": torch.rand(8, 8)})
        self.lif = lif()

    def forward(self, x: Tensor) -> Tensor:
        z = self.lif(F.linear(x, self.fc.weight, self.fc.bias))
        for w in self.several:
            z = self.lif(F.linear(z, w))
        z = self.lif(F.linear(z, self.named["a"]))
        z = self.tied(z) + F.linear(z, self.tied.weight.T)
        return F.linear(self.lif(z), self.embedding.weight)


def test_weights_of_other_holders() -> None:
    """Lists and dictionaries of parameters are masked; weights of other modules keep their role."""
    model, x = Holders(), torch.rand(3, 2, 8) * 3
    decided = spikenm_fx.plan(model, "2:4", example_inputs=x, rules=EVERY)
    dense = {entry.name: entry.reason for entry in decided.layers if not entry.nm}
    assert "weight of a Embedding" in dense.pop("embedding.weight")
    assert "used by itself, beside the Linear" in dense.pop("tied.weight")
    assert not dense
    usual = {e.name: e.reason for e in spikenm_fx.plan(model, example_inputs=x).layers}
    assert usual["fc"] == "input is analog"  # by a use that is no call
    assert usual["several.0"].startswith("spike from lif, drives lif")
    names = [entry.name for entry in decided.sparse]
    assert names == ["fc", "tied", "several.0", "several.1", "named.a"]
    spikenm_fx.sparsify(model, decided)
    assert len(model.several) == 2
    assert list(model.named) == ["a"]
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    kept = torch.load(_pickled(model), weights_only=False)
    assert torch.equal(kept.eval()(x), model.eval()(x))
    expected = model(x)
    assert torch.equal(spikenm_fx.fold(model)(x), expected)
    assert type(model.several) is nn.ParameterList
    spikenm_fx.verify(model, decided).raise_if_invalid()


def _pickled(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_layers_and_raw_weights_side_by_side() -> None:
    """A module that holds both has one clock, EID for its layers, and says why not for the rest."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 16)
            self.w = nn.Parameter(torch.rand(16, 16) - 0.3)
            self.head = nn.Parameter(torch.rand(4, 16))
            self.lif1, self.lif2 = lif(), lif()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.lif2(F.linear(self.lif1(self.fc(x)), self.w)), self.head)

    model, x = Both(), torch.rand(4, 2, 8) * 3
    decided = spikenm_fx.plan(model, "2:4", example_inputs=x)
    reasons = {entry.name: (entry.nm, entry.reason) for entry in decided.layers}
    assert reasons["w"] == (
        NM(2, 4),
        "spike from lif1, drives lif2; raw parameter: learns without EID",
    )
    assert reasons["head"] == (None, "feeds no neuron: readout")
    assert reasons["fc"][0] is None
    spikenm_fx.sparsify(model, example_inputs=x, rules=EVERY)
    optimizer = torch.optim.SGD(spikenm_fx.param_groups(model, 0.1))
    for expected in range(3):
        assert int(model.w_nm[4]) == int(model.fc.weight_nm[4]) == expected
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not bool(model.state_dict()["w_eid"].any())
    assert bool(model.state_dict()["fc.weight_eid"].any())


@pytest.mark.parametrize("name", MODELS)
def test_a_masked_model_is_traced_like_the_dense_one(name: str) -> None:
    """Masks are no neurons and no operations: the same layers, pairs and signals are found."""
    case = built(name)
    before = trace(case.model, case.inputs)
    spikenm_fx.sparsify(
        case.model, example_inputs=case.inputs, rules=EVERY, remainder="pad", method="magnitude"
    )
    after = trace(case.model, case.inputs)
    assert after.layers.keys() == before.layers.keys()
    assert after.neurons.keys() == before.neurons.keys()
    for each, record in before.layers.items():
        found = after.layers[each]
        assert (found.pre, found.post, found.axis) == (record.pre, record.post, record.axis)


def test_the_frameworks_own_parameter_list_trains() -> None:
    """Rockpool lists parameters by reading attributes; its own loop gets weights and logits."""
    case = built("rockpool/lif")
    spikenm_fx.sparsify(case.model, example_inputs=case.inputs, rules=EVERY, remainder="pad")
    case.model.train()
    listed = list(case.model.parameters().astorch())
    assert {id(p) for p in listed} == {id(p) for p in nn.Module.parameters(case.model)}
    before = case.model.get_submodule("2_LinearTorch").weight_logits.detach().clone()
    step(case, torch.optim.SGD(listed, lr=1e-3))
    assert not torch.equal(case.model.get_submodule("2_LinearTorch").weight_logits, before)
    spikenm_fx.fold(case.model)
    assert set(case.model.parameters()["2_LinearTorch"]) == {"weight"}


class Listed(nn.Module):
    """Weights in the framework's own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.lif = nn.ParameterDict({k: torch.rand(8, 8) for k in "abc"}), lif()

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights.values():
            x = self.lif(F.linear(x, weight))
        return x


def trained(model: nn.Module) -> None:
    model(torch.rand(3, 2, 8)).sum().backward()


def test_a_masked_weight_that_is_taken_out() -> None:
    """State dicts and training go on without it; fold names it, with the way back."""
    model, x = Listed(), torch.rand(3, 2, 8)
    spikenm_fx.sparsify(model, example_inputs=x, rules=EVERY)
    taken = model.weights._parameters["b"]
    trained(model)
    own = {f"weights.b{ending}" for ending in ("", "_dense", "_nm", "_eid", "_momentum")}
    keys = [key for key in model.state_dict() if key not in own]
    del model.weights["b"]
    assert list(model.state_dict()) == keys  # logits stay, for whoever puts the weight back
    trained(model)
    with pytest.raises(PlanError, match=r"weights.b \(8, 8\) is masked.*put it back"):
        spikenm_fx.fold(model)
    model.weights["b"] = taken
    spikenm_fx.fold(model)
    assert all(most_nonzero(weight, 1, 4) == 2 for weight in model.weights.values())


class Slotted(nn.Module):
    """Has a slot, which a changed class must keep."""

    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.w, self.lif, self.extra = nn.Parameter(torch.rand(8, 8)), lif(), 7

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(F.linear(self.lif(x), self.w))


def test_classes_with_slots() -> None:
    """They are masked like others."""
    model, x = Slotted(), torch.rand(3, 2, 8)
    spikenm_fx.sparsify(model, example_inputs=x, rules=EVERY)
    assert most_nonzero(model.w, 1, 4) == 2
    assert model.extra == 7
    assert type(spikenm_fx.fold(model)) is Slotted


def test_a_class_that_cannot_be_extended_is_refused() -> None:
    """Before anything is changed, with the way out."""

    class Final(Slotted):
        def __init_subclass__(cls) -> None:
            raise TypeError("this class is final")

    model, x = nn.Sequential(nn.Linear(8, 8), Final()), torch.rand(3, 2, 8)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(PlanError, match=r"1\.w is held by .*Final.*this class is final.*ignore"):
        spikenm_fx.sparsify(model, example_inputs=x, rules=EVERY)
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(module) for module in model] == [nn.Linear, Final]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Names carry the wrapper's prefix, and the parameter inside is masked."""
    inner, x = Slotless(), torch.rand(3, 2, 8) * 3
    model = wrap(inner)
    decided = spikenm_fx.plan(model, example_inputs=x, rules=EVERY)
    prefix = "module" if wrap is nn.DataParallel else "_orig_mod"
    assert [entry.name for entry in decided.sparse] == [f"{prefix}.w"]
    spikenm_fx.sparsify(model, decided)
    assert most_nonzero(inner.w, 1, 4) == 2
    spikenm_fx.verify(model, decided).raise_if_invalid()
    spikenm_fx.fold(model)
    assert type(inner) is Slotless
    spikenm_fx.verify(model, decided).raise_if_invalid()


class Slotless(nn.Module):
    """A raw weight between two neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.lif = nn.Parameter(torch.rand(8, 8)), lif()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(F.linear(self.lif(x), self.w))


def test_lent_and_compiled_weights() -> None:
    """functional_call masks what it lends; a compiled model computes what the eager one does."""
    model, x = Slotless(), torch.rand(3, 2, 8) * 3
    spikenm_fx.sparsify(model, example_inputs=x, rules=EVERY)
    model.eval()
    lent = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, lent, (x,)), model(x))
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_a_shared_raw_weight_has_one_mask() -> None:
    """Two modules that hold one Parameter keep one, masked alike, through fold."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Slotless(), Slotless()
            self.other.w = self.one.w

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x))

    model, x = Pair(), torch.rand(3, 2, 8) * 3
    with pytest.raises(PlanError, match=r"shares its weight with other\.w"):
        spikenm_fx.sparsify(model, example_inputs=x, rules=EVERY)
    assert model.one.w is model.other.w


def test_without_examples_the_way_out_is_named() -> None:
    """A model of raw weights alone cannot be planned from its modules."""
    with pytest.raises(PlanError, match="example_inputs where they are raw parameters"):
        spikenm_fx.sparsify(Slotless())


NET = """
import torch
import torch.nn.functional as F
from torch import nn
from spikenm_fx.bench.nets.handwritten import SequenceLIF


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.rand(16, 32) - 0.3)
        self.head, self.lif = nn.Linear(32, 4), SequenceLIF()

    def forward(self, x):
        x = self.lif(self.fc(x.expand(4, *x.shape)))
        return self.head(self.lif(x @ self.w)).mean(0)
"""


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file remembers along which axis a raw parameter is N:M; such files are not packed."""
    (tmp_path / "raw_net_for_cli.py").write_text(NET)
    net: dict[str, type[nn.Module]] = {}
    exec(compile(NET, "raw_net_for_cli.py", "exec"), net)
    torch.save(net["Net"]().state_dict(), tmp_path / "dense.pt")
    sparse, packed = tmp_path / "sparse.safetensors", tmp_path / "packed.safetensors"
    target = ["raw_net_for_cli:Net", "--root", tmp_path, "--input", "2,16"]

    def run(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        return int(left.value.code or 0), "".join(capsys.readouterr())

    try:
        assert run("sparsify", *target, "-c", tmp_path / "dense.pt", "-o", sparse)[0] == 0
        assert most_nonzero(load_state(sparse)["w"], 0, 4) == 2
        code, said = run("verify", sparse)
        assert (code, "w 16x32: density 0.500, found 2:4, 2:4 holds in all 128" in said) == (0, 1)
        code, said = run("pack", *target, "-c", sparse, "-o", packed)
        assert (code, "only raw parameters are N:M (w)" in said, packed.exists()) == (3, 1, 0)
        state = load_state(sparse)
        state["w"][:4] = 1.0
        save_state(sparse, state, metadata=load_metadata(sparse))
        code, said = run("verify", sparse)
        assert (code, "2:4 VIOLATED in 32 of 128 blocks" in said) == (1, 1)
    finally:
        sys.modules.pop("raw_net_for_cli", None)
