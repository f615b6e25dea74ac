# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # A third-party repository, by recipe
#
# Somebody else wrote the model, and there is a deadline.  A recipe is one page of YAML that says
# where the model comes from, how it is built, what its input looks like, how it is reset, and
# which layers become sparse and why.  `recipes/` holds tried ones; for a repository, clone it and
# point at the folder of your checkouts:
#
# ```
# spikenm-fx recipe show  recipes/spikformer-cifar10.yaml
# spikenm-fx recipe check recipes/spikformer-cifar10.yaml --root ~/checkouts
# spikenm-fx doctor       recipes/spikformer-cifar10.yaml --root ~/checkouts
# spikenm-fx recipe init  my_models.net:Net --root ~/my_code --input 4,3,32,32
# ```
#
# Here the same in Python, with a small Spikformer of SpikingJelly's model zoo, which needs no
# checkout.

# %%
from pathlib import Path

import torch
import torch.nn.functional as F

import spikenm_fx
from spikenm_fx.demo.data import digits
from spikenm_fx.recipe.schema import load_recipe, parse_recipe
from spikenm_fx.recipe.target import build_model, reset_function, root_of
from spikenm_fx.report import report

OUT = Path("tutorial-output")
OUT.mkdir(exist_ok=True)
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Read, build, plan
# Every mistake in a recipe is reported at once, with its line; here is what three look like.

# %%
wrong = OUT / "wrong.yaml"
wrong.write_text(
    'version: 1\ntarget: {package: torch, build: "torch.nn:Linear"}\n'
    "inputs: {shape: [4, 8], time: lop}\nnm: 2:4\nrulez: []\n"
)
try:
    load_recipe(wrong)
except spikenm_fx.SpikeNMError as error:
    print(error, "\n")

text = """
version: 1
name: "a small Spikformer out of SpikingJelly's zoo"
target:
  package: spikingjelly
  build: "spikingjelly.activation_based.model.spikformer:Spikformer"
  kwargs: {T: 2, img_size_h: 32, img_size_w: 32, patch_size: 4, num_classes: 10, embed_dims: 64,
           num_heads: 4, depths: 1}
  stand_ins: [torchvision]        # imported there, not needed here
inputs: {shape: [2, 3, 32, 32], time: inside}
reset: "spikingjelly.activation_based.functional:reset_net"
nm: "2:4"                         # in quotes: YAML reads 2:4 as the number 124
rules:
  - {match: "re:patch_embed.stages.0.*", action: keep_dense, reason: "sees the image"}
  - {match: "re:blocks.*attn.*", nm: "2:4", reason: "q, k, v and projection"}
  - {match: "re:blocks.*mlp.*", nm: "1:4", reason: "most of the weights"}
  - {match: "head", action: keep_dense, reason: "classifier"}
"""
recipe = parse_recipe(text)
root = root_of(recipe)
model = build_model(recipe, root)
reset = reset_function(recipe, root)
decided = spikenm_fx.plan(model, **recipe.plan_options())
print(decided)

# %% [markdown]
# ## Train a few steps
# The loop is the repository's own; only `sparsify` comes before it and `fold` after.  A handful of
# steps on enlarged digits stands in for the real training.

# %%
data = digits()


def images(index):
    return F.interpolate(data.train_images[index].expand(-1, 3, -1, -1), size=32)


spikenm_fx.sparsify(model, **{**recipe.sparsify_options(), "total_steps": 12})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model.train()
for module in model.modules():
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        module.momentum = 0.5  # with so few steps, the running statistics must follow quickly
for step in range(12):
    batch = torch.arange(16) + 16 * step
    scores = model(images(batch)).mean(0)  # [T, B, classes]
    loss = F.cross_entropy(scores, data.train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    reset(model)
    print(f"step {step}: loss {loss.item():.3f}")

# %% [markdown]
# ## Fold, verify, look
# The folded model has the repository's own classes and keys; its checkpoint loads into the
# unchanged code.

# %%
spikenm_fx.fold(model.eval())
spikenm_fx.verify(model, decided).raise_if_invalid()
found = report(model, images(torch.arange(4)), plan=decided, reset=reset)
print(found)
(OUT / "03_spikformer.html").write_text(found.to_html())
print(f"page: {OUT / '03_spikformer.html'}")
