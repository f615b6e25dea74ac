# SPDX-License-Identifier: Apache-2.0
"""Several ranks beside one process on the joint batch, over NCCL: whether masks are the same."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.bench.measure import RESULTS, positive, save
from spikenm_fx.bench.worker import fully_connected
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

__all__ = ["agreement", "main"]

BATCH, STEPS, INPUTS = 24, 12, 16
WAYS = ("DistributedDataParallel", "fully_shard")


def main(arguments: Sequence[str]) -> int:
    """Train on all devices that are there, at most four; write ``results/ranks.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench ranks", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda: NCCL; cpu: Gloo")
    parser.add_argument("--ranks", type=positive, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args(arguments)
    devices = torch.cuda.device_count() if options.device == "cuda" else 2
    ranks = options.ranks or min(devices, 4)
    if ranks > devices:
        print(f"not measured: {ranks} ranks need as many CUDA devices, here are {devices}")
        return 0
    if ranks < 2:
        print(f"not measured: two CUDA devices are needed, here are {devices}")
        return 0
    found = agreement(options.device, ranks)
    print(json.dumps(found, indent=1))
    save("ranks", {"settings": {"device": options.device, "ranks": ranks}, **found}, options.out)
    return int(any(row["steps_with_other_masks"] for row in found.values()))


def agreement(device: str, ranks: int) -> dict[str, Any]:
    """Steps in which ranks had other masks than one process, and how far credits are off.

    In float64 masks must be equal; credits of float32 ranks under DistributedDataParallel travel in
    six bits a number.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        ranks: at most as many as there are devices.

    Raises:
        RuntimeError: if a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        each = [
            context.Process(target=_rank, args=(r, device, ranks, folder)) for r in range(ranks)
        ]
        for process in each:
            process.start()
        for process in each:
            process.join()
        if any(process.exitcode for process in each):
            raise RuntimeError("a rank has failed; what it said stands above")
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def _rank(rank: int, device: str, ranks: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        *("nccl" if device == "cuda" else "gloo",),
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
    )
    found = {}
    for way in WAYS:
        other = _steps_apart(way, device, here, rank, ranks, torch.float64)
        apart = torch.tensor(other["steps"], device=here)
        dist.all_reduce(apart)  # of all ranks
        found[way] = {
            "steps_with_other_masks": int(apart),
            "credits_off": other["credits"],
            "float32_credits_off": _steps_apart(
                *(way, device, here, rank, ranks, torch.float32), steps=1
            )["credits"],
        }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _steps_apart(
    way: str,
    device: str,
    here: torch.device,
    rank: int,
    ranks: int,
    dtype: torch.dtype,
    steps: int = STEPS,
) -> dict[str, Any]:
    models = [_sparse(dtype).to(here) for _ in range(2)]
    one, parallel = models[0], models[1]
    run: nn.Module = parallel
    if way == "fully_shard":
        fully_shard(parallel, mesh=init_device_mesh(device, (ranks,)))
    else:
        run = nn.parallel.DistributedDataParallel(parallel)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    differ = 0
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = (2 * torch.rand(4, BATCH, INPUTS, generator=generator)).to(here, dtype)
        pairs = zip(_masks(one), _masks(parallel), strict=True)
        differ += any(not torch.equal(a, b) for a, b in pairs)
        for model, part, optimizer in zip(
            (one, run), (x, x[:, rank::ranks]), optimizers, strict=True
        ):
            optimizer.zero_grad()
            model(part).mean(0).square().mean().backward()
            optimizer.step()
    wanted, credits = (_credits(model) for model in models)
    off = [(a - b).abs().max() / a.abs().max() for a, b in zip(wanted, credits, strict=True)]
    return {"steps": differ, "credits": max(float(each) for each in off)}


def _sparse(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = fully_connected(32, inputs=INPUTS).to(dtype)
    method = SpikeNM(eid=EID(every=3))
    return spikenm_fx.sparsify(
        *(model, "2:4"), method=method, rules=[Rule("re:.*")], total_steps=2 * STEPS
    ).train()


def _masks(model: nn.Module) -> list[Tensor]:
    layers = [m for m in nn.Module.modules(model) if isinstance(m, nn.Linear)]
    return [_whole(layer.weight.detach()) != 0 for layer in layers]


def _credits(model: nn.Module) -> list[Tensor]:
    state = {k: _whole(v) for k, v in model.state_dict().items() if k.endswith("_eid")}
    return [value for value in state.values() if bool(value.any())]


def _whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found
