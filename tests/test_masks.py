# SPDX-License-Identifier: Apache-2.0
"""Invariant 1: whatever happens to a sparse model, the weight it uses is N:M."""

import contextlib
import copy
import io
import os
import pickle
import shutil
import socket
import warnings

import pytest
import torch
from forks import started
from hypothesis import assume, given
from hypothesis import strategies as st
from profiles import tries
from strategies import ALL_LAYERS, Case, batches, cases, most_nonzero, network
from torch import nn

import spikenm_fx
from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.masks import MaskedLayer
from spikenm_fx.masks.methods.spikenm import SpikeNM


def holds(layer: nn.Module, case: Case) -> bool:
    """Whether the weight the layer uses is N:M right now, counted by the oracle."""
    most = most_nonzero(
        layer.weight, case.nm, transposed=case.transposed, groups=getattr(layer, "groups", 1)
    )
    return most <= case.nm.keep


def runs(case: Case) -> bool:
    """Whether torch itself can run and differentiate this layer in this dtype on this machine."""
    try:
        case.layer()(case.inputs()).sum().backward()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def sparse(case: Case, **options) -> nn.Module:
    return spikenm_fx.sparsify(case.model(), case.nm, remainder="pad", **options)


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-4),
    lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1),
]


@pytest.mark.filterwarnings("ignore:training goes on past total_steps")
@given(cases(), st.sampled_from(OPTIMIZERS), st.sampled_from([None, 2]))
def test_training_keeps_the_pattern(case, optimizer, total_steps):
    """In train and eval mode, before, between and after optimizer steps, the weight is N:M."""
    assume(runs(case))
    model = sparse(case, total_steps=total_steps, method=SpikeNM(decay=None, fade=0.0))
    layer, optimizer = model[0], optimizer(model.parameters())
    assert isinstance(layer, case.layer().__class__)
    for _ in range(3):
        model.train()
        assert holds(layer, case)
        optimizer.zero_grad()
        loss = (model(case.inputs()) ** 2).mean() if case.batch else model(case.inputs()).sum()
        loss.backward()
        used = layer.weight.detach()
        outside = (used == 0) & (layer.weight_dense != 0)
        outside_before = layer.weight_dense.detach()[outside].clone()
        with warnings.catch_warnings():
            if case.fill == "huge":  # overflow in half precision
                warnings.simplefilter("ignore", SpikeNMWarning)
            optimizer.step()
        grad = layer.weight_dense.grad
        assert not grad[outside].any()
        if optimizer.defaults["weight_decay"] == 0 and not optimizer.state[layer.weight_dense]:
            assert torch.equal(layer.weight_dense.detach()[outside], outside_before)
        assert torch.isfinite(layer.weight_logits).all()
        assert holds(layer, case)
        model.eval()
        assert holds(layer, case)
        model(case.inputs())
    assert holds(copy.deepcopy(layer), case)


@given(cases(), st.booleans())
def test_copies_keep_pattern_and_values(case, training):
    """deepcopy, pickle and torch.save of the whole model give the same weights and stay apart."""
    model = sparse(case).train(training)
    used = model[0].weight.detach()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        layer = other[0]
        assert type(layer) is type(model[0])
        assert torch.equal(layer.weight, used)
        with torch.no_grad():
            layer.weight_dense.add_(1.0)
            layer.weight_logits.neg_()
        assert holds(layer, case)
        assert torch.equal(model[0].weight, used)
        with contextlib.suppress(SpikeNMWarning):  # that there are no gradients
            spikenm_fx.step(other)
        assert spikenm_fx.progress(model).step == 0, "each counts its own steps"


@given(cases(), st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.float32]))
def test_casting_keeps_the_pattern(case, dtype):
    """After .to(dtype) the masked weight has the new dtype and is N:M, in both modes."""
    model = sparse(case)
    model[0].weight  # noqa: B018 - fill the cache with the old dtype
    model.eval()[0].weight  # noqa: B018
    model.to(dtype)
    for mode in (True, False):
        layer = model.train(mode)[0]
        assert layer.weight.dtype == dtype
        assert holds(layer, case)


@given(cases(dtypes=(torch.float32,), batches=(2,)))
def test_autocast(case):
    """Under bf16 autocast forward and backward run and the pattern holds."""
    model = sparse(case)
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            out = model.train(mode)(case.inputs())
            assert holds(model[0], case)
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
    assert model[0].weight_dense.grad.dtype == torch.float32


@given(cases(), st.booleans())
def test_loading_keeps_the_pattern(case, dense_first):
    """A dense checkpoint, even one without a single zero, cannot make the weight dense."""
    model = sparse(case)
    state = copy.deepcopy(case).model().state_dict()
    state["0.weight"] = torch.ones_like(state["0.weight"])
    if dense_first:
        model(case.inputs()) if runs(case) else None
    model.load_state_dict(state)
    for mode in (True, False):
        assert holds(model.train(mode)[0], case)
        assert model[0].weight_dense.all()
        assert model[0].weight_dense.unique().numel() == 1  # scaled as a whole


@given(cases(), st.data())
def test_data_edits_are_seen_in_evaluation(case, data):
    """Edits through .data, which raise no version, are never answered from a stale cache."""
    model = sparse(case).eval()
    layer = model[0]
    layer.weight  # noqa: B018
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    edit = data.draw(st.sampled_from(["flip", "negate", "swap", "shift", "logits"]))
    dense, logits = layer.weight_dense.data, layer.weight_logits.data
    if edit == "flip":
        dense.copy_(dense.flip(0))
        logits.copy_(logits.flip(0))
    elif edit == "negate":
        dense.neg_()
    elif edit == "swap":
        dense.copy_(
            dense.flatten()[torch.randperm(dense.numel(), generator=generator)].view_as(dense)
        )
    elif edit == "shift":
        dense.add_(0.5)
    else:
        logits.neg_()
    fresh = copy.deepcopy(model)[0].weight
    assert torch.equal(layer.weight, fresh)
    assert holds(layer, case)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_writing_to_the_masked_weight_does_not_last(training, grad):
    """Initialising ``layer.weight`` in place cannot make the layer dense, not even until a step."""
    model = spikenm_fx.sparsify(network()).train(training)
    with torch.set_grad_enabled(grad):
        model(batches(1)[0])
        weight = model[2].weight
        before = weight.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpikeNMWarning)  # that it did not last
            nn.init.ones_(weight)
            used = model[2].weight.detach()
        assert most_nonzero(used, spikenm_fx.NM(2, 4)) <= 2
        assert torch.equal(used, before) or bool((model[2].weight_dense == 1).all())


def test_channels_last():
    """The masked weight keeps the memory format of the dense one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    model = spikenm_fx.sparsify(model).to(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for mode in (True, False):
        model.train(mode)(x).square().sum().backward()
        assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
        assert most_nonzero(model[1].weight, spikenm_fx.NM(2, 4)) <= 2


def test_tied_layers_share_one_mask():
    """Two layers that share a Parameter use one masked tensor; its gradient is that of both."""
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    model = spikenm_fx.sparsify(
        nn.Sequential(first, nn.Tanh(), second), rules=ALL_LAYERS, method=SpikeNM(decay=None)
    )
    assert model[0].weight is model[2].weight
    assert model[0].weight_logits is model[2].weight_logits
    assert sum(p.requires_grad for p in model.parameters()) == 1
    x = torch.randn(5, 8)
    model(x).square().sum().backward()
    masked = model[0].weight.detach().clone().requires_grad_()
    kept = masked.detach() != 0
    torch.optim.SGD(model.parameters(), lr=0.0).step()  # what it sees is of kept weights alone
    (torch.tanh(x @ masked.T) @ masked.T).square().sum().backward()
    expected = masked.grad.masked_fill(~kept, 0)
    torch.testing.assert_close(model[0].weight_dense.grad, expected)
    clone = copy.deepcopy(model)
    assert clone[0].weight_dense is clone[2].weight_dense
    assert clone[0].weight is clone[2].weight
    spikenm_fx.fold(model)
    assert model[0].weight is model[2].weight
    assert spikenm_fx.verify(model, {"0": "2:4", "2": "2:4"}).valid


def test_one_module_in_two_places():
    """A layer that appears twice in the tree is masked once and folds once."""
    layer = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Tanh(), layer, nn.Linear(8, 2))
    spikenm_fx.sparsify(model)
    assert model[1] is model[3]
    model(torch.randn(2, 8)).sum().backward()
    spikenm_fx.fold(model)
    assert type(model[3]) is nn.Linear
    assert spikenm_fx.verify(model, {"1": "2:4"}).valid


def test_functional_call_and_grad():
    """functional_call masks the lent weights, and torch.func.grad gives autograd's gradients."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    spikenm_fx.sparsify(model)
    x = batches(1)[0]
    lent = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict({**twin.state_dict(), **lent, "2.weight_dense": lent["2.weight"]})
    expected = twin(x)
    assert torch.allclose(torch.func.functional_call(model, lent, x), expected)
    assert torch.equal(twin[2].weight, twin[2].weight)
    expected.square().sum().backward()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, x).square().sum()

    for name, grad in torch.func.grad(loss)(lent).items():
        expected_grad = dict(twin.named_parameters())[name].grad
        if expected_grad is None:  # logits learn in the optimizer's step
            assert not grad.any()
        else:
            torch.testing.assert_close(grad, expected_grad)


def test_inference_mode_then_training():
    """Tensors cached under inference_mode never reach a training pass."""
    model = spikenm_fx.sparsify(network())
    x = batches(1)[0]
    for mode in (True, False):
        model.train(mode)
        with torch.inference_mode():
            model(x)
        model(x).square().sum().backward()
        assert model[2].weight_dense.grad is not None
    before = model[2].weight_logits.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert not torch.equal(before, model[2].weight_logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_precision_logits_are_finite(dtype):
    """With half-precision logits and the largest default scale gradients stay finite."""
    case = Case("linear", spikenm_fx.NM(2, 4), 32, 8, dtype=dtype)
    model = sparse(case, total_steps=1)
    before = model[0].weight_logits.detach().clone()
    (model(case.inputs()) ** 2).mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert torch.isfinite(model[0].weight_logits).all()
    assert not torch.equal(before, model[0].weight_logits)


def test_seeds_differ_and_repeat():
    """The same seed gives the same masks and logits, another seed others; torch's RNG is unused."""
    before = torch.random.get_rng_state()
    models = [network() for _ in range(3)]
    torch.random.set_rng_state(before)
    for model, seed in zip(models, (7, 7, 8), strict=True):
        spikenm_fx.sparsify(model, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    a, b, c = (model[2] for model in models)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.weight_logits, b.weight_logits)
    assert not torch.equal(a.weight, c.weight)


def test_layers_of_equal_shape_draw_different_masks():
    """The layer's name is part of the key: twins do not share their noise."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    model = spikenm_fx.sparsify(nn.Sequential(*layers), rules=ALL_LAYERS)
    assert not torch.equal(model[0].weight != 0, model[1].weight != 0)


def test_replacing_the_parameter_is_masked_too():
    """Assigning a new Parameter to layer.weight keeps the layer sparse."""
    model = spikenm_fx.sparsify(network())
    model(batches(1)[0])
    model[2].weight = nn.Parameter(torch.ones(16, 16))
    for mode in (True, False):
        assert most_nonzero(model.train(mode)[2].weight, spikenm_fx.NM(2, 4)) == 2
    assert torch.equal(model[2].weight_dense, torch.ones(16, 16))


def test_sampled_masks_fade_into_the_final_one():
    """Late in an open-ended run nearly all draws are the final mask: the one-liner ends well."""
    model = spikenm_fx.sparsify(network(hidden=64))
    layer, state = model[2], model.state_dict()
    final = model.eval()[2].weight != 0
    shares = []
    for step in (0, 2_000, 2_000_000):
        state["2.weight_nm"][4] = step  # as a checkpoint of that step
        model.train().load_state_dict(state)
        assert spikenm_fx.progress(model).step == step
        shares.append(float(((layer.weight != 0) == final).float().mean()))
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_training_equals_eager():
    """torch.compile of a sparse model gives the eager losses, with fresh masks at each step."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    losses = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        model = spikenm_fx.sparsify(copy.deepcopy(plain))
        run, optimizer = wrap(model), torch.optim.Adam(model.parameters(), lr=0.01)
        history = []
        for x in batches(4):
            optimizer.zero_grad()
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            history.append(float(loss))
        assert spikenm_fx.progress(model).step == 4
        losses.append(history)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ddp_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    # exactly the single process's gradients: EID weighs by each rank's own gradient and credits
    model = spikenm_fx.sparsify(network(seed=3), total_steps=6, method=SpikeNM(eid=None))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    masks, logits = [], []
    for x in batches(9):
        optimizer.zero_grad()
        parallel(x[rank::2]).square().mean().backward()
        masks.append(model[2].weight.detach() != 0)
        logits.append(model.state_dict()["2.weight_logits"].clone())
        optimizer.step()
    state = model.state_dict()
    guided = spikenm_fx.sparsify(network(seed=3), total_steps=6)
    parallel = nn.parallel.DistributedDataParallel(guided)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    for x in batches(4):
        optimizer.zero_grad()
        parallel(x[rank::2]).square().mean().backward()
        optimizer.step()
    guided = guided.state_dict()["2.weight_logits"]
    torch.save(
        {"masks": masks, "logits": logits, "state": state, "guided": guided}, f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:training goes on past total_steps")
@pytest.mark.slow
def test_data_parallel_ranks_agree(tmp_path):
    """Two DDP ranks draw the same masks, end with the same model, and equal a single process."""
    started(_ddp_rank, free_port(), str(tmp_path), ranks=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(map(torch.equal, a["masks"], b["masks"]))
    assert torch.equal(a["guided"], b["guided"]), "with EID the ranks stay together as well"
    assert all(torch.equal(a["state"][key], b["state"][key]) for key in a["state"])
    model = spikenm_fx.sparsify(network(seed=3), total_steps=6, method=SpikeNM(eid=None))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x, mask in zip(batches(9), a["masks"], strict=True):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert torch.equal(model[2].weight != 0, mask)
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, a["state"][key], rtol=1e-3, atol=1e-3)
    frozen = a["logits"][6:]
    assert all(torch.equal(frozen[0], other) for other in frozen)


@tries(10)
@given(cases(most=8))
def test_the_layer_describes_itself(case):
    """Repr shows the user's own description with the pattern; isinstance still holds."""
    model = sparse(case)
    assert f"nm={case.nm}" in repr(model)
    assert model[0].extra_repr().startswith(case.layer().extra_repr())
    assert isinstance(model[0], MaskedLayer)
    assert isinstance(model[0], type(case.layer()))
