# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Distributed training, and resuming
#
# Masks are drawn from (seed, step, layer), so every rank draws the same ones and none are sent;
# what each rank measures for the distillation is averaged in one call whenever it is measured anew.
# Under `fully_shard` each rank masks the part of a weight that it holds, before it is gathered.
# A checkpoint holds weights, mask scores and the step: a resumed run goes on exactly where it was,
# and a sharded one loads on any number of ranks.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import spikenm_fx
from spikenm_fx.demo.data import digits
from spikenm_fx.demo.networks import SpikingConvNet, direct_code
from spikenm_fx.distributed_checkpoint import load_distributed, save_distributed

OUT = Path("tutorial-output")
OUT.mkdir(exist_ok=True)
torch.set_num_threads(1)
TOTAL, STEPS, BATCH = 60, 4, 32
data = digits()


def build():
    torch.manual_seed(0)
    model = SpikingConvNet((8, 16, 16), hidden=32)
    spikenm_fx.sparsify(model, "2:4", total_steps=TOTAL, seed=0)
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def step_loss(model, step, rank=0, ranks=1):
    start = (step * BATCH) % (len(data.train_images) - BATCH)
    mine = torch.arange(start, start + BATCH).chunk(ranks)[rank]
    scores = model(direct_code(data.train_images[mine], STEPS))
    return F.cross_entropy(scores, data.train_labels[mine])


# %% [markdown]
# ## Two ranks
# Plain DistributedDataParallel around a sparse model; on real machines `torchrun` starts the ranks.
# Each rank writes the masks it used, to compare.


# %%
def worker(rank, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, optimizer = build()
    wrapped = DistributedDataParallel(model)
    for step in range(6):
        loss = step_loss(wrapped, step, rank, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    masks = {
        name: (layer.weight != 0)
        for name, layer in model.named_modules()
        if hasattr(layer, "weight_dense")
    }
    torch.save(masks, Path(folder) / f"masks{rank}.pt")
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    mp.start_processes(worker, (folder,), nprocs=2, start_method="fork")
    first, second = (torch.load(Path(folder) / f"masks{rank}.pt") for rank in (0, 1))
agree = all(torch.equal(first[name], second[name]) for name in first)
print(f"{len(first)} masks after six steps on two ranks: {'identical' if agree else 'DIFFERENT'}")
assert agree
assert first

# %% [markdown]
# ## Sharded: FSDP2, and resuming on another number of ranks
# `fully_shard` comes before or after `sparsify`; nothing else changes. Two ranks train and save,
# then one rank loads what two have saved and goes on. The model computes the same there, bit by
# bit. The files are those of `torch.distributed.checkpoint`, which can be called itself as well;
# `save_distributed` leaves a whole checkpoint or none, and `load_distributed` compares checksums
# first and runs no code that a file names.


# %%
def sharded_model():
    torch.manual_seed(0)
    model = SpikingConvNet((8, 16, 16), hidden=32)
    images = direct_code(data.train_images[:2], STEPS)
    spikenm_fx.sparsify(model, "2:4", example_inputs=images, total_steps=TOTAL, seed=0)
    fully_shard(model)
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def whole(model):
    """What the model computes on the same images everywhere."""
    model.eval()
    with torch.no_grad():
        scores = model(direct_code(data.train_images[:8], STEPS))
    model.train()
    return scores


def sharded_worker(rank, ranks, folder, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    model, optimizer = sharded_model()
    saved = Path(folder) / "checkpoint"
    first = 0
    if saved.exists():
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        load_distributed(state, saved)
        set_state_dict(
            *(model, optimizer),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        torch.save(whole(model), Path(folder) / "loaded.pt")
        first = spikenm_fx.progress(model).step
    for step in range(first, first + 4):
        optimizer.zero_grad()
        step_loss(model, step, rank, ranks).backward()
        optimizer.step()
    if not saved.exists():
        weights, moments = get_state_dict(model, optimizer)
        save_distributed({"model": weights, "optimizer": moments}, saved)
        torch.save(whole(model), Path(folder) / f"saved{rank}.pt")
    torch.save(spikenm_fx.progress(model).step, Path(folder) / "step.pt")
    dist.destroy_process_group()


with tempfile.TemporaryDirectory() as folder:
    for ranks, port in ((2, 29572), (1, 29573)):
        mp.start_processes(sharded_worker, (ranks, folder, port), nprocs=ranks, start_method="fork")
    before, after, reached = (
        torch.load(Path(folder) / f"{name}.pt") for name in ("saved0", "loaded", "step")
    )
print(f"one rank computes what two have saved: {torch.equal(before, after)}; step {reached}")
assert torch.equal(before, after)
assert reached == 8

# %% [markdown]
# ## Stop and resume
# One run goes through; another stops half-way, saves, is rebuilt from nothing and goes on.


# %%
def run(model, optimizer, steps):
    losses = []
    model.train()
    for step in steps:
        loss = step_loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


model, optimizer = build()
through = run(model, optimizer, range(TOTAL))

half, half_optimizer = build()
before = run(half, half_optimizer, range(TOTAL // 2))
checkpoint = OUT / "06_half.pt"
torch.save({"model": half.state_dict(), "optimizer": half_optimizer.state_dict()}, checkpoint)

again, again_optimizer = build()
state = torch.load(checkpoint, weights_only=True)
again.load_state_dict(state["model"])
again_optimizer.load_state_dict(state["optimizer"])
after = run(again, again_optimizer, range(TOTAL // 2, TOTAL))
print("resumed losses equal bit by bit:", before + after == through)
assert before + after == through
spikenm_fx.fold(again.eval())
spikenm_fx.fold(model.eval())
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))

# %% [markdown]
# ## Something to look at

# %%
figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
axis.plot(through, color="#cfd6df", linewidth=7, label="in one go")
axis.plot(before, color="#2b6cb0", label="first half")
axis.plot(range(TOTAL // 2, TOTAL), after, color="#e08a1e", label="resumed")
axis.axvline(TOTAL // 2 - 0.5, color="#667085", linewidth=0.8, linestyle="--")
axis.set_xlabel("optimizer step")
axis.set_ylabel("loss")
axis.legend()
figure.savefig(OUT / "06_resume.png", dpi=110)
print(f"figure: {OUT / '06_resume.png'}")
