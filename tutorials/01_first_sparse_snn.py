# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Your first sparse spiking network
#
# One line makes a spiking network N:M sparse; the training loop stays as it was. `2:4` means: of
# four consecutive input channels, at most two keep a weight.

# %%
import torch
import torch.nn.functional as F

import spikenm_fx
from spikenm_fx.demo.data import digits
from spikenm_fx.demo.networks import SpikingConvNet, direct_code

torch.manual_seed(0)
data = digits()  # 8x8 handwritten digits that come with scikit-learn
network = SpikingConvNet()  # three convolutions and two linear layers, hand-written LIF neurons

# %% [markdown]
# ## What would happen?
#
# `plan` changes nothing. With example inputs it runs the network once, follows the spikes, and says
# of every layer what it will do and why. The layer that sees the image and the readout stay dense
# unless a rule says otherwise.

# %%
example = direct_code(data.train_images[:4], steps=4)
plan = spikenm_fx.plan(network, "2:4", example_inputs=example)
print(plan)

# %% [markdown]
# ## Make it sparse, then train as always
#
# `sparsify` works in place. Each layer keeps its own class behaviour, its parameter names and the
# optimizer's references; what it *computes with* has at most two non-zeros in each block of four.
# Because `total_steps` says how long the run will be, the masks settle within it and stay as they
# are for its last part. (At 1:4 or 1:8 the other weights would also fade out over the first half
# instead of resting from the first step.) The mask logits are ordinary parameters, so build the
# optimizer afterwards.

# %%
EPOCHS, BATCH = 8, 64
steps = EPOCHS * -(-len(data.train_images) // BATCH)
spikenm_fx.sparsify(network, plan, total_steps=steps)

optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for epoch in range(EPOCHS):
    network.train()
    for batch in torch.randperm(len(data.train_images)).split(BATCH):
        scores = network(direct_code(data.train_images[batch], steps=4))
        loss = F.cross_entropy(scores, data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

# %% [markdown]
# ## Fold and verify
#
# `fold` writes the final zeros into the weights and leaves no trace of us; the outputs do not
# change by a single bit. `verify` shares no code with the masks: it counts.

# %%
network.eval()
test = direct_code(data.test_images, steps=4)
with torch.no_grad():
    before = network(test)
spikenm_fx.fold(network)
with torch.no_grad():
    after = network(test)
print("outputs unchanged:", torch.equal(before, after))
print("accuracy:", f"{(after.argmax(1) == data.test_labels).float().mean():.2%}")

checked = spikenm_fx.verify(network, plan)
checked.raise_if_invalid()
print(checked)

# %% [markdown]
# ## Look at it
#
# Every second weight is gone; and where a neuron is silent, the other half costs nothing either.

# %%
print(spikenm_fx.report(network, [test[:, :64]], batch_dim=1))

# %% [markdown]
# ## Run it packed
#
# `pack` makes an inference copy that stores kept values and few-bit indices, and measures on your
# input what runs each layer fastest here. Tutorial 5 saves such weights and loads them elsewhere.

# %%
engine = spikenm_fx.pack(network, test[:, :64])
with torch.no_grad():
    agree = (engine(test).argmax(1) == after.argmax(1)).float().mean()
print(f"same answers packed: {agree:.2%}")

# %% [markdown]
# ## From a dense run
#
# A network that was trained dense goes on sparse, and so does its optimizer: the parameters stay
# the same objects, only the mask logits join, in a group without weight decay. `total_steps` are
# the optimizer steps still to come: epochs * batches per epoch / accumulated batches.

# %%
dense = SpikingConvNet()
optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3)


def train_step(batch):
    scores = dense(direct_code(data.train_images[batch], steps=4))
    optimizer.zero_grad()
    F.cross_entropy(scores, data.train_labels[batch]).backward()
    optimizer.step()


batches = torch.randperm(len(data.train_images)).split(BATCH)
for batch in batches[:10]:
    train_step(batch)

spikenm_fx.sparsify(dense, "2:4", example_inputs=example, total_steps=10)
for batch in batches[10:20]:
    train_step(batch)
spikenm_fx.verify(spikenm_fx.fold(dense.eval()), "2:4").raise_if_invalid()
print("trained dense for ten steps, sparse for ten, with one optimizer")
