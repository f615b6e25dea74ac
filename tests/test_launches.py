# SPDX-License-Identifier: Apache-2.0
"""What masks cost on the path that a GPU takes: kernel launches and host syncs, as a budget.

Counted on the CPU with the compiled kernels out of reach, in a process of its own, as the path is
chosen when the library is first asked for.  Nothing here is a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS = 54
PER_STEP = 300
PER_ACCESS = 2
STEPS, EVERY = 7, 3  # credits are refreshed at 0, 3 and 6
CASES = {
    "2:4": ("2:4", None),
    "1:8, fading": ("1:8", 1000),
    "2:4, with a length": ("2:4", 1000),
    "1:16": ("1:16", None),
    "frozen": ("2:4", 1),
}


# -- in the child ---------------------------------------------------------------------------------


def _network(neurons: bool) -> Any:
    """54 layers of ten shapes, convolutions and linear ones, some groups of equal ones."""
    import torch
    from loops import OverTime
    from torch import nn

    from spikenm_fx.bench.nets.handwritten import SequenceLIF

    torch.manual_seed(0)
    widths = [16, 32, 48, 64]
    body: list[nn.Module] = []
    inputs = 16
    for index in range(LAYERS - 1):
        outputs = widths[index * len(widths) // LAYERS]
        kernel = 1 if index % 3 == 0 else 3
        body.append(OverTime(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)))
        body.append(SequenceLIF() if neurons else nn.Tanh())
        inputs = outputs
    return nn.Sequential(*body, nn.Flatten(2), nn.Linear(inputs * 4, 10))


def _child(nm: str, total: int | None, neurons: bool) -> dict[str, Any]:
    import warnings

    import torch
    from counting import launches
    from strategies import ALL_LAYERS

    import spikenm_fx
    from spikenm_fx.masks import EID
    from spikenm_fx.masks.methods.spikenm import SpikeNM
    from spikenm_fx.native.library import native_status

    warnings.simplefilter("ignore")
    method = SpikeNM(eid=EID(every=EVERY))
    assert not native_status().available
    model, plain = _network(neurons), _network(neurons)
    spikenm_fx.sparsify(model, nm, rules=ALL_LAYERS, total_steps=total, method=method)
    assert sum(hasattr(m, "weight_nm") for m in model.modules()) == LAYERS
    x = 2 * torch.rand(2, 1, 16, 2, 2)
    found: dict[str, Any] = {}
    for name, net in (("sparse", model), ("dense", plain)):
        optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01)

        def passes(net: Any = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            net(x).square().mean().backward()

        steps = []
        passes(), optimizer.step()  # connects EID, fills momentum
        for _ in range(1, STEPS):
            forward = launches(passes)
            step = launches(optimizer.step)
            steps.append([forward.total, forward.waits, step.total, step.waits])
        net.eval()
        with torch.no_grad():
            net(x)
            evaluation = launches(lambda net=net: net(x))
        found[name] = {
            "steps": steps,
            "evaluation": [evaluation.total, evaluation.waits],
            "kernels of the step": dict(step.kernels),
            "syncs of the step": dict(step.syncs),
            "syncs of the passes": dict(forward.syncs),
            "kernels of evaluation": dict(evaluation.kernels),
            "syncs of evaluation": dict(evaluation.syncs),
        }
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    case, kind = sys.argv[1:]
    print(json.dumps(_child(*CASES[case], neurons=kind == "neurons")))


# -- in the tests ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """Runs a case once, in a child that cannot find or compile the kernels."""
    cache: dict[tuple[str, str], dict[str, Any]] = {}
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "SPIKENM_FX_BUILD": "0",
        "SPIKENM_FX_CACHE": str(tmp_path_factory.mktemp("empty")),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }

    def of(case: str, kind: str) -> dict[str, Any]:
        if (case, kind) not in cache:
            command = [sys.executable, __file__, case, kind]
            ran = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, ran.stderr[-3000:]
            cache[case, kind] = json.loads(ran.stdout.splitlines()[-1])
        return cache[case, kind]

    return of


BOTH = [*((case, "plain") for case in CASES), ("2:4", "neurons")]


def _ordinary(found: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Steps without a refresh of the credits: sparse and dense."""
    pairs = zip(found["sparse"]["steps"], found["dense"]["steps"], strict=True)
    return [pair for step, pair in enumerate(pairs, 1) if step % EVERY]


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_all_masks_of_a_step_are_one_batched_pass(
    counted: Callable[..., Any], case: str, kind: str
) -> None:
    """An optimizer step of 54 masked layers launches at most 300 kernels more than dense."""
    found = counted(case, kind)
    extra = [a[2] - b[2] for a, b in _ordinary(found)]
    assert max(extra) <= PER_STEP, found["sparse"]["kernels of the step"]


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_forward_and_backward_only_apply_the_masks(
    counted: Callable[..., Any], case: str, kind: str
) -> None:
    """Both passes launch at most two kernels more than dense for each access of a weight."""
    extra = [a[0] - b[0] for a, b in _ordinary(counted(case, kind))]
    assert max(extra) <= PER_ACCESS * LAYERS


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_evaluation_only_applies_the_masks(
    counted: Callable[..., Any], case: str, kind: str
) -> None:
    """An evaluation forward launches at most two kernels more than dense for each access."""
    found = counted(case, kind)
    extra = found["sparse"]["evaluation"][0] - found["dense"]["evaluation"][0]
    assert extra <= PER_ACCESS * LAYERS, found["sparse"]["kernels of evaluation"]


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_nothing_waits_for_the_device(
    counted: Callable[..., Any], case: str, kind: str
) -> None:
    """No host sync in passes, steps and evaluation, refreshes of the credits included."""
    found = counted(case, kind)
    sparse = found["sparse"]
    waits = [step[1] + step[3] for step in sparse["steps"]]
    detail = {k: v for k, v in sparse.items() if k.startswith("syncs")}
    assert sparse["evaluation"][1] == 0, detail
    assert max(waits) == 0, (waits, detail)
