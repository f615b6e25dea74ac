# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Packing, and measuring speed
#
# A folded model is as fast as a dense one: its zeros are multiplied like any other number.  `pack`
# makes an inference copy that stores kept values and few-bit indices, runs layer and neuron
# together, and picks for every layer the fastest of dense torch and the sparse kernels of this
# machine, by measuring.

# %%
from pathlib import Path

import torch

import spikenm_fx
from spikenm_fx.demo.networks import SpikingConvNet
from spikenm_fx.pack import native_status, pack, packing
from spikenm_fx.report import report

OUT = Path("tutorial-output")
OUT.mkdir(exist_ok=True)
torch.manual_seed(0)

# %% [markdown]
# ## A network that fires
# Speed depends on firing, so a fresh network must not be silent: batch norm sees some data first.

# %%
STEPS, BATCH = 4, 4
images = torch.rand(STEPS, BATCH, 3, 16, 16)
dense = SpikingConvNet((32, 64, 64), size=16, inputs=3, hidden=128)
for module in dense.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = 0.9
        torch.nn.init.constant_(module.weight, 1.5)
with torch.no_grad():
    dense.hidden.weight.mul_(6)  # no norm follows: its neurons would stay silent
    for _ in range(3):
        dense(images)
dense.eval()

# %% [markdown]
# ## Sparse, folded, packed
# One-shot masks are enough to measure speed; accuracy needs training.

# %%
import copy

folded = spikenm_fx.fold(spikenm_fx.sparsify(copy.deepcopy(dense), "1:4"))
engine = pack(folded, images)
print("native kernels:", native_status())
print(packing(engine), "\n")
with torch.no_grad():
    same = (engine(images) - folded(images)).abs().max()
print(f"largest difference of the outputs: {float(same):.2g}\n")

# %% [markdown]
# ## Save it, load it elsewhere
# One safetensors file holds the packed layers and, beside them, every other tensor of the model.
# Where it is loaded, the architecture comes from your code, and `pack` measures anew: the fastest
# kernels of another machine are others.

# %%
from spikenm_fx.pack import LayerGeometry, load_packed, pack_weight, save_packed, unpack_weight

checked = spikenm_fx.verify(folded)
kept = {}
for layer in checked.layers:
    if layer.found is not None:
        module = folded.get_submodule(layer.name)
        geometry = LayerGeometry.of_layer(module)
        kept[layer.name] = pack_weight(module.weight.detach(), layer.found, geometry=geometry)
names = {f"{name}.weight" for name in kept}
others = {key: value for key, value in folded.state_dict().items() if key not in names}
save_packed(OUT / "05_packed.safetensors", kept, tensors=others)

weights, others = load_packed(OUT / "05_packed.safetensors")  # from here on: elsewhere
fresh = SpikingConvNet((32, 64, 64), size=16, inputs=3, hidden=128).eval()
fresh.load_state_dict(others | {f"{n}.weight": unpack_weight(w) for n, w in weights.items()})
assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), folded.parameters(), strict=True))
print(f"{len(weights)} packed layers saved and loaded, bit by bit\n")

# %% [markdown]
# ## Something to look at
# The three take turns; medians are shown.  On a busy or small machine dense may well win some
# layers: then the engine runs those dense, and the table above says so.

# %%
found = report(
    engine,
    images,
    batch_dim=1,
    reference=dense,
    latency={"dense": dense, "folded": folded, "packed": engine},
    repeats=5,
)
print(found)
(OUT / "05_packed.html").write_text(found.to_html())
print(f"page: {OUT / '05_packed.html'}")
