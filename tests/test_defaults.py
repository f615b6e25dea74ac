# SPDX-License-Identifier: Apache-2.0
"""Torch's default dtype and device are the user's: what we allocate follows the tensors at hand.

Each setting runs in a process of its own, as a buffer of the wrong size or place ends it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forked
from loops import sequences, spiking_net
from strategies import ALL_LAYERS

import spikenm_fx

pytestmark = pytest.mark.slow

STAGES = {
    "masks": (
        *("sparsify", "train", "evaluate", "state_dict", "load", "copy", "verify", "report"),
        "fold",
    ),
    "pack": ("pack", "run"),
}
WHERE = ("all", "every other")
SETTINGS = ("float64", "bfloat16", "float16", "meta")
LEARNING = ("float64", "bfloat16", "float16")


# -- in the child ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _setting(name: str) -> Iterator[None]:
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


def _learnt(native: bool) -> None:
    """What every method learns in some steps whose backward passes and steps run under defaults."""
    import spikenm_fx.native.build
    from spikenm_fx.bench.nets.handwritten import SequenceLIF
    from spikenm_fx.masks.methods import METHODS
    from spikenm_fx.masks.methods.activity import Activity
    from spikenm_fx.native.library import native_status
    from spikenm_fx.trace import NeuronSpec, register_neuron

    if not native:
        spikenm_fx.native.__path__ = []  # an install would bring its own kernels
    assert native_status().available is native
    known = NeuronSpec("here", "SequenceLIF", kind="lif", decay=0.5, gain=0.5, state=())
    known = dataclasses.replace(known, exact=True, time_axis=0, step_mode="multi")
    register_neuron(SequenceLIF, lambda _: known)  # activity asks for a rule
    data = sequences(3)
    for method in sorted(METHODS):
        for setting in ("float32", *LEARNING):
            model = spiking_net(width=32)
            options = {} if method != "activity" else {"example_inputs": data[0]}
            chosen = Activity(growth=0.0) if method == "activity" else method
            spikenm_fx.sparsify(
                model, "2:4", method=chosen, rules=ALL_LAYERS, total_steps=200, **options
            ).train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for x in data:
                with _setting(setting):
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
            seen = {
                key: [str(value.dtype), value.detach().double().flatten().tolist()]
                for key, value in model.state_dict().items()
            }
            sys.stdout.write(json.dumps({"stage": f"{method}, {setting}", "seen": seen}) + "\n")


def _isolated(setting: str, part: str) -> None:
    """One setting in a fork, as it may die."""
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


def _lives() -> None:
    """Every setting in turn, torch's own first; what a fork needs is imported before it holds."""
    for setting in ("float32", *SETTINGS):
        for part in STAGES:
            _isolated(setting, part)


# -- in the tests ---------------------------------------------------------------------------------


def _lived(run: Callable[..., None], *arguments: object, **environment: str) -> dict[str, Any]:
    """What a child has seen at each stage, and what it said."""
    ran = forked(run, *arguments, **environment)
    lines = [json.loads(line) for line in ran.out.splitlines() if line.startswith("{")]
    return {"said": ran.err, "seen": {line["stage"]: line["seen"] for line in lines}}


@pytest.fixture(scope="module")
def lives() -> dict[str, Any]:
    """What came of each stage under torch's own defaults and under every other setting."""
    return _lived(_lives)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_what_is_learnt_does_not_depend_on_the_default_dtype(kernels: str, tmp_path: Path) -> None:
    """Of every method: weights, logits, momenta (the logits' gradients) and credits are the same.

    With the compiled kernels and without; the defaults are others during backward and step alone.
    """
    off = {"SPIKENM_FX_BUILD": "0", "SPIKENM_FX_CACHE": str(tmp_path)}
    found = _lived(_learnt, kernels == "native", **(off if kernels == "torch" else {}))
    methods = {stage.partition(",")[0] for stage in found["seen"]}
    assert {"spikenm", "maskllm", "srste", "magnitude"} <= methods, found["said"][-6000:]
    for method in methods:
        expected = found["seen"][f"{method}, float32"]
        if method == "spikenm":
            assert any(any(v) for k, (_, v) in expected.items() if k.endswith("_momentum"))
        for setting in LEARNING:
            seen = found["seen"].get(f"{method}, {setting}")
            assert seen is not None, f"{method}, {setting}: {found['said'][-6000:]}"
            for key, (dtype, values) in expected.items():
                assert seen[key][0] == dtype, (method, setting, key)
                one, other = (torch.tensor(v, dtype=torch.float64) for v in (values, seen[key][1]))
                near = (1e-4 * one.abs()).clamp(min=1e-6)
                assert bool(((other - one).abs() <= near).all()), (method, setting, key)


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
