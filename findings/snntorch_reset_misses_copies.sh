#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# snntorch 1.0.0: utils.reset(net) is documented to reset the hidden states of the neurons that net
# contains.  It looks in net for the types alone and then resets every neuron of these types that was
# ever constructed: the states of other networks are gone as well, while a copy.deepcopy of a network,
# whose neurons were never constructed, keeps its states whatever is passed.  Engines that pack makes
# are put on the framework's list, so that utils.reset(engine) resets them.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.13.0" "numpy"
"$folder/env/bin/python" -m pip install --quiet --no-deps "snntorch==1.0.0" "nir==1.0.8" "nirtorch==2.6" "h5py"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON'
import copy
import sys
from importlib.metadata import version

import snntorch as snn
import torch
from snntorch import utils

print({name: version(name) for name in ("torch", "snntorch")})


def network():
    return torch.nn.Sequential(snn.Leaky(beta=0.5, threshold=100.0, init_hidden=True))


first, other = network(), network()
copied = copy.deepcopy(first)
for net in (first, other, copied):
    net(torch.ones(1, 1))
utils.reset(first)
print("reset of one network: expected its own membrane 0 and the other's 1; seen",
      first[0].mem.item(), "and", other[0].mem.item())
crossed = other[0].mem.item() == 0
utils.reset(copied)
print("reset of the copy: expected 0; seen", copied[0].mem.item())
sys.exit(0 if crossed and copied[0].mem.item() == 1 else 1)
PYTHON
