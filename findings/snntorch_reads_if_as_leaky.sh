#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# snntorch 1.0.0: import_from_nir documents that it is the inverse of export; NIR's IF node is an
# integrate-and-fire neuron without leak that is reset to v_reset.  It becomes Leaky(beta=0.9) with
# the default reset by subtraction, without a warning, and hands back (spikes, membrane) where all
# other neurons hand back spikes.  We write an IF neuron for snnTorch as a LIF node whose time constant
# is so long that beta is exactly 1.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.13.0" "numpy" "h5py"
"$folder/env/bin/python" -m pip install --quiet --no-deps "snntorch==1.0.0" "nir==1.0.8" "nirtorch==2.6"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import nir
import numpy as np
import torch
from snntorch.import_nir import import_from_nir

print({name: version(name) for name in ("torch", "snntorch", "nir", "nirtorch")})
ones = np.ones(1, np.float32)
graph = nir.NIRGraph.from_list(nir.Affine(np.ones((1, 1), np.float32), 0 * ones), nir.IF(ones, ones))
net = import_from_nir(graph)
state, spikes = None, []
for _ in range(8):
    out, state = net(torch.full((1, 1), 0.25), state)
    spikes.append(int(out[0] if isinstance(out, tuple) else out))
neuron = net.get_submodule("if") if hasattr(net, "if") else net.get_submodule("nir_node_if")
print("expected: no leak (beta 1) and a reset to 0 (mechanism zero)")
print("seen: beta", float(neuron.beta), "reset", neuron.reset_mechanism, "spikes", spikes)
seen = abs(float(neuron.beta) - 0.9) < 1e-6 and neuron.reset_mechanism == "subtract"
sys.exit(0 if seen else 1)
PYTHON
