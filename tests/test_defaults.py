# SPDX-License-Identifier: Apache-2.0
"""Torch's default dtype and device are the user's: what we allocate follows the tensors at hand.

Each setting runs in a process of its own, as a buffer of the wrong size or place ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STAGES = {
    "masks": (
        *("sparsify", "train", "evaluate", "state_dict", "load", "copy", "verify", "report"),
        "fold",
    ),
    "pack": ("pack", "run"),
}
WHERE = ("all", "every other")
SETTINGS = ("float64", "bfloat16", "float16", "meta")


# -- in the child ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _setting(name: str) -> Iterator[None]:
    import torch

    if name == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _run(setting: str, where: str, part: str) -> None:
    """The whole life of a model, some stages under ``setting``; prints what came of each."""
    import copy

    import torch
    from loops import sequences, spiking_net
    from strategies import ALL_LAYERS

    import spikenm_fx

    model, data = spiking_net(width=32), sequences(3)
    engine: Any = None

    def train() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def evaluate() -> Any:
        with torch.no_grad():
            return model.eval()(data[0])

    def load() -> None:
        model.load_state_dict(copy.deepcopy(model.state_dict()))

    def pack() -> None:
        nonlocal engine
        engine = spikenm_fx.pack(model, data[0])

    actions: dict[str, Callable[[], Any]] = {
        "sparsify": lambda: spikenm_fx.sparsify(model, "2:4", rules=ALL_LAYERS).train(),
        "train": train,
        "evaluate": evaluate,
        "state_dict": lambda: list(model.state_dict().values()),
        "load": load,
        "copy": lambda: copy.deepcopy(model)(data[0]),
        "verify": lambda: spikenm_fx.verify(model).raise_if_invalid(),
        "report": lambda: spikenm_fx.report(model, data[:1]),
        "fold": lambda: spikenm_fx.fold(model),
        "pack": pack,
        "run": lambda: engine(data[0]),
    }
    if part == "pack":
        spikenm_fx.fold(spikenm_fx.sparsify(model, "2:4", rules=ALL_LAYERS)).eval()
    for number, stage in enumerate(STAGES[part]):
        inside = where == "all" or number % 2
        with _setting(setting) if inside else contextlib.nullcontext():
            result = actions[stage]()
        state = list(model.state_dict().values())
        if isinstance(result, torch.Tensor):
            state.append(result)
        elif isinstance(result, list):
            state += result
        seen = [
            [str(t.dtype), str(t.device), float(t.detach().double().abs().sum())] for t in state
        ]
        line = json.dumps({"stage": f"{setting}, {part}, {where}: {stage}", "seen": seen})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _isolated(setting: str, part: str) -> None:
    """One setting in a fork, as it may die; torch is imported once for all of them."""
    child = os.fork()
    if not child:
        try:
            for where in WHERE:
                _run(setting, where, part)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stderr.write(f"{setting}, {part}: status {status}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import loops  # noqa: F401  # what every fork needs before its setting holds
    import networkx  # noqa: F401
    import strategies  # noqa: F401
    import torch
    import torch._dynamo  # by every optimizer's first step

    torch.set_num_threads(1)  # a fork has no threads but the one that forks
    for setting in ("float32", *sys.argv[1:]):
        for part in STAGES:
            _isolated(setting, part)


# -- in the tests ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lives() -> dict[str, Any]:
    """What came of each stage under torch's own defaults and under every other setting."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, __file__, *SETTINGS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {"said": ran.stderr, "seen": {line["stage"]: line["seen"] for line in lines}}


def _life(setting: str, part: str, lives: dict[str, Any]) -> dict[str, Any]:
    wanted = [f"{part}, {where}: {stage}" for where in WHERE for stage in STAGES[part]]
    seen = {stage: lives["seen"].get(f"{setting}, {stage}") for stage in wanted}
    missing = [stage for stage, tensors in seen.items() if tensors is None]
    assert not missing, f"{setting} died in {missing[0]}:\n{lives['said'][-6000:]}"
    return seen


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("part", STAGES)
def test_defaults_change_nothing(setting: str, part: str, lives: dict[str, Any]) -> None:
    """Under any default dtype or device each stage gives the same tensors, and none dies."""
    seen = _life(setting, part, lives)
    for stage, tensors in _life("float32", part, lives).items():
        for (dtype, device, size), (dtype0, device0, size0) in zip(
            seen[stage], tensors, strict=True
        ):
            assert (dtype, device) == (dtype0, device0), stage
            assert size == pytest.approx(size0, rel=1e-4, abs=1e-5), stage
