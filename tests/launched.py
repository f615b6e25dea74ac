# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does that ``torchrun`` has started: ``launched.py FOLDER``.

Each launcher and trainer of others trains the same small network as one process does on the joint
batch; what is found is written as ``FOLDER/RANK.json``.  All in one launch, as imports cost
seconds.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from loops import refused, sequences, spiking_net, step_of
from strategies import ALL_LAYERS
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import spikenm_fx
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

IMPORTED = (
    *("pytorch_lightning", "accelerate", "spikingjelly.activation_based.functional"),
    "spikingjelly.activation_based.distributed.vision.execution",
    "spikingjelly.activation_based.distributed.tensor_parallel",
)
"""What each rank needs beside the imports of this file."""
STEPS, SIZE, RANKS = 6, 4, 2
PARTS = 5  # of the network


def sparse(*, inside: nn.Module | None = None, **options: Any) -> nn.Module:
    """The network in training mode, its credits refreshed every other step."""
    model = spiking_net(16).double() if inside is None else inside
    method = SpikeNM(eid=EID(every=2))
    options = {"method": method, "rules": ALL_LAYERS, "total_steps": 40, **options}
    return spikenm_fx.sparsify(model, "2:4", **options).train()


def data(*, steps: int = 4) -> list[Tensor]:
    """Joint batches ``[steps, N, 8]``."""
    return [x.double() for x in sequences(STEPS, steps=steps, size=SIZE)]


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return model(x).square().mean()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def mine(x: Tensor) -> Tensor:
    """This rank's samples of a joint batch; both ranks' of a half make that half of the batch."""
    return torch.cat([half[:, dist.get_rank() :: RANKS] for half in x.chunk(2, dim=1)], dim=1)


def one_process(model: nn.Module, *, parts: int = 1) -> nn.Module:
    """Train it on the joint batches, each in some micro-batches."""
    optimizer = adam(model)
    for x in data():
        optimizer.zero_grad()
        for part in x.chunk(parts, dim=1):
            (loss_of(model, part) / parts).backward()
        optimizer.step()
    return model


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def compared(found: nn.Module, expected: nn.Module) -> dict[str, Any]:
    """Whether both evaluate with the same masks, how far their states are, and their steps."""
    own, other = whole(found.state_dict()), expected.state_dict()
    names = [key for key in other if key.endswith(".weight")]
    return {
        "keys": sorted(own) == sorted(other),
        "masks": all(torch.equal(own[key] != 0, other[key] != 0) for key in names),
        "far": max(float((own[key] - value).abs().max()) for key, value in other.items()),
        "steps": [step_of(found), step_of(expected)],
        "moved": any(bool(v.any()) for k, v in own.items() if k.endswith("_momentum")),
    }


# -- launchers ------------------------------------------------------------------------------------


def torchrun() -> dict[str, Any]:
    """The usual loop under DistributedDataParallel, accumulating two micro-batches."""
    model = sparse()
    parallel = DistributedDataParallel(model)
    optimizer = adam(parallel)
    for x in data():
        optimizer.zero_grad()
        first, second = mine(x).chunk(2, dim=1)
        with parallel.no_sync():
            (loss_of(parallel, first) / 2).backward()
        (loss_of(parallel, second) / 2).backward()
        optimizer.step()
    return compared(model, one_process(sparse(), parts=2))


def accelerate() -> dict[str, Any]:
    """The same, its accumulation included."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = sparse()
    parallel, optimizer = accelerator.prepare(model, adam(model))
    for x in data():
        for part in mine(x).chunk(2, dim=1):
            with accelerator.accumulate(parallel):
                accelerator.backward(loss_of(parallel, part))
                optimizer.step()
                optimizer.zero_grad()
    kept = accelerator.unwrap_model(parallel) is model
    return {**compared(model, one_process(sparse(), parts=2)), "unwrapped": kept}


def _lightning(strategy: Any, *, shard: bool) -> nn.Module:
    import pytorch_lightning as lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = sparse()

        def configure_model(self) -> None:
            if shard and not isinstance(self.net, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                for block in (self.net[0], self.net[2]):
                    fully_shard(block, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

        def training_step(self, x: Tensor, _: int) -> Tensor:
            return loss_of(self.net, x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader([mine(x) for x in data()], batch_size=None)

    task = Task()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task)
    return task.net.train()


def lightning_ddp() -> dict[str, Any]:
    """Lightning's DDP strategy."""
    return compared(_lightning("ddp", shard=False), one_process(sparse()))


def lightning_fsdp2() -> dict[str, Any]:
    """Lightning's strategy for FSDP2."""
    from pytorch_lightning.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    return compared(_lightning(strategy, shard=True), one_process(sparse()))


def lightning_fsdp1() -> dict[str, Any]:
    """Lightning's strategy for FSDP's predecessor, which wraps the model in its own setup."""
    from pytorch_lightning.strategies import FSDPStrategy

    class OnTheHost(FSDPStrategy):  # without a GPU both refuse for that reason alone
        root_device = SimpleNamespace(index=torch.device("cpu"))

    return {"refused": refused(lambda: OnTheHost()._setup_model(sparse()))}


# -- compilers ------------------------------------------------------------------------------------


def _shard(model: nn.Module) -> nn.Module:
    for block in (model[0], model[2]):
        fully_shard(block)
    return fully_shard(model)


def _parts(model: nn.Module, compiled: Callable[[nn.Module], Any]) -> nn.Module:
    for name in ("0", "2"):
        setattr(model, name, compiled(model.get_submodule(name)))
    return _shard(model)


def _in_place(model: nn.Module, backend: Any) -> nn.Module:
    for block in (model[0], model[2]) if backend is not None else ():
        block.compile(backend=backend)
    return _shard(model)


COMPILED: dict[str, Callable[[nn.Module, Callable[[nn.Module], Any], Any], Any]] = {
    "compiled inside of DDP": lambda m, compiled, _: DistributedDataParallel(compiled(m)),
    "DDP inside of the compiler": lambda m, compiled, _: compiled(DistributedDataParallel(m)),
    "compiled parts, then sharded": lambda m, compiled, _: _parts(m, compiled),
    "parts compiled in place, then sharded": lambda m, _, backend: _in_place(m, backend),
    "sharded, then compiled": lambda m, compiled, _: compiled(_shard(m)),
}
"""A model, what compiles a module, and with which backend (None: not at all)."""


def compilers() -> dict[str, Any]:
    """Each way with EID on, beside the same way uncompiled: states, outputs and graphs."""
    found, joint = {}, data(steps=2)  # graphs unroll them
    for way, build in COMPILED.items():
        torch.compiler.reset()
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _: object, made: list = graphs) -> Any:
            made.append(graph)
            return graph.forward

        runs = []
        for how in (None, backend):
            model = sparse(example_inputs=joint[0])
            run = build(
                model, lambda m, b=how: m if b is None else torch.compile(m, backend=b), how
            )
            optimizer, outputs = adam(run), []
            for step, x in enumerate(joint):
                optimizer.zero_grad()
                loss_of(run, mine(x)).backward()
                optimizer.step()
                if step in (2, 3):
                    run.eval()
                    with torch.no_grad():
                        outputs.append(run(mine(x)).clone())
                    run.train()
            state = {k.replace("_orig_mod.", ""): v for k, v in whole(model.state_dict()).items()}
            runs.append((state, outputs, step_of(model)))
        (plain, expected, _), (own, outputs, steps) = runs
        found[way] = {
            "equal": own.keys() == plain.keys() and all(torch.equal(own[k], plain[k]) for k in own),
            "outputs": all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True)),
            "credits": sum(bool(v.any()) for k, v in own.items() if k.endswith("_eid")),
            "graphs": len(graphs),
            "steps": steps,
        }
    torch.compiler.reset()
    return found


# -- SpikingJelly's own ---------------------------------------------------------------------------


def jelly_net() -> nn.Module:
    """A small convolutional network of SpikingJelly's, over ``[T, N, 4, 8, 8]``."""
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(4, 8, 3, padding=1, bias=False),
        layer.BatchNorm2d(8),
        neuron.LIFNode(),
        layer.Conv2d(8, 8, 3, padding=1, bias=False),
        neuron.LIFNode(),
        layer.Flatten(),
        layer.Linear(8 * 64, 4),
    )
    functional.set_step_mode(net, "m")
    return net.double()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [4 * torch.rand(2, SIZE, 4, 8, 8, generator=generator).double() for _ in range(STEPS)]


def _trained(model: nn.Module, parallel: nn.Module, batches: list[Tensor]) -> nn.Module:
    from spikingjelly.activation_based import functional

    optimizer = adam(parallel)
    for x in batches:
        optimizer.zero_grad()
        loss_of(parallel, x).backward()
        optimizer.step()
        functional.reset_net(model)
    return model


def jelly(mode: str) -> dict[str, Any]:
    """As SpikingJelly's vision training wraps a model, and its full checkpoint back and forth."""
    from spikingjelly.activation_based.distributed.vision import execution
    from spikingjelly.activation_based.precision.config import PrecisionConfig
    from torch.distributed.device_mesh import init_device_mesh

    def wrapped(seed: int) -> tuple[nn.Module, nn.Module]:
        model = sparse(inside=jelly_net(), example_inputs=images()[0], seed=seed)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()  # statistics are those of a rank's own samples, masked or not
        if mode == "ddp":  # its helper names a device, of which there is none here
            return model, DistributedDataParallel(model, broadcast_buffers=True)
        parallel = execution._wrap_data_parallel(
            model,
            data_parallel="fsdp2",
            pipeline_parallel_size=1,
            step_mode="m",
            precision=PrecisionConfig(mode="fp32"),
            device=torch.device("cpu"),
            dp_size=RANKS,
            dp_group=None,
            dp_mesh=init_device_mesh("cpu", (RANKS,)),
            fsdp_roots=("0", "1", "3"),
        )
        return model, parallel

    model, parallel = wrapped(0)
    _trained(model, parallel, [mine(x) for x in images()])
    reference = sparse(inside=jelly_net(), example_inputs=images()[0])
    reference[1].eval()
    _trained(reference, reference, images())
    saved, back = whole(model.state_dict()), {}
    for who in ("all", "first"):
        first = who == "first"
        options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=first)
        full = states.get_model_state_dict(parallel, options=options)
        loaded, again = wrapped(0)
        own = full if not first or dist.get_rank() == 0 else {}
        states.set_model_state_dict(again, own, options=options)
        found = whole(loaded.state_dict())
        back[who] = all(torch.equal(value, found[key]) for key, value in saved.items())
    return {**compared(model, reference), "back": back}


def jelly_tensors() -> dict[str, Any]:
    """Its tensor parallel layers: refused of a masked layer, masked when they are built before."""
    from spikingjelly.activation_based.distributed.tensor_parallel import ChannelShardConv2d

    masked = sparse(inside=jelly_net(), example_inputs=images()[0])
    refusals = [
        refused(lambda mode=mode: ChannelShardConv2d(masked[3], dist.group.WORLD, mode))
        for mode in ("colwise", "rowwise")
    ]
    net = jelly_net()
    up = ChannelShardConv2d(net[0], dist.group.WORLD, "colwise")
    down = ChannelShardConv2d(net[3], dist.group.WORLD, "rowwise")
    cut = nn.Sequential(up, net[2], down, *list(net)[4:]).double()
    x = images()[0]
    sparse(inside=cut, example_inputs=x)
    before = {name: p.detach().clone() for name, p in cut.named_parameters()}
    _trained(cut, cut, images())
    fullest = []
    for part in (cut.train(), cut.eval()):
        for layer in (part[0], part[2]):
            drawn = layer.weight.detach() != 0
            fullest.append(int(drawn.unflatten(1, (-1, 4)).sum(2).max()))
    moved = [n for n, p in cut.named_parameters() if not torch.equal(p, before[n])]
    return {
        "refused": refusals,
        "fullest": max(fullest),
        "moved": sorted(n for n in moved if n.endswith("_logits")),
    }


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "torchrun": torchrun,
    "accelerate": accelerate,
    "Lightning, DDP": lightning_ddp,
    "Lightning, FSDP2": lightning_fsdp2,
    "Lightning, FSDP1": lightning_fsdp1,
    "compilers": compilers,
    "SpikingJelly, DDP": lambda: jelly("ddp"),
    "SpikingJelly, FSDP2": lambda: jelly("fsdp2"),
    "SpikingJelly, in tensors": jelly_tensors,
}


def main(folder: Path) -> None:
    """Run every check; one that fails says how."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped|.*deprecated|.*does not have many")
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check()
        except Exception:  # the others are looked at all the same
            found[name] = {"failed": traceback.format_exc()}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
