# SPDX-License-Identifier: Apache-2.0
"""Torch's default dtype and device are the user's: what we allocate follows the tensors at hand.

Each setting runs in a child process, as a buffer of the wrong size or place ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
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
        line = json.dumps({"stage": f"{part}, {where}: {stage}", "seen": seen})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for where in WHERE:
        _run(*sys.argv[1:2], where, sys.argv[2])


# -- in the tests ---------------------------------------------------------------------------------


def _child(setting: str, part: str) -> dict[str, Any]:
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, __file__, setting, part],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    seen = {line["stage"]: line["seen"] for line in lines}
    wanted = [f"{part}, {where}: {stage}" for where in WHERE for stage in STAGES[part]]
    missing = [stage for stage in wanted if stage not in seen]
    assert not missing, f"died (status {ran.returncode}) in {missing[0]}:\n{ran.stderr[-3000:]}"
    return seen


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The same under torch's own defaults."""
    return {part: _child("float32", part) for part in STAGES}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("part", STAGES)
def test_defaults_change_nothing(setting: str, part: str, expected: dict[str, Any]) -> None:
    """Under any default dtype or device each stage gives the same tensors, and none dies."""
    seen = _child(setting, part)
    for stage, tensors in expected[part].items():
        for (dtype, device, size), (dtype0, device0, size0) in zip(
            seen[stage], tensors, strict=True
        ):
            assert (dtype, device) == (dtype0, device0), stage
            assert size == pytest.approx(size0, rel=1e-4, abs=1e-5), stage
