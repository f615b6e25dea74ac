# SPDX-License-Identifier: Apache-2.0
"""Weights in parts: FSDP2, HSDP, tensor parallelism and checkpoints of any number of ranks.

All claims are measured in one launch of four processes, of which each case uses some.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loops import heard, masked_modules, sequences, spiking_net, step_of
from strategies import ALL_LAYERS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import spikenm_fx
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

pytestmark = pytest.mark.slow

RANKS, SIZE = 4, 12  # samples of a joint batch: 1, 2, 3 and 4 ranks share them evenly
LONG, SHORT = 200, 12
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}
CASES: dict[str, dict[str, Any]] = {
    "long, Adam": {"ranks": (0, 1), "steps": LONG},
    "long, SGD": {"ranks": (2, 3), "steps": LONG, "by": "SGD", "nm": "1:4", "after": True},
    "uneven, root": {"ranks": (0, 1, 2), "root": True, "nm": "1:4"},
    "kept gathered": {"ranks": (0, 1), "options": {"reshard_after_forward": False}, "after": True},
    "always resharded": {"ranks": (0, 1), "options": {"reshard_after_forward": True}},
    "on the host": {"ranks": (0, 1), "options": {"offload_policy": CPUOffloadPolicy(False)}},
    "accumulated": {"ranks": (0, 1), "accumulate": 3},
    "one rank": {"ranks": (0,)},
    "copies of shards": {"ranks": (0, 1, 2, 3), "copies": 2},
}
"""Ways to train in parts, each of which must be one process on the joint batch."""


def net(*, seed: int = 0) -> nn.Module:
    return spiking_net(20, seed=seed).double()


def sparse(model: nn.Module, nm: str = "2:4", **options: Any) -> nn.Module:
    """EID on, masks that freeze after 85 % of ``total_steps``; 1:4 fades before."""
    method = options.pop("method", SpikeNM(eid=EID(every=5)))
    options = {"total_steps": 220, "method": method, **options}
    return spikenm_fx.sparsify(model, nm, rules=ALL_LAYERS, **options).train()


def batches(steps: int) -> list[Tensor]:
    return [x.double() for x in sequences(steps, size=SIZE)]


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x).mean(0).square().mean()


def in_use(model: nn.Module) -> dict[str, Tensor]:
    """The masks in use, whole, read off what layers hand out of themselves."""
    weights = {n: m.weight.detach() for n, m in masked_modules(model).items()}
    return {n: whole(w) != 0 for n, w in weights.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: whole(value).clone() for key, value in model.state_dict().items()}


def sharded(model: nn.Module, mesh: DeviceMesh, *, root: bool = False, **options: Any) -> nn.Module:
    for block in () if root else model:
        if list(block.parameters()):
            fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def one_process(case: dict[str, Any]) -> dict[str, Any]:
    model = sparse(net(), case.get("nm", "2:4"))
    optimizer = OPTIMIZERS[case.get("by", "Adam")](model.parameters())
    used = []
    for x in batches(case.get("steps", SHORT)):
        used.append(in_use(model))
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    return {"used": used, "state": state_of(model), "answer": answer(model)}


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad(), heard():
        found = model.eval()(sequences(1, seed=7)[0].double())
    model.train()
    return found


def in_parts(case: dict[str, Any], rank: int, mesh: DeviceMesh, expected: Any) -> dict[str, Any]:
    """Train as the case says; where masks were other than one process's, and how far states are."""
    model, nm = net(), case.get("nm", "2:4")
    if not case.get("after"):
        sparse(model, nm)
    sharded(model, mesh, root=case.get("root", False), **case.get("options", {}))
    if case.get("after"):
        sparse(model, nm)
    optimizer = OPTIMIZERS[case.get("by", "Adam")](model.parameters())
    ranks, parts = case["ranks"], case.get("accumulate", 1)
    other = []
    for step, x in enumerate(batches(case.get("steps", SHORT))):
        now = in_use(model)
        if any(not torch.equal(now[name], m) for name, m in expected["used"][step].items()):
            other.append(step)
        optimizer.zero_grad()
        mine = x[:, ranks.index(rank) :: len(ranks)].chunk(parts, dim=1)
        for number, part in enumerate(mine):
            model.set_requires_gradient_sync(number == parts - 1)
            (loss_of(model, part) / parts).backward()
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


# -- what each rank does --------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped|.*deprecated")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    groups = sorted({tuple(case["ranks"]) for case in CASES.values()})
    meshes = {ranks: DeviceMesh("cpu", list(ranks)) for ranks in groups}
    two_by_two = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("copies", "parts"))
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        if rank in case["ranks"]:
            expected = torch.load(f"{folder}/{name}.pt", weights_only=True)
            mesh = two_by_two if "copies" in case else meshes[case["ranks"]]
            found[name] = in_parts(case, rank, mesh, expected)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the four ranks found, all cases in one launch."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    for name, case in CASES.items():
        torch.save(one_process(case), folder / f"{name}.pt")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


# -- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parts_are_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """Masks are equal at every step; weights, logits, momentum and credits to rounding."""
    for rank in CASES[case]["ranks"]:
        found = ranks[rank][case]
        assert found["other"] == [], "steps with other masks than one process"
        assert found["keys"]
        assert max(found["far"].values(), default=0.0) < 1e-6, found["far"]
        assert found["answer"] < 1e-9
        assert found["step"] == CASES[case].get("steps", SHORT)
