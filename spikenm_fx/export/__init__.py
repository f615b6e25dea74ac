# SPDX-License-Identifier: Apache-2.0
"""Where folded models go next: NIR, ONNX, sparse tensor cores; and where masks come from.

```python
from spikenm_fx import export

graph = export.nir(model, x, "snntorch", file="model.nir")  # for one reader; held against model
print(export.verify_nir(graph, "snntorch", steps))          # the reader itself, step by step
export.onnx(model, x, file="model.onnx")                    # spikenm-fx verify model.onnx counts
engine = export.semi_structured(model.cuda(), x.cuda())     # 2:4 on NVIDIA's sparse tensor cores
export.adopt(pruned, "2:4")                                 # somebody's sparse model, trained on
```

**An export that runs proves nothing**: four programs read one NIR file in four ways, and exporters
freeze membranes into constants.  So each export is run and compared with the model's own spikes on
the example before it is returned.  It is equal, or it is refused, by name.  Models are folded, at
rest, in float32; files are written completely or not at all.

## Models and readers

Each cell is tested with the real packages (nir 1.0.8, nirtorch 2.6, spikingjelly 2.0.0, snntorch
1.0.0, norse 1.1.0, sinabs 3.1.3, onnx 1.23.2, onnxruntime 1.32.0): *equal* to the spike, from
memory and from a file, or refused with an error that holds these words.

| model | file | spikingjelly | snntorch | norse | sinabs | onnx |
|---|---|---|---|---|---|---|
| SpikingJelly MLP, all steps | equal | equal | equal | equal | several | equal |
| SpikingJelly MLP, one step | equal | equal | equal | equal | several | equal |
| SpikingJelly conv, norm, pool | equal | equal | equal | equal | several | equal |
| SpikingJelly residual | equal | equal | equal | equal | several | equal |
| SpikingJelly branches | equal | equal | equal | branches | several | equal |
| SpikingJelly soft reset | soft reset | soft reset | soft reset | soft reset | several | equal |
| SpikingJelly max pool | maximum | maximum | maximum | maximum | maximum | equal |
| SpikingJelly depthwise | equal | depthwise | depthwise | depthwise | several | equal |
| hand-written feedback | equal | equal | recurrent | equal | several | equal |
| snnTorch loop, reset to zero | equal | equal | equal | equal | several | equal |
| snnTorch loop, as it comes | delay | delay | delay | delay | several | equal |
| snnTorch conv, one step | equal | equal | equal | equal | several | equal |
| snnTorch conv, 2 groups | equal | 2 groups | equal | equal | several | equal |
| snnTorch recurrent | equal | equal | recurrent | equal | several | equal |
| Norse loop | equal | equal | equal | equal | several | equal |
| Norse conv, one step | equal | equal | equal | equal | several | equal |
| Norse with synapse | synapse | synapse | synapse | synapse | several | equal |
| sinabs, several spikes | one spike | one spike | one spike | one spike | equal | equal |
| sinabs conv | one spike | one spike | one spike | one spike | equal | equal |
| sinabs, single spikes | equal | equal | equal | equal | several | equal |
| hand-written, rule told | equal | equal | equal | equal | several | equal |
| hand-written | rule | rule | rule | rule | rule | equal |

"Several" spikes is what sinabs makes of every LIF node: it emits as many as fit in a step and
subtracts thresholds, whatever the file says.  Which nodes arrive where, and what becomes of the
numbers: :mod:`spikenm_fx.export.nir_readers`.

## NIR

- Read the file as its reader does it: Norse needs `norse.torch.from_nir(graph, dt=1e-4)`; files
  with grouped convolutions, with kernels that are no squares, or for sinabs need
  `nir.read(file, type_check=False)`, as nir's own check does not understand them.
- A layer's node says its pattern: `graph.nodes[name].metadata["pattern"]`, of input channels
  (`pattern_axis`).  Strings stay strings in a file; cast numbers on reading: `int(...)`.
- What a model does beside its steps (a mean over time, one step alone) is no node.  A warning says
  so, and `graph.metadata["spikenm_fx.notes"]`.
- The other way round a NIR file becomes sparse by what a reader makes of it:
  `spikenm_fx.plan(imported, "2:4")`, then `sparsify`.
- sinabs asks for nir<=1.0.4, nirtorch 2.6 for nir>=1.0.6: pip cannot install both at once.  What
  works: `pip install nir==1.0.8 nirtorch==2.6`, then `pip install --no-deps sinabs==3.1.3`.

Of a Linear layer of 512x1024, as shares of its raw float32 weights:

| file | dense | 2:4 | 1:4 | 1:8 |
|---|---|---|---|---|
| NIR, compressed by gzip as it comes | 0.92 | 0.57 | 0.33 | 0.19 |
| ONNX | 1.02 | 1.02 | 1.02 | 1.02 |
| `spikenm_fx.save_packed` | - | 0.53 | 0.27 | 0.14 |

## ONNX

A model over all steps is unrolled.  One that takes one step a call gets `state.NAME` in and
`new_state.NAME` out; the metadata `spikenm_fx.states` names their values at rest, and
`run_onnx(file, inputs, states)` hands them on.  Weights keep names and axes; the metadata
`spikenm_fx.weights` says which are N:M.  No `sparse_initializer`: 1.5 times the room at 2:4, no
faster, and OpenVINO does not read it.

## NVIDIA's sparse tensor cores

:func:`semi_structured` has been tested on CPUs, bit by bit; **no speed was measured on a GPU**.
`python -m nox -s gpu` measures speed and agreement in one table.  torch's own conversion drops the
third non-zero of a block without a word, and takes 1:2 for 2:4 in float32: both are refused.

## Trainers, hubs, compilers

- `torch.export.export(folded, (x,))` and AOTInductor take folded models over all steps, for
  processes in which this package is not installed.  Single-step models forget their state there:
  use :func:`onnx`, which hands it on.
- Lightning needs nothing: `self.net(x)` trains, checkpoints keep masks and step.
- `PyTorchModelHubMixin`: call `sparsify(self, nm)` in `__init__` where its argument `nm` is given;
  `save_pretrained` and `from_pretrained` then keep pattern, masks and step in the hub's own files.
- Tools that write ones into a copied layer's `weight.data` to count operations find them there.
"""

from typing import TYPE_CHECKING

from spikenm_fx._lazy import attach

if TYPE_CHECKING:
    from spikenm_fx.export.adopt import PackedBits, adopt
    from spikenm_fx.export.nir_export import nir
    from spikenm_fx.export.nir_verify import NIRAgreement, verify_nir
    from spikenm_fx.export.onnx_export import onnx
    from spikenm_fx.export.onnx_run import run_onnx
    from spikenm_fx.export.onnx_verify import verify_onnx
    from spikenm_fx.export.semi_structured import SemiReport, semi_report, semi_structured

__all__ = [
    "NIRAgreement",
    "PackedBits",
    "SemiReport",
    "adopt",
    "nir",
    "onnx",
    "run_onnx",
    "semi_report",
    "semi_structured",
    "verify_nir",
    "verify_onnx",
]

_HOMES = {
    "adopt": "PackedBits adopt",
    "nir_export": "nir",
    "nir_verify": "NIRAgreement verify_nir",
    "onnx_export": "onnx",
    "onnx_run": "run_onnx",
    "onnx_verify": "verify_onnx",
    "semi_structured": "SemiReport semi_report semi_structured",
}
attach(__name__, {n: f"{__name__}.{home}" for home, names in _HOMES.items() for n in names.split()})
