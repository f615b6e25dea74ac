# SPDX-License-Identifier: Apache-2.0
"""Models on several ranks: how tests make, cut, train and look at them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from loops import heard, masked_modules, sequences, spiking_net
from strategies import ALL_LAYERS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import spikenm_fx
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "unsigned char": 1, "bool": 1}
"""Of a number, by what the profiler calls its type."""
SIZE = 12  # samples of a joint batch: 1, 2, 3 and 4 ranks share them evenly


def net(*, seed: int = 0) -> nn.Module:
    return spiking_net(20, seed=seed).double()


def sparse(model: nn.Module, nm: str = "2:4", **options: Any) -> nn.Module:
    """EID on, masks that freeze after 85 % of ``total_steps``; 1:4 fades before."""
    method = options.pop("method", SpikeNM(eid=options.pop("eid", EID(every=5))))
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


def sharded(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    root: bool = False,
    blocks: tuple[int, ...] | None = None,
    **options: Any,
) -> nn.Module:
    """Block by block, all of them or those that are named, or as one."""
    for number, block in () if root else enumerate(model):
        if list(block.parameters()) and (blocks is None or number in blocks):
            fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad(), heard():
        found = model.eval()(sequences(1, seed=7)[0].double())
    model.train()
    return found


def train_part(model: nn.Module, optimizer: Any, data: list[Tensor], rank: int, ranks: int) -> None:
    for x in data:
        optimizer.zero_grad()
        loss_of(model, x[:, rank::ranks]).backward()
        optimizer.step()


def collectives(run: Callable[[], object]) -> Counter[str]:
    """What goes over the network meanwhile: calls by name, Python or C++, and their bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.name.startswith(("c10d::", "gloo:")):
            found[event.name] += 1
        if event.name.startswith("gloo:"):
            pairs = zip(event.input_shapes, event.input_dtypes, strict=True)
            size = sum(math.prod(shape) * BYTES[kind] for shape, kind in pairs)
            found["bytes"] += size
            found[f"bytes of {event.name}"] += size
    return found


def sent(found: dict[str, int], ranks: int) -> float:
    """Bytes that each rank sends for what :func:`collectives` has found, in rings."""
    rings = {"all_reduce": 2 / ranks, "all_to_all": 1 / ranks, "all_gather": 1.0}
    sizes = {key.partition("gloo:")[2]: n for key, n in found.items() if key.startswith("bytes of")}
    return sum((ranks - 1) * rings[name] * size for name, size in sizes.items())
