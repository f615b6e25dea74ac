#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# snntorch 1.0.0: reset_mechanism="zero" is documented alike for Leaky and RLeaky: the membrane is set
# to zero, in the step after the spike (reset_delay=True, the default).  Leaky sets the membrane to
# zero and then adds the input.  RLeaky sets their sum to zero: the whole input of the step after a
# spike is lost, feedback included.  We read RLeaky's rule only with reset_delay=False, where both
# agree, and refuse to export it otherwise.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.13.0" "numpy"
"$folder/env/bin/python" -m pip install --quiet --no-deps "snntorch==1.0.0" "nir==1.0.8" "nirtorch==2.6" "h5py"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import snntorch as snn
import torch

print({name: version(name) for name in ("torch", "snntorch")})
options = {"beta": 0.5, "reset_mechanism": "zero", "init_hidden": True}
leaky, recurrent = snn.Leaky(**options), snn.RLeaky(linear_features=1, **options)
for parameter in recurrent.recurrent.parameters():
    parameter.data.zero_()  # no feedback: the two are the same neuron
seen = {}
for name, neuron in (("Leaky", leaky), ("RLeaky", recurrent)):
    seen[name] = [int(neuron(torch.full((1, 1), 2.0))) for _ in range(6)]
print("expected: the same spikes of 2.0 in each step with a threshold of 1.0; seen", seen)
sys.exit(0 if seen["Leaky"] == [1] * 6 and seen["RLeaky"] == [1, 0, 1, 0, 1, 0] else 1)
PYTHON
