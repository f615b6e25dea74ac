# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Your framework: SpikingJelly, snnTorch and Norse side by side
#
# `sparsify` looks for Linear and Conv modules by inheritance, so the same line works whatever
# framework the neurons come from.  Here one small network is written three times, in the style of
# each framework, trained on handwritten digits at 2:4, folded, checked and measured.

# %%
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import norse.torch as norse
import snntorch
import snntorch.utils
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import spikenm_fx
from spikenm_fx.demo.data import digits
from spikenm_fx.report import report

OUT = Path("tutorial-output")
OUT.mkdir(exist_ok=True)
torch.manual_seed(0)
data = digits()
STEPS, WIDTH = 4, 64
torch.set_num_threads(1)  # matrices this small gain nothing from more


# %% [markdown]
# ## Three networks
# SpikingJelly runs whole sequences (`step_mode="m"`), snnTorch is called once per time step and
# hides its state in the neurons, Norse carries the state explicitly.


# %%
class InSpikingJelly(nn.Module):
    def __init__(self):
        super().__init__()
        fire = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
        self.net = nn.Sequential(
            layer.Linear(64, WIDTH),
            neuron.LIFNode(**fire),
            layer.Linear(WIDTH, WIDTH),
            neuron.LIFNode(**fire),
            layer.Linear(WIDTH, 10),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x):
        functional.reset_net(self)
        return self.net(x.flatten(1).expand(STEPS, -1, -1)).mean(0)


class InSnnTorch(nn.Module):
    def __init__(self):
        super().__init__()
        leaky = {"beta": 0.8, "init_hidden": True}
        self.net = nn.Sequential(
            nn.Linear(64, WIDTH),
            snntorch.Leaky(**leaky),
            nn.Linear(WIDTH, WIDTH),
            snntorch.Leaky(**leaky),
            nn.Linear(WIDTH, 10),
        )

    def forward(self, x):
        snntorch.utils.reset(self.net)
        return torch.stack([self.net(x.flatten(1)) for _ in range(STEPS)]).mean(0)


class InNorse(nn.Module):
    def __init__(self):
        super().__init__()
        lif = norse.LIFParameters(v_th=torch.as_tensor(0.3))
        self.net = norse.SequentialState(
            nn.Linear(64, WIDTH),
            norse.LIF(lif),
            nn.Linear(WIDTH, WIDTH),
            norse.LIF(lif),
            nn.Linear(WIDTH, 10),
        )

    def forward(self, x):
        out, _ = self.net(x.flatten(1).expand(STEPS, -1, -1))
        return out.mean(0)


# %% [markdown]
# ## One training loop
# Nothing in it knows of masks.  `plan` shows the decisions first: the layer behind the image and
# the classifier stay dense unless a rule names them; one rule turns the first layer on here.


# %%
def train(model, epochs=4):
    rules = [spikenm_fx.Rule("net.0", reason="64 pixels: blocks of four fit")]
    print(spikenm_fx.plan(model, "2:4", rules=rules), "\n")
    steps = epochs * -(-len(data.train_images) // 64)
    spikenm_fx.sparsify(model, "2:4", rules=rules, total_steps=steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_images)).split(64):
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    spikenm_fx.fold(model.eval())
    return model


reports, accuracies = {}, {}
for name, make in (
    ("SpikingJelly", InSpikingJelly),
    ("snnTorch", InSnnTorch),
    ("Norse", InNorse),
):
    model = train(make())
    checked = spikenm_fx.verify(model, {"net.0": "2:4", "net.2": "2:4"})
    checked.raise_if_invalid()
    with torch.no_grad():
        right = (model(data.test_images).argmax(1) == data.test_labels).float().mean()
    accuracies[name] = float(right)
    reports[name] = report(model, data.test_images)
    print(reports[name], "\n")

# %% [markdown]
# ## Something to look at
# The same zeros, three kinds of neurons: accuracy, firing, and what one image costs.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
names = list(reports)
axes[0].bar(names, [100 * accuracies[n] for n in names], color="#2b6cb0")
axes[0].set_title("test accuracy at 2:4, %")
axes[1].bar(names, [100 * (reports[n].firing_rate or 0) for n in names], color="#e08a1e")
axes[1].set_title("mean firing rate, %")
axes[2].bar(
    names, [reports[n].operations.synops / reports[n].samples for n in names], color="#12936f"
)
axes[2].set_title("SynOps per image")
for axis in axes:
    axis.bar_label(axis.containers[0], fmt="{:,.0f}", padding=2)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig(OUT / "02_frameworks.png", dpi=110)
print(f"figure: {OUT / '02_frameworks.png'}")
