# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Reading the report, and choosing N:M
#
# Which pattern?  Train a few and look at what they cost.  The report counts every spike that meets
# a non-zero weight, so that patterns can be compared by the work they leave, not by a formula.

# %%
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import spikenm_fx
from spikenm_fx.demo.data import digits
from spikenm_fx.demo.networks import SpikingConvNet, direct_code
from spikenm_fx.report import report

OUT = Path("tutorial-output")
OUT.mkdir(exist_ok=True)
STEPS, EPOCHS = 4, 5
torch.set_num_threads(1)
data = digits()


# %%
def learn(pattern):
    torch.manual_seed(0)
    model = SpikingConvNet((16, 32, 32), hidden=64)
    steps = EPOCHS * -(-len(data.train_images) // 64)
    if pattern:
        spikenm_fx.sparsify(model, pattern, total_steps=steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.train_images)).split(64):
            scores = model(direct_code(data.train_images[batch], STEPS))
            loss = F.cross_entropy(scores, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    if pattern:
        spikenm_fx.fold(model)
    images = direct_code(data.test_images, STEPS)
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == data.test_labels).float().mean())
    return accuracy, report(model, images, batch_dim=1)


results = {pattern or "dense": learn(pattern) for pattern in (None, "2:4", "1:8", "1:16")}

# %% [markdown]
# ## The table
# * **density** is what the mask leaves; **rate in** what fires.
# * **SynOps** are accumulations: spikes that meet a non-zero weight.  **MACs** are
#   multiplications, where the input is analog (the first layer).
# * **dual sparsity** is the share of all products that either zero removes.
# * **PE util.** is 100 % where every output channel has equally many weights: N:M's promise.
# * **energy** is 0.9 pJ per AC and 4.6 pJ per MAC; give `energy=EnergyModel(...)` for your chip.
#
# Note how the first layer, dense and analog, becomes the largest part of the energy.

# %%
print(results["2:4"][1], "\n")
print("pattern  accuracy  density  SynOps/image  energy/image")
for name, (accuracy, found) in results.items():
    synops = found.operations.synops / found.samples
    print(
        f"{name:8} {accuracy:8.1%}  {found.density:7.3f}  {synops:12,.0f}"
        f"  {found.picojoule / 1e3:9.1f} nJ"
    )

# %% [markdown]
# ## Something to look at
# The trade-off, and the page of one pattern.

# %%
figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
for name, (accuracy, found) in results.items():
    synops = found.operations.synops / found.samples
    axis.scatter(synops, 100 * accuracy, s=60, color="#12936f")
    axis.annotate(name, (synops, 100 * accuracy), xytext=(6, 5), textcoords="offset points")
axis.set_xscale("log")
axis.margins(0.12)
axis.spines[["top", "right"]].set_visible(False)
axis.set_xlabel("SynOps per image")
axis.set_ylabel("test accuracy, %")
axis.grid(alpha=0.3)
figure.savefig(OUT / "04_choosing.png", dpi=110)
(OUT / "04_report.html").write_text(results["1:8"][1].to_html())
print(f"figure: {OUT / '04_choosing.png'}, page: {OUT / '04_report.html'}")
