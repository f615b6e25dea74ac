# SPDX-License-Identifier: Apache-2.0
"""What ranks do in ``test_sharded.py`` beside plain training: bytes, refusals, what follows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from loops import OverTime, heard, refused, spiking_net, step_of
from parts import (
    answer,
    batches,
    collectives,
    in_use,
    loss_of,
    net,
    sent,
    sharded,
    sparse,
    state_of,
    train_part,
)
from strategies import ALL_LAYERS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import spikenm_fx
from spikenm_fx._torch import TorchDispatchMode, tree_leaves
from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.bench.training import KnownLIF
from spikenm_fx.bench.worker import launches, living
from spikenm_fx.masks.methods.activity import Activity
from spikenm_fx.plan import Rule


class Bytes(TorchDispatchMode):
    """Counts what this rank gives to collectives meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sent = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls += 1
            self.sent += sum(
                t.numel() * t.itemsize for t in tree_leaves(args) if isinstance(t, Tensor)
            )
        return func(*args, **(kwargs or {}))


def communicated(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Calls and bytes of a step between refreshes of the credits, and of one with them."""
    found = {}
    for name, masked in (("dense", False), ("sparse", True)):
        model = spiking_net(64)
        model = sharded(sparse(model) if masked else model, mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        data = [x.float() for x in batches(6)]
        train_part(model, optimizer, data[:4], rank, 2)
        for kind, x in (("ordinary", data[4]), ("refresh", data[5])):
            with Bytes() as counted:
                train_part(model, optimizer, [x], rank, 2)
            found[name, kind] = (counted.calls, counted.sent)
    return {f"{name}, {kind}": value for (name, kind), value in found.items()}


def _differ(one: nn.Module, other: nn.Module, parallel: Any, rank: int, steps: int) -> list[int]:
    """Steps in which two ranks on halves of a batch have other masks than one process."""
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (one, parallel)]
    found = []
    for step, x in enumerate(batches(steps)):
        used = [in_use(one), in_use(other)]
        if any(not torch.equal(mask, used[1][name]) for name, mask in used[0].items()):
            found.append(step)
        for model, part, optimizer in zip(
            (one, parallel), (x, x[:, rank::2]), optimizers, strict=True
        ):
            optimizer.zero_grad()
            loss_of(model, part).backward()
            optimizer.step()
    return found


def neighbours(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """The other methods, data parallel and in parts, before and after ``fully_shard``."""
    rank = mesh.get_local_rank()

    def plain() -> nn.Module:
        model = net()
        for name in ("1", "3"):
            setattr(model, name, KnownLIF())
        return model

    def made(model: nn.Module, name: str) -> nn.Module:
        method = Activity(growth=0.0, every=3) if name == "activity" else name
        examples = batches(1)[0] if name == "activity" else None
        return sparse(model, method=method, example_inputs=examples, total_steps=10)

    found: dict[str, Any] = {}
    for name in ("cyclical", "uticket", "regrow", "activity"):
        other = made(plain(), name)
        parallel = nn.parallel.DistributedDataParallel(other, process_group=mesh.get_group())
        found[name, "DDP"] = _differ(made(plain(), name), other, parallel, rank, 9)
        if name in ("cyclical", "uticket"):
            before, after = (
                sharded(made(plain(), name), mesh),
                made(sharded(plain(), mesh), name),
            )
            found[name, "before"] = _differ(made(plain(), name), before, before, rank, 9)
            found[name, "after"] = _differ(made(plain(), name), after, after, rank, 9)
            continue
        model = made(plain(), name)
        found[name, "refused before"] = refused(lambda model=model: sharded(model, mesh))
        found[name, "whole"] = not any(hasattr(p, "device_mesh") for p in model.parameters())
    model = sharded(plain(), mesh)
    found["regrow", "refused after"] = refused(lambda: made(model, "regrow"))
    return {", ".join(key): value for key, value in found.items()}


def unlike(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """One rank alone loads a checkpoint, or has another plan; one runs out of data."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    trained = sparse(net())
    train_part(trained, torch.optim.Adam(trained.parameters()), batches(2), 0, 1)
    found: dict[str, Any] = {}
    for order in ("loaded before", "loaded after"):
        model = sparse(net())
        if order == "loaded before" and rank == 0:
            model.load_state_dict(trained.state_dict())
        parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
        if order == "loaded after" and rank == 0:
            model.load_state_dict(trained.state_dict())
        found[order] = refused(lambda run=parallel: run(batches(1)[0]))
    rules = ALL_LAYERS if rank else (Rule("0.layer"), Rule("re:.*", action="keep_dense"))
    model = spikenm_fx.sparsify(net(), "2:4", rules=rules).train()
    try:
        parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
        found["plan"] = refused(lambda: parallel(batches(1)[0]))
    except RuntimeError as error:  # of torch, which compares parameters itself
        found["plan"] = f"sparsify: {error}"
    model = sparse(net())
    parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)

    def short() -> None:
        with parallel.join(throw_on_early_termination=True):
            train_part(parallel, optimizer, batches(2 + rank), rank, 2)

    found["out of data"] = refused(short, RuntimeError)
    found["steps"] = step_of(model)
    return found


def shared_credits(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Credits of float32 ranks beside those of one process, and what a rank sends for them."""
    one, model, dense = sparse(spiking_net(64)), sparse(spiking_net(64)), spiking_net(64)
    group, ranks = mesh.get_group(), mesh.size()
    parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
    plain = nn.parallel.DistributedDataParallel(dense, process_group=group)
    data, counted = [x.float() for x in batches(7)], {}
    for name, run in (("sparse", parallel), ("dense", plain)):
        optimizer = torch.optim.SGD(run.parameters(), lr=0.0)
        train_part(run, optimizer, data[:1], rank, ranks)
        if run is parallel:  # later masks may be others, and credits with them
            first = model.state_dict()
            first = {k: v.clone() for k, v in first.items() if k.endswith("_eid") and v.any()}
        train_part(run, optimizer, data[1:5], rank, ranks)
        for kind, x in (("refresh", data[5]), ("ordinary", data[6])):
            step = partial(train_part, run, optimizer, [x], rank, ranks)
            counted[f"{name}, {kind}"] = sent(collectives(step), ranks)
    train_part(one, torch.optim.SGD(one.parameters(), lr=0.0), data[:1], 0, 1)
    far = {k: one.state_dict()[k] - v for k, v in first.items()}
    return {
        "far": max(float(v.abs().max() / first[k].abs().max()) for k, v in far.items()),
        "mean": max(float(v.abs().mean() / first[k].abs().mean()) for k, v in far.items()),
        "state": state_of(model),
        "sent": counted,
    }


def loaded_apart(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """In the middle of a run one rank, or all, load another state: what they are told."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    found: dict[str, Any] = {}
    for name, who, step, dtype in (
        ("another step", (0,), 2, torch.float64),
        ("another step, float32", (1,), 2, torch.float32),
        ("the freeze", (0,), 210, torch.float32),
        ("other masks", (0,), 3, torch.float32),
        ("other masks, float64", (1,), 3, torch.float64),
        ("in parts", (0, 1), 2, torch.float64),
        ("all of them", (0, 1), 2, torch.float32),
        ("itself", (0,), None, torch.float32),
    ):
        model = sparse(net().to(dtype))
        parallel: Any = model
        if name == "in parts":
            sharded(model, mesh)
        else:
            parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
        optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
        data = [x.to(dtype) for x in batches(14)]
        train_part(parallel, optimizer, data[:3], rank, 2)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for key, value in state.items() if step is not None else ():
            if key.endswith("_nm"):
                value[4] = step + rank * (name == "in parts")
            if key.endswith("_logits") and name != "in parts":
                value.copy_(value.flip(0))
        if rank in who:
            model.load_state_dict(state)
        found[name] = refused(partial(train_part, parallel, optimizer, data[3:], rank, 2))
        found[f"{name}, steps"] = step_of(model)
        found[f"{name}, masks"] = None if name == "in parts" else in_use(model)
    return found


def ended(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """What comes after training in parts: fold and verify; what only whole models can do."""
    rank = mesh.get_local_rank()
    model, one = sharded(sparse(net()), mesh), sparse(net())
    _differ(one, model, model, rank, 4)
    before = answer(model)
    with heard():
        verified = bool(spikenm_fx.verify(model.eval(), "2:4"))
        spikenm_fx.fold(model)
        spikenm_fx.fold(one.eval())
    after = answer(model.eval())
    state, x = state_of(model), batches(1)[0]
    found: dict[str, Any] = {
        "same": bool(torch.equal(before, after)),
        "verified": verified and bool(spikenm_fx.verify(model, "2:4")),
        "keys": sorted(state) == sorted(one.state_dict()),
        "far": max(float((state[k] - v).abs().max()) for k, v in one.state_dict().items()),
    }
    part = sharded(net(), mesh)
    only_whole: dict[str, Callable[[], object]] = {
        "trace": lambda: spikenm_fx.trace(part, x),
        "plan": lambda: spikenm_fx.plan(part, "2:4", example_inputs=x),
        "sparsify": lambda: sparse(part, example_inputs=x),
        "report": lambda: spikenm_fx.report(part, x),
        "pack": lambda: spikenm_fx.pack(model, x),
        "adopt": lambda: spikenm_fx.export.adopt(model, "2:4"),
    }
    return {**found, "refused": {verb: refused(run) for verb, run in only_whole.items()}}


def transposed(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Transposed and grouped convolutions, cut along either axis of their channels."""
    rank, found = mesh.get_local_rank(), {}

    def plain(groups: int) -> nn.Module:
        torch.manual_seed(0)
        up = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=groups)
        return nn.Sequential(up, nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups)).double()

    for groups in (1, 2):
        for axis in (0, 1):
            one, model = (sparse(plain(groups), eid=None) for _ in range(2))
            first = model[0]._parameters["weight"]
            placed = Shard(axis)
            fully_shard(
                model,
                mesh=mesh,
                shard_placement_fn=lambda p, w=first, at=placed: at if p is w else Shard(0),
            )
            optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (one, model)]
            equal = []
            for x in torch.rand(4, 4, 8, 5, 5, generator=torch.Generator().manual_seed(0)).double():
                used = in_use(one), in_use(model)
                equal.append(all(torch.equal(m, used[1][n]) for n, m in used[0].items()))
                for m, part, optimizer in zip(
                    (one, model), (x, x[rank::2]), optimizers, strict=True
                ):
                    optimizer.zero_grad()
                    m(part).square().mean().backward()
                    optimizer.step()
            found[f"{groups} groups, axis {axis}"] = equal
    return found


def without_values(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """A model made on the meta device, sharded, given values; one of which a layer has none."""
    with torch.device("meta"):
        model = spiking_net(20)
    fully_shard(model, mesh=mesh)
    early = refused(lambda: sparse(model))
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    sparse(model)
    train_part(
        *(model, torch.optim.Adam(model.parameters())),
        *([x.float() for x in batches(2)], mesh.get_local_rank(), 2),
    )
    mixed = spiking_net(20)
    mixed[2].to("meta")
    return {"meta": early, "steps": step_of(model), "mixed": refused(lambda: sparse(mixed))}


def memory(mesh: DeviceMesh) -> dict[str, int]:
    """Bytes of a rank after steps with Adam, their gradients there, dense and with all of masks."""
    found = {}
    for name in ("dense", "sparse"):
        before = living()
        model = spiking_net(256, 64, 64)
        model = sharded(sparse(model) if name == "sparse" else model, mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for x in torch.rand(3, 2, 2, 64):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        found[name] = sum(size for at, size in living().items() if at not in before)
        del model, optimizer, x
    return found


def launched(mesh: DeviceMesh) -> dict[str, int]:
    """Kernels that a step of the optimizer starts, dense and sparse, with few layers and many."""
    found = {}
    for depth in (2, 6):
        for name in ("dense", "sparse"):
            torch.manual_seed(0)
            blocks = [(OverTime(nn.Linear(16, 16)), SequenceLIF()) for _ in range(depth)]
            model = nn.Sequential(*[module for block in blocks for module in block])
            model = sharded(sparse(model) if name == "sparse" else model, mesh)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for x in torch.rand(3, 2, 4, 16):
                optimizer.zero_grad()
                loss_of(model, x).backward()
                counted = launches(optimizer.step)
            found[f"{name}, {depth}"] = sum(counted.kernels.values())
    return found
