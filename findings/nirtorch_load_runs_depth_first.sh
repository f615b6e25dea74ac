#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# nirtorch 2.6: load() promises "the generated torch module" of a NIR graph, in which what meets at a
# node is added.  It runs the nodes depth first, each as soon as one of its sources has run, and hands
# back what it ran last: where two branches meet again the other branch is lost, without a word.  Here
# 2 * x + 3 * x comes back as 3 * x.  Norse 1.1.0 and sinabs 3.1.3 read NIR through it.  We refuse
# graphs whose sums would run early for these two, and order the edges of all others.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.13.0" "numpy" "h5py"
"$folder/env/bin/python" -m pip install --quiet --no-deps "nir==1.0.8" "nirtorch==2.6"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import nir
import nirtorch
import numpy as np
import torch

warnings.simplefilter("ignore")
print({name: version(name) for name in ("torch", "nir", "nirtorch")})


def scaled(factor):
    return nir.Affine(factor * np.eye(1, dtype=np.float32), np.zeros(1, np.float32))


nodes = {
    "input": nir.Input({"input": np.array([1])}),
    "first": scaled(1.0),
    "two": scaled(2.0),
    "three": scaled(3.0),
    "sum": scaled(1.0),
    "output": nir.Output({"output": np.array([1])}),
}
edges = [("input", "first"), ("first", "two"), ("first", "three"), ("two", "sum")]
edges += [("three", "sum"), ("sum", "output")]


def module(node):
    if not isinstance(node, nir.Affine):
        return None
    linear = torch.nn.Linear(1, 1)
    linear.weight.data, linear.bias.data = torch.tensor(node.weight), torch.tensor(node.bias)
    return linear


net = nirtorch.load(nir.NIRGraph(nodes, edges), module)
state, seen = None, []
for value in (1.0, 10.0):
    out, state = net(torch.tensor([[value]]), state)
    seen.append(float(out))
print("expected: 2 * x + 3 * x of inputs 1, 10 is 5, 50; seen", seen)
sys.exit(0 if seen != [5.0, 50.0] else 1)
PYTHON
