# SPDX-License-Identifier: Apache-2.0
"""Weights in parts: FSDP2, HSDP, tensor parallelism and checkpoints of any number of ranks.

All claims are measured in one launch of four processes, of which each case uses some.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from forks import started
from loops import masked_modules, refused, sequences, spiking_net, step_of
from parts import (
    answer,
    batches,
    in_use,
    loss_of,
    net,
    sharded,
    sparse,
    state_of,
    train_part,
)
from parts_cases import (
    communicated,
    ended,
    launched,
    loaded_apart,
    memory,
    neighbours,
    shared_credits,
    transposed,
    unlike,
    without_values,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from spikenm_fx.masks import EID, piece

pytestmark = pytest.mark.slow

RANKS, SEED = 4, 5
LONG, SHORT = int(os.environ.get("SPIKENM_FX_STEPS", "16")), 8
"""``SPIKENM_FX_STEPS`` sets how many steps the long runs take; 200 were tried."""
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}
CASES: dict[str, dict[str, Any]] = {
    "long, Adam": {"ranks": (0, 1), "steps": LONG, "root": True},
    "long, SGD": {"ranks": (2, 3), "steps": LONG, "root": True, "by": "SGD", "nm": "1:4"},
    "DDP, Adam": {"ranks": (0, 1), "steps": LONG, "ddp": True},
    "DDP, SGD": {"ranks": (2, 3), "steps": LONG, "ddp": True, "by": "SGD", "nm": "1:4"},
    "DDP, accumulated": {"ranks": (0, 1, 2), "ddp": True, "accumulate": 2, "eid": None},
    "by block, later": {"ranks": (0, 1), "after": True},
    "by some blocks": {"ranks": (0, 1), "blocks": (0, 2)},
    "uneven": {"ranks": (0, 1, 2), "root": True, "nm": "1:4", "after": True},
    "kept gathered": {"ranks": (2, 3), "options": {"reshard_after_forward": False}},
    "always resharded": {"ranks": (2, 3), "options": {"reshard_after_forward": True}},
    "on the host": {"ranks": (2, 3), "options": {"offload_policy": CPUOffloadPolicy(False)}},
    "accumulated": {"ranks": (2, 3), "accumulate": 3, "root": True, "eid": None},
    "in pieces": {"ranks": (0, 1), "most": 64},
    "one rank": {"ranks": (0,), "root": True},
    "copies of shards": {"ranks": (0, 1, 2, 3), "copies": 2, "root": True},
}
"""Ways to train in parts, each of which must be one process on the joint batch.

Accumulated without EID, whose credits are those of the first micro-batch of a step.
"""


def mine(model: nn.Module, here: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """The masks in use of this rank's parts; after an evaluation FSDP may keep whole weights."""
    for name, module in masked_modules(model).items():
        weight = module.weight.detach()
        part = weight.to_local() if hasattr(weight, "to_local") else part_of(weight, here)
        yield name, part != 0


def part_of(mask: Tensor, here: tuple[int, int]) -> Tensor:
    """What FSDP gives to rank ``here[0]`` of ``here[1]``."""
    chunks = mask.chunk(here[1])
    return chunks[here[0]] if here[0] < len(chunks) else mask[:0]


def setting(case: dict[str, Any]) -> tuple[str, int, str, Any]:
    """What a run in one process depends on."""
    by, steps, nm = case.get("by", "Adam"), case.get("steps", SHORT), case.get("nm", "2:4")
    return by, steps, nm, case.get("eid", EID(every=5))


@functools.cache
def one_process(by: str, steps: int, nm: str, eid: EID | None) -> dict[str, Any]:
    model = sparse(net(), nm, eid=eid)
    optimizer = OPTIMIZERS[by](model.parameters())
    used = []
    for x in batches(steps):
        used.append(in_use(model))
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    return {"used": used, "state": state_of(model), "answer": answer(model)}


def in_parts(case: dict[str, Any], rank: int, mesh: DeviceMesh, expected: Any) -> dict[str, Any]:
    """Train as the case says; where masks were other than one process's, and how far states are."""
    model, (by, steps, nm, eid), ddp = net(), setting(case), case.get("ddp", False)
    if not case.get("after"):
        sparse(model, nm, eid=eid)
    parallel: Any = model
    if ddp:
        parallel = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    else:
        cut = {key: case[key] for key in ("root", "blocks") if key in case}
        sharded(model, mesh, **cut, **case.get("options", {}))
    if case.get("after"):
        sparse(model, nm, eid=eid)
    optimizer = OPTIMIZERS[by](model.parameters())
    ranks, parts = case["ranks"], case.get("accumulate", 1)
    copies = len(ranks) if ddp else case.get("copies", 1)
    other = []
    for step, x in enumerate(batches(steps)):
        here = (ranks.index(rank) % (len(ranks) // copies), len(ranks) // copies)
        if any(
            not torch.equal(m, part_of(expected["used"][step][n], here))
            for n, m in mine(model, here)
        ):
            other.append(step)
        optimizer.zero_grad()
        own = x[:, ranks.index(rank) :: len(ranks)].chunk(parts, dim=1)
        for number, part in enumerate(own):
            last = number == parts - 1
            if not ddp:
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or not ddp else parallel.no_sync():
                (loss_of(parallel, part) / parts).backward()
        optimizer.step()
        if step % 7 == 3:  # an evaluation, after which FSDP may keep what it has gathered
            answer(model)
    state = state_of(model)
    far = {k: float((state[k] - v).abs().max()) for k, v in expected["state"].items()}
    found = answer(model)
    return {
        "other": other,
        "far": {key: value for key, value in far.items() if value},
        "keys": sorted(state) == sorted(expected["state"]),
        "answer": float((found - expected["answer"]).abs().max()),
        "step": step_of(model),
    }


def checkpointed(rank: int, meshes: dict[Any, DeviceMesh], folder: str) -> dict[str, Any]:
    """Save on two ranks, go on there; load on any number, and save from four for two again."""
    found: dict[str, Any] = {}
    data = batches(10)
    if rank < 2:
        model, optimizer = _fresh(meshes[0, 1], seed=0)
        train_part(model, optimizer, data[:7], rank, 2)
        _save(model, optimizer, f"{folder}/two", meshes[0, 1])
        found["answer"], found["masks"] = answer(model), _final(model)
        found["names"] = sorted(states.get_model_state_dict(model)) == sorted(model.state_dict())
        train_part(model, optimizer, data[7:], rank, 2)
        found["through"] = state_of(model)
    dist.barrier()
    for mesh in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3]):
        if rank in mesh:
            model, optimizer = _fresh(meshes[tuple(mesh)], seed=SEED)
            _load(model, optimizer, f"{folder}/two", meshes[tuple(mesh)])
            found[f"answer on {len(mesh)}"], found[f"masks on {len(mesh)}"] = (
                answer(model),
                _final(model),
            )
            found[f"step on {len(mesh)}"] = step_of(model)
            if len(mesh) == 2:
                train_part(model, optimizer, data[7:], rank, 2)
                found["resumed"] = state_of(model)
            if len(mesh) == 4:
                _save(model, optimizer, f"{folder}/four", meshes[tuple(mesh)])
        dist.barrier()
    if rank < 2:
        model, optimizer = _fresh(meshes[0, 1], seed=SEED)
        _load(model, optimizer, f"{folder}/four", meshes[0, 1])
        found["answer by way of four"] = answer(model)
        other = sharded(sparse(net(), method="srste"), meshes[0, 1])
        state = {"model": other.state_dict()}
        state["model"] = {k: v for k, v in state["model"].items() if "_eid" not in k}
        dcp.load(state, checkpoint_id=f"{folder}/two", process_group=meshes[0, 1].get_group())
        found["another method"] = refused(lambda: other.load_state_dict(state["model"]))
    return found


def _fresh(mesh: DeviceMesh, *, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(sparse(net(seed=seed), seed=seed), mesh)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def _final(model: nn.Module) -> dict[str, Tensor]:
    found = in_use(model.eval())
    model.train()
    return found


def _save(model: nn.Module, optimizer: Any, folder: str, mesh: DeviceMesh) -> None:
    inner, outer = states.get_state_dict(model, optimizer)
    state = {"model": inner, "optimizer": outer}
    dcp.save(state, checkpoint_id=folder, process_group=mesh.get_group())


def _load(model: nn.Module, optimizer: Any, folder: str, mesh: DeviceMesh) -> None:
    inner, outer = states.get_state_dict(model, optimizer)
    state = {"model": inner, "optimizer": outer}
    dcp.load(state, checkpoint_id=folder, process_group=mesh.get_group())
    states.set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


class Pair(nn.Module):
    """Two layers as tensor parallelism cuts them: columns, then rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def parallel_in_tensors(mesh: DeviceMesh) -> dict[str, Any]:
    """Column-wise and row-wise, sparse before or afterwards, against one process."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    found: dict[str, Any] = {"far": {}, "other": {}}
    for order in ("before", "after"):
        models = [Pair().double(), Pair().double()]
        sparse(models[0], method="spikenm")
        if order == "before":
            sparse(models[1], method="spikenm")
        parallelize_module(models[1], mesh, plan)
        if order == "after":
            sparse(models[1], method="spikenm")
        optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, foreach=False) for m in models]
        for x in sequences(6):
            x = torch.cat([x, x], dim=-1).double()
            masks = [in_use(model) for model in models]
            found["other"][order] = any(
                not torch.equal(m, masks[1][n]) for n, m in masks[0].items()
            )
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        ones, parts = (state_of(model) for model in models)
        found["far"][order] = max(float((parts[k] - v).abs().max()) for k, v in ones.items())
    cut = parallelize_module(nn.Sequential(nn.Linear(12, 8)), mesh, {"0": RowwiseParallel()})
    found["cut"] = refused(lambda: sparse(cut, method="spikenm"))
    return found


def mixed(mesh: DeviceMesh) -> dict[str, Any]:
    """Half precision in forward: what layers use is N:M in training and evaluation."""
    model = sharded(
        sparse(spiking_net(20)), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    )
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=0.01), []
    for module in masked_modules(model).values():
        module.register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    for x in sequences(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    model.eval()(sequences(1)[0])
    fullest = [int((w != 0).view(w.shape[0], -1, 4).sum(-1).max()) for w in seen]
    return {"dtypes": sorted({str(w.dtype) for w in seen}), "fullest": max(fullest)}


def refusals(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Each of them on every rank, without a hang."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    other = sharded(sparse(net(), seed=rank), mesh)
    early = sharded(net(), mesh)
    early(batches(1)[0])
    uneven = nn.parallel.DistributedDataParallel(sparse(net()), process_group=mesh.get_group())

    def joined() -> None:
        with uneven.join():
            uneven(batches(1)[0])

    return {
        "seed": refused(lambda: other(batches(1)[0])),
        "first forward": refused(lambda: sparse(early)),
        "fully_shard": refused(
            lambda: FullyShardedDataParallel(
                sparse(net()), process_group=mesh.get_group(), device_id=torch.device("cpu")
            )
        ),
        "join": refused(joined),
    }


def wrapped_first(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Sparse inside of a wrapped model, or the wrapped model itself: ranks stay one model."""
    found = {}
    for name in ("model", "module"):
        parallel = nn.parallel.DistributedDataParallel(net(), process_group=mesh.get_group())
        sparse(parallel if name == "model" else parallel.module)
        optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
        train_part(parallel, optimizer, batches(6), rank, 2)
        found[name] = {k: v for k, v in parallel.module.state_dict().items() if v.dim()}
    return found


# -- what each rank does --------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what imports have made: who asks for living tensors need not look at it
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped|.*deprecated")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    groups = sorted({tuple(case["ranks"]) for case in CASES.values()} | {(0, 1, 2, 3)})
    meshes = {ranks: DeviceMesh("cpu", list(ranks)) for ranks in groups}
    two_by_two = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("copies", "parts"))
    found: dict[str, Any] = {}
    most = piece._ON_CPU
    for name, case in CASES.items():
        if rank in case["ranks"]:
            expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
            mesh = two_by_two if "copies" in case else meshes[case["ranks"]]
            piece._ON_CPU = case.get("most", most)
            found[name] = in_parts(case, rank, mesh, expected)
    piece._ON_CPU = most
    dist.barrier()
    found["checkpoints"] = checkpointed(rank, meshes, folder)
    found["launched"] = launched(meshes[0, 1, 2, 3])
    found["credits"] = shared_credits(rank, meshes[0, 1, 2, 3])
    found["memory"] = {4: memory(meshes[0, 1, 2, 3])}
    mesh = meshes[0, 1] if rank < 2 else meshes[2, 3]
    found["memory"][2] = memory(mesh)
    if rank < 2:
        found["ended"] = ended(rank, mesh)
        found["transposed"] = transposed(rank, mesh)
        found["without values"] = without_values(rank, mesh)
        found["refused"] = refusals(rank, mesh)
        found["wrapped"] = wrapped_first(rank, mesh)
        found["communicated"] = communicated(rank, mesh)
    else:
        found["neighbours"] = neighbours(rank, mesh)
        found["unlike"] = unlike(rank, mesh)
        found["apart"] = loaded_apart(rank, mesh)
        found["in tensors"] = parallel_in_tensors(meshes[2, 3])
        found["mixed"] = mixed(meshes[2, 3])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the four ranks found, all cases in one launch."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    for name, case in CASES.items():
        torch.save(one_process(*setting(case)), folder / f"{name}.pt")
    started(_rank, str(folder), ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


# -- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parts_are_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """Masks are equal at every step, all that makes them bit by bit; weights to rounding."""
    for rank in CASES[case]["ranks"]:
        found = ranks[rank][case]
        assert found["other"] == [], "steps with other masks than one process"
        assert found["keys"]
        weights = (".weight", ".weight_dense", ".bias")
        assert [key for key in found["far"] if not key.endswith(weights)] == []
        assert max(found["far"].values(), default=0.0) < 1e-12, found["far"]
        assert found["answer"] < 1e-9
        assert found["step"] == CASES[case].get("steps", SHORT)


@pytest.mark.parametrize("mesh", [1, 2, 3, 4])
def test_a_checkpoint_of_two_ranks_loads_on_any_number(
    ranks: list[dict[str, Any]], mesh: int
) -> None:
    """Another start, another number of ranks: outputs, masks and the step are those saved."""
    saved = ranks[0]["checkpoints"]
    for rank in range(mesh):
        loaded = ranks[rank]["checkpoints"]
        assert torch.equal(loaded[f"answer on {mesh}"], saved["answer"])
        masks = loaded[f"masks on {mesh}"]
        assert all(torch.equal(mask, masks[name]) for name, mask in saved["masks"].items())
        assert loaded[f"step on {mesh}"] == 7


def test_checkpoints_go_back_and_forth(ranks: list[dict[str, Any]]) -> None:
    """Two ranks, then four, then two again."""
    for rank in range(2):
        found = ranks[rank]["checkpoints"]
        assert torch.equal(found["answer by way of four"], found["answer"])


def test_a_run_resumes_exactly_on_as_many_ranks(ranks: list[dict[str, Any]]) -> None:
    """With EID on, between two refreshes: weights, logits, momentum and credits, bit by bit."""
    for rank in range(2):
        found = ranks[rank]["checkpoints"]
        for key, value in found["through"].items():
            assert torch.equal(found["resumed"][key], value), key
        assert any(bool(v.any()) for k, v in found["through"].items() if k.endswith("_eid"))


def test_names_of_a_checkpoint_are_found_in_the_model(ranks: list[dict[str, Any]]) -> None:
    """``get_model_state_dict`` gives what ``state_dict`` gives."""
    assert all(ranks[rank]["checkpoints"]["names"] for rank in range(2))


def test_a_checkpoint_of_another_method_is_refused(ranks: list[dict[str, Any]]) -> None:
    """By name, on every rank."""
    for rank in range(2):
        assert "another method" in ranks[rank]["checkpoints"]["another method"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_tensor_parallel_layers_are_one_process(ranks: list[dict[str, Any]], order: str) -> None:
    """Columns and rows, masked before or after they are cut."""
    for rank in (2, 3):
        assert not ranks[rank]["in tensors"]["other"][order]
        assert ranks[rank]["in tensors"]["far"][order] < 1e-6


def test_rows_that_cut_blocks_are_refused(ranks: list[dict[str, Any]]) -> None:
    """12 input channels over two ranks are six each, which no block of four divides."""
    for rank in (2, 3):
        text = ranks[rank]["in tensors"]["cut"]
        assert all(word in text for word in ("0 (8, 12)", "6 input channels", "blocks of 4"))


def test_mixed_precision_is_nm(ranks: list[dict[str, Any]]) -> None:
    """What a layer computes with in half precision has at most two of four non-zeros."""
    for rank in (2, 3):
        assert ranks[rank]["mixed"] == {"dtypes": ["torch.bfloat16"], "fullest": 2}


@pytest.mark.parametrize("what", ["seed", "first forward", "fully_shard", "join"])
def test_what_cannot_work_is_refused_on_every_rank(ranks: list[dict[str, Any]], what: str) -> None:
    """One error that says what to do instead; nobody waits for anybody."""
    for rank in range(2):
        assert ranks[rank]["refused"][what] is not None, "trained without a word"
        assert what in ranks[rank]["refused"][what]


@pytest.mark.parametrize("what", ["model", "module"])
def test_a_wrapped_model_may_become_sparse(ranks: list[dict[str, Any]], what: str) -> None:
    """``sparsify`` after DistributedDataParallel: ranks stay one model, bit by bit."""
    one, other = (ranks[rank]["wrapped"][what] for rank in range(2))
    assert any(key.endswith("_logits") for key in one)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("method", ["cyclical", "uticket", "regrow", "activity"])
def test_neighbours_on_two_ranks_are_one_process(ranks: list[dict[str, Any]], method: str) -> None:
    """Masks equal at every step, data parallel, and in parts where each part is enough."""
    for rank in (2, 3):
        found = ranks[rank]["neighbours"]
        for way in ("DDP", "before", "after"):
            assert found.get(f"{method}, {way}", []) == []


@pytest.mark.parametrize("method", ["regrow", "activity"])
def test_methods_that_need_whole_weights_are_refused(
    ranks: list[dict[str, Any]], method: str
) -> None:
    """By ``fully_shard`` before it cuts anything, and by ``sparsify`` after it."""
    for rank in (2, 3):
        found = ranks[rank]["neighbours"]
        assert f"{method!r} goes by the whole weight" in found[f"{method}, refused before"]
        assert found[f"{method}, whole"]
        assert "'regrow' goes by the whole weight" in found["regrow, refused after"]


@pytest.mark.parametrize(
    ("what", "words"),
    [("loaded before", "step"), ("loaded after", "step"), ("plan", "sparsify")],
)
def test_one_rank_alone_is_refused_on_all(
    ranks: list[dict[str, Any]], what: str, words: str
) -> None:
    """A checkpoint loaded by one rank, before or after DDP, and plans of other layers."""
    for rank in (2, 3):
        assert ranks[rank]["unlike"][what] is not None, "trained without a word"
        assert words in ranks[rank]["unlike"][what]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another step", "step and masks"),
        ("another step, float32", "step and masks"),
        ("the freeze", "step and masks"),
        ("other masks", "masks"),
        ("other masks, float64", "masks"),
        ("in parts", "step"),
    ],
)
def test_a_rank_that_loads_in_the_middle_is_noticed_by_all(
    ranks: list[dict[str, Any]], what: str, words: str
) -> None:
    """At the next refresh of the credits, whatever step it has loaded: one error on every rank."""
    for rank in (2, 3):
        text = ranks[rank]["apart"][what]
        assert text is not None, "trained without a word"
        assert f"differ in their {words}" in text
        assert "load a checkpoint on every rank" in text


@pytest.mark.parametrize("what", ["all of them", "itself"])
def test_ranks_that_load_alike_go_on(ranks: list[dict[str, Any]], what: str) -> None:
    """The same state on all of them, or its own state on one."""
    one, other = (ranks[rank]["apart"] for rank in (2, 3))
    assert one[what] is None
    assert other[what] is None
    assert one[f"{what}, steps"] == other[f"{what}, steps"] == (13 if what != "itself" else 14)
    for name, mask in one[f"{what}, masks"].items():
        assert torch.equal(mask, other[f"{what}, masks"][name])


def test_credits_of_four_ranks_are_those_of_one_process_to_their_six_bits(
    ranks: list[dict[str, Any]],
) -> None:
    """Each rank averages a share; all hold the same bits, and send 1.01 of the dense bytes."""
    every = EID().every
    for found in (rank["credits"] for rank in ranks):
        assert 0 < found["far"] < 2 * 2**0.5 / 31
        assert found["mean"] < 0.03
        for key, value in found["state"].items():
            assert torch.equal(value, ranks[0]["credits"]["state"][key]), key
        counted = found["sent"]
        assert (
            counted["dense, refresh"] == counted["dense, ordinary"] == counted["sparse, ordinary"]
        )
        average = ((every - 1) * counted["sparse, ordinary"] + counted["sparse, refresh"]) / every
        assert counted["dense, ordinary"] < average <= 1.01 * counted["dense, ordinary"]


def test_ranks_end_together_where_one_runs_out_of_data(ranks: list[dict[str, Any]]) -> None:
    """``join(throw_on_early_termination=True)``: torch's error, after as many steps of masks."""
    for rank in (2, 3):
        assert "exhausted" in ranks[rank]["unlike"]["out of data"]
        assert ranks[rank]["unlike"]["steps"] == 2


def test_models_in_parts_fold_and_verify(ranks: list[dict[str, Any]]) -> None:
    """Outputs stay bit-identical, keys are the dense ones, weights those of one process."""
    for rank in range(2):
        found = ranks[rank]["ended"]
        assert found["same"]
        assert found["verified"]
        assert found["keys"]
        assert found["far"] < 1e-12


@pytest.mark.parametrize("verb", ["trace", "plan", "sparsify", "report", "pack", "adopt"])
def test_what_needs_a_whole_model_says_how_to_get_one(
    ranks: list[dict[str, Any]], verb: str
) -> None:
    """One error of ours that names parameters in parts, and what to do."""
    for rank in range(2):
        text = ranks[rank]["ended"]["refused"][verb]
        assert text is not None
        assert all(word in text for word in ("0.layer.weight", "before fully_shard", "full_state"))


def test_transposed_and_grouped_convolutions_in_parts(ranks: list[dict[str, Any]]) -> None:
    """Whole blocks on each rank, the masks of one process."""
    for rank in range(2):
        found = ranks[rank]["transposed"]
        assert len(found) == 4
        assert all(all(equal) for equal in found.values()), found


def test_models_without_values_are_refused_until_they_have_some(
    ranks: list[dict[str, Any]],
) -> None:
    """All on the meta device, or one layer of it; ``to_empty`` and initialising make it work."""
    for rank in range(2):
        found = ranks[rank]["without values"]
        assert "0.layer (20, 8) is on the meta device" in found["meta"]
        assert "2.layer (20, 20) is on the meta device" in found["mixed"]
        assert found["steps"] == 2


def test_layers_start_no_kernels_of_their_own(ranks: list[dict[str, Any]]) -> None:
    """What masks of parts add to a step of the optimizer is the same for any number of layers."""
    for found in (rank["launched"] for rank in ranks):
        few, many = (found[f"sparse, {n}"] - found[f"dense, {n}"] for n in (2, 6))
        assert 0 < many <= few


@pytest.mark.parametrize("parts", [2, 4])
def test_memory_of_a_rank(ranks: list[dict[str, Any]], parts: int) -> None:
    """Weights, gradients, Adam; logits, momentum, credits, masks: at most 1.9 of dense FSDP2."""
    for found in (rank["memory"][parts] for rank in ranks):
        assert found["dense"] < found["sparse"] <= 1.9 * found["dense"], found


def test_masks_travel_for_free(ranks: list[dict[str, Any]]) -> None:
    """A step sends at most 1.01 of the dense bytes, on average over the steps between refreshes.

    An ordinary one has two vectors more; a refresh of the credits sends half of each masked weight,
    and one vector.
    """
    for rank in range(2):
        found = ranks[rank]["communicated"]
        calls, sent = found["sparse, ordinary"]
        dense_calls, dense_sent = found["dense, ordinary"]
        assert calls == dense_calls + 2
        assert found["sparse, refresh"][0] <= calls + 4
        every = EID().every
        average = ((every - 1) * sent + found["sparse, refresh"][1]) / every
        assert sent <= average <= 1.01 * dense_sent
