# SPDX-License-Identifier: Apache-2.0
"""Deploy: packed N:M weights, and the kernels and the engine that run them.

# How packing works

``pack(model, x)`` takes a folded model and gives back an inference copy of the same class, with the
same call and the same reset.  It goes through five steps; the model itself is not touched.

**1. The weight becomes values and indices** (:mod:`spikenm_fx.pack.weights.format`).  A row of the
weight is one output channel; along it run the kernel positions and, innermost, the input channels,
so that each ``m`` consecutive input channels form one block.  Of a block exactly ``n`` values are
kept, ascending by position; a block with fewer non-zeros is filled up with explicit zeros.  A 2:4
weight in fold order:

    row of W    0.3  0    0   -1.2 | 0    0.7  0    0     two blocks of four inputs
    values      0.3      -1.2      | 0    0.7             two of each block
    indices     0         3        | 0    1               2 bits each, four to a byte

At 2:4 that is 16 values and 16 two-bit indices for 32 fp32 weights: 0.53 of the bytes. The pattern
is the sparsest common one that the weight satisfies; a weight with none is packed as 1:1, which
stores it whole. ``unpack_weight(pack_weight(w, nm)) == w`` bit for bit, unless a narrower ``dtype``
was asked for. This form alone is saved (:mod:`spikenm_fx.pack.weights.files`, safetensors with a
checksum); nothing in it depends on the processor.

**2. Norms fold, neurons fuse** (:mod:`spikenm_fx.pack.engine`). The trace of the model on the
examples says which layer feeds which norm and which neuron. A batch norm that a layer alone feeds
is multiplied into its weight and bias. A neuron whose update rule is known (charge, leak,
threshold, reset; see :class:`spikenm_fx.trace.neurons.spec.NeuronSpec`) and that a layer alone
drives runs inside that layer's kernel, over all time steps, with its membrane in the attribute
where its framework keeps it. What is not known keeps its own ``forward``; the report says why.

**3. Spikes stay bits.**  Between fused layers spikes travel as one bit per channel
(:mod:`spikenm_fx.pack.engine.spikes`), 64 channels to a word.  Sums and average pools of spikes,
such as residual connections, are small integers and stay bit planes.  A packed layer returns a
tensor that is not there yet (:mod:`spikenm_fx.pack.engine.lazy`): a fused neuron takes it as it is,
any other operation simply gets the values.  Laziness decides what is computed together, never what.

**4. Kernels read layouts of their own** (:mod:`spikenm_fx.pack.kernels.layouts`), derived from the
packed weight when it is loaded, never stored. ``fma`` gathers the inputs of the kept weights and
takes any input; ``lut`` looks the sums of short groups of spikes up in tables and does not depend
on the firing rate; ``event`` adds up the weights of the inputs that spike, and gains the more the
fewer do; ``event8`` does so in integers for int8 weights. ``reference`` is the same in plain torch,
and what runs where no kernels are compiled. fp32 results differ from dense by the order of
summation alone.

**5. What is fastest is measured** (:mod:`spikenm_fx.pack.engine.choose`). On your examples every
layer's candidates take turns, torch's own dense layer in both memory formats among them; a kernel
must beat dense by five per cent, or the layer stays dense. ``packing(engine)`` is the report: per
layer the choice, the times, the firing rate and, where a layer is not packed or a neuron unfused,
the reason. In the end the whole forward is timed beside the model's (:mod:`spikenm_fx.pack.forms`):
fused or with neurons as they were, the fastest form runs. Where none gains, layers are put back to
the model's own code, until the rest gains or nothing is left, and the report says to keep the
model. A file that is half as large does not mean half the memory at run
time: the layouts that the fastest kernels read may be as large as dense weights.

**Is it the same network?**  Rounding can move a membrane that lies on its threshold to the other
side, and a deep network amplifies one such spike.  :mod:`spikenm_fx.pack.check` therefore compares
engine and model neuron by neuron, each on the model's own spikes, and tells such ties from errors.
``pack`` does so before it returns, and what differs is the model's own again
(:mod:`spikenm_fx.pack.check.proof`).  A layer whose class has a forward of its own keeps that; the
products in it run packed (:mod:`spikenm_fx.pack.engine.products`).
"""

from typing import TYPE_CHECKING

from spikenm_fx._lazy import attach

if TYPE_CHECKING:
    from spikenm_fx.native.library import NativeStatus, native_status
    from spikenm_fx.pack.api import pack, packing
    from spikenm_fx.pack.engine.layer import PackedLayer
    from spikenm_fx.pack.summary import (
        PackedLayerReport,
        PackedNeuronReport,
        PackReport,
        PartReport,
        Proof,
        WholeForward,
    )
    from spikenm_fx.pack.weights.files import is_packed, load_packed, save_packed
    from spikenm_fx.pack.weights.format import (
        LayerGeometry,
        PackedWeight,
        pack_weight,
        unpack_weight,
    )
    from spikenm_fx.pack.weights.models import save_packed_model, tightest_plan, unpacked_state

__all__ = [
    "LayerGeometry",
    "NativeStatus",
    "PackReport",
    "PackedLayer",
    "PackedLayerReport",
    "PackedNeuronReport",
    "PackedWeight",
    "PartReport",
    "Proof",
    "WholeForward",
    "is_packed",
    "load_packed",
    "native_status",
    "pack",
    "pack_weight",
    "packing",
    "save_packed",
    "save_packed_model",
    "tightest_plan",
    "unpack_weight",
    "unpacked_state",
]

_HOMES = {
    "native.library": "NativeStatus native_status",
    "pack.api": "pack packing",
    "pack.engine.layer": "PackedLayer",
    "pack.summary": "PackReport PackedLayerReport PackedNeuronReport PartReport Proof WholeForward",
    "pack.weights.files": "is_packed load_packed save_packed",
    "pack.weights.format": "LayerGeometry PackedWeight pack_weight unpack_weight",
    "pack.weights.models": "save_packed_model tightest_plan unpacked_state",
}
attach(__name__, {n: f"spikenm_fx.{home}" for home, names in _HOMES.items() for n in names.split()})
