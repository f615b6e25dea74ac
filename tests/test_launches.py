# SPDX-License-Identifier: Apache-2.0
"""What masks cost on the path that a GPU takes: kernel launches and host syncs, as a budget.

Counted on the CPU with the compiled kernels out of reach, in a process of its own, as the path is
chosen when the library is first asked for.  Nothing here is a time.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from forks import forked

pytestmark = pytest.mark.slow

DEPTH = 54
PER_STEP = 300
PER_ACCESS = 2
STEPS, EVERY = 4, 3  # credits are refreshed at 0 and 3
CASES = {
    "2:4": ("2:4", None),
    "1:8, fading": ("1:8", 1000),
    "2:4, with a length": ("2:4", 1000),
    "1:16": ("1:16", None),
    "frozen": ("2:4", 1),
}


# -- in the child ---------------------------------------------------------------------------------


def _child(nm: str, total: int | None, neurons: bool) -> dict[str, Any]:
    import warnings

    import torch
    from strategies import ALL_LAYERS

    import spikenm_fx
    import spikenm_fx.native.build
    from spikenm_fx.bench.worker import deep, launches
    from spikenm_fx.masks import EID
    from spikenm_fx.masks.methods.spikenm import SpikeNM
    from spikenm_fx.native.library import native_status

    warnings.simplefilter("ignore")
    method = SpikeNM(eid=EID(every=EVERY))
    spikenm_fx.native.__path__ = []  # an install would bring its own kernels
    assert not native_status().available
    torch.manual_seed(0)
    model, plain = deep(neurons=neurons), deep(neurons=neurons)
    spikenm_fx.sparsify(model, nm, rules=ALL_LAYERS, total_steps=total, method=method)
    assert sum(hasattr(m, "weight_nm") for m in model.modules()) == DEPTH
    x = 2 * torch.rand(2, 1, 16, 2, 2)
    phase = spikenm_fx.progress(model).phase
    found: dict[str, Any] = {}
    for name, net in (("sparse", model), ("dense", plain)):
        optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01)

        def passes(net: Any = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            net(x).square().mean().backward()

        steps = []
        passes(), optimizer.step()  # connects EID, fills momentum
        for _ in range(1, STEPS):
            forward, step = launches(passes), launches(optimizer.step)
            steps.append([n for c in (forward, step) for n in _totals(c)])
        net.eval()
        with torch.no_grad():
            net(x)
            evaluation = launches(lambda net=net: net(x))
        counts = {"passes": forward, "the step": step, "evaluation": evaluation}
        found[name] = {
            "steps": steps,
            "phase": phase,
            "evaluation": _totals(evaluation),
            **{f"kernels of {what}": dict(c.kernels) for what, c in counts.items()},
            **{f"syncs of {what}": dict(c.syncs) for what, c in counts.items()},
        }
    return found


def _totals(counted: Any) -> list[int]:
    return [sum(counted.kernels.values()), sum(counted.syncs.values())]


BOTH = [*((case, "plain") for case in CASES), ("2:4", "neurons")]


def _every_case() -> None:
    """A line of what each has found."""
    for case, kind in BOTH:
        try:
            found = _child(*CASES[case], neurons=kind == "neurons")
        except Exception:  # the others are looked at all the same
            found = {"failed": traceback.format_exc()[-3000:]}
        sys.stdout.write(json.dumps({"case": [case, kind], "found": found}) + "\n")
        sys.stdout.flush()


# -- in the tests ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """What each case found, in a child that cannot find or compile the kernels."""
    ran = forked(
        _every_case, SPIKENM_FX_BUILD="0", SPIKENM_FX_CACHE=str(tmp_path_factory.mktemp("empty"))
    )
    lines = [json.loads(line) for line in ran.out.splitlines() if line.startswith("{")]
    found = {tuple(line["case"]): line["found"] for line in lines}

    def of(case: str, kind: str) -> dict[str, Any]:
        seen = found.get((case, kind), {"failed": ran.err[-3000:]})
        assert "failed" not in seen, seen["failed"]
        return seen

    return of


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
    found = counted(case, kind)
    extra = [a[0] - b[0] for a, b in _ordinary(found)]
    assert max(extra) <= PER_ACCESS * DEPTH
    assert ("fading" in case) == (found["sparse"]["phase"] == "fading")


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_evaluation_only_applies_the_masks(
    counted: Callable[..., Any], case: str, kind: str
) -> None:
    """An evaluation forward launches at most two kernels more than dense for each access."""
    found = counted(case, kind)
    extra = found["sparse"]["evaluation"][0] - found["dense"]["evaluation"][0]
    assert extra <= PER_ACCESS * DEPTH, found["sparse"]["kernels of evaluation"]


@pytest.mark.parametrize(("case", "kind"), BOTH)
def test_nothing_waits_for_the_device(counted: Callable[..., Any], case: str, kind: str) -> None:
    """No host sync in passes, steps and evaluation, refreshes of the credits included."""
    found = counted(case, kind)
    sparse = found["sparse"]
    waits = [step[1] + step[3] for step in sparse["steps"]]
    detail = {k: v for k, v in sparse.items() if k.startswith("syncs")}
    assert sparse["evaluation"][1] == 0, detail
    assert max(waits) == 0, (waits, detail)
