# SPDX-License-Identifier: Apache-2.0
"""Which engine ``pack`` gives, and networks of which only parts have a program."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from few_rounds import few_rounds, hurried
from program_strategies import RuleNeuron
from test_program import LIF, STEP, reset, sequence
from torch import Tensor, nn

from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.pack import PackReport, WholeForward, native_status, pack, packing
from spikenm_fx.program import Engine
from spikenm_fx.program.part import ProgramPart

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds"]


FRESH = """
import sys, torch, spikenm_fx
from torch import nn
from spikenm_fx.trace import NeuronSpec, register_neuron
from spikenm_fx.trace.neurons.spec import simulate

RULE = NeuronSpec("test", "Fire", "lif", True, decay=0.9, threshold=0.7, time_axis=0)

class Fire(nn.Module):
    def forward(self, x):
        return simulate(RULE, x)[0]

register_neuron(Fire, read=lambda module: RULE)
net = nn.Sequential(nn.Linear(8, 9), Fire(), nn.Linear(9, 3)).eval()
engine = spikenm_fx.pack(net, torch.rand(4, 2, 8), program=True)
print(type(engine).__name__, str(spikenm_fx.packing(engine).proof)[:5])
engine.save("net.snm")
spikenm_fx.load_engine("net.snm")(torch.rand(4, 2, 8))
others = ("pack.engine.lazy", "pack.engine.layer", "pack.engine.fused", "pack.builder")
print([name for name in others if f"spikenm_fx.{name}" in sys.modules])
"""


@pytest.mark.slow
def test_a_program_needs_nothing_of_the_other_engine(tmp_path: Path) -> None:
    """Where it covers the network, no tensor that waits, and nothing that makes one, is there."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["Engine", "Proof", "[]"]


@pytest.mark.parametrize("better", ["program", "copy"])
def test_auto_gives_the_engine_that_gains_more(
    better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are made and measured beside the model; the report names both gains."""
    chosen = pytest.importorskip("spikenm_fx.pack.chosen")
    real = chosen._compared

    def measured(program: PackReport, copied: PackReport) -> Any:
        fast, slow = WholeForward(3.0, 1.0, "program"), WholeForward(3.0, 2.0, "fused")
        if better == "copy":
            fast, slow = slow, fast
        for report, whole in ((program, fast), (copied, slow)):
            object.__setattr__(report, "whole", whole)
        return real(program, copied)

    monkeypatch.setattr(chosen, "_compared", measured)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = pack(sequence(), torch.rand(5, 2, 20), program="auto")
    assert isinstance(engine, Engine) == (better == "program")
    assert isinstance(engine, nn.Sequential) == (better == "copy")
    assert "3.00x as" in packing(engine).note
    assert "1.50x as" in packing(engine).note


def test_auto_without_examples_or_with_a_backend_is_the_copy() -> None:
    """Nothing is known of the network, or its kernels were asked for."""
    assert isinstance(pack(sequence(), program="auto"), nn.Sequential)
    forced = pack(sequence(), torch.rand(5, 2, 20), program="auto", backend="fma")
    assert isinstance(forced, nn.Sequential)


class Sorted(nn.Module):
    """What no program computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


def wide(inputs: int, outputs: int) -> list[nn.Module]:
    """Two layers with a neuron each, large enough to be faster as a program."""
    return [
        nn.Linear(inputs, 256), RuleNeuron(LIF), nn.Linear(256, outputs), RuleNeuron(LIF)
    ]  # fmt: skip


class Branches(nn.Module):
    """A sequence with a stranger in it, and a block behind a function that has no operation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*wide(64, 128), Sorted(), *wide(128, 64))
        self.block = nn.Sequential(*wide(64, 32))
        self.gain = 3.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.body(x * self.gain).cumsum(0))
        return y


def partly(**kwargs: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = Branches().eval(), 2 * torch.rand(6, 2, 64)
    with pytest.warns(SpikeNMWarning, match="There is no program of this network"):
        return model, pack(model, x, program=True, **kwargs), x


@pytest.fixture(scope="module")
def parted() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, the engine of which parts are programs, and an input: tests only run them."""
    with hurried():
        return partly()


def test_the_largest_parts_run_as_programs(parted: tuple[nn.Module, nn.Module, Tensor]) -> None:
    """The stranger and the forward around them run as ever, and the outputs are the model's."""
    model, engine, x = parted
    assert isinstance(engine, Branches)
    parts = {n: m for n, m in engine.named_modules() if isinstance(m, ProgramPart)}
    assert set(parts) == {"body.0", "body.5", "block"}
    assert parts["body.0"].names == ("body.0", "body.1", "body.2", "body.3")
    with torch.no_grad():
        reset(model)
        torch.testing.assert_close(engine(x), model(x))
        torch.testing.assert_close(engine(x), model(x))  # states go on
        for part in parts.values():
            part.reset()
        reset(model)
        torch.testing.assert_close(engine(x), model(x))


def test_the_report_says_which_parts_why_and_what_they_cost(
    parted: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    """In the order of the model; the milliseconds of all are about those of a forward."""
    _, engine, _ = parted
    report = packing(engine)
    native = [part.names[0] for part in report.parts if not part.reason]
    assert native == ["body.0", "body.5", "block"]
    reasons = {part.names[0]: part.reason for part in report.parts if part.reason}
    assert "sort in body.4" in reasons["body"]
    assert reasons[""]
    assert all(part.milliseconds > 0 for part in report.parts)
    assert report.whole is not None
    assert report.whole.form == "parts"
    assert all(str(part) in str(report) for part in report.parts)
    assert report.to_dict()["parts"]


def test_parts_by_which_the_whole_loses_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is faster by itself, and the forward with all of them slower than the model's."""
    chosen = pytest.importorskip("spikenm_fx.pack.partly")

    def seconds(ways: dict[str, nn.Module], _args: Any) -> dict[str, float]:
        return {way: 2.0 if way in ("now", "engine") else 1.0 for way in ways}

    monkeypatch.setattr(chosen, "take_turns", seconds)
    model, engine, x = partly()
    report = packing(engine)
    assert not any(isinstance(m, ProgramPart | nn.Identity) for m in engine.modules())
    assert report.whole is not None
    assert report.whole.form != "parts"
    assert "gains nothing by the programs of its parts (0.50x)" in str(report)
    with torch.no_grad():
        reset(model)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_part_called_twice_stays_as_it_is() -> None:
    """Its states would be shared in another order."""

    class Twice(Branches):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body[0:2](x).sort(-1).values
            self.block(y[..., :64])
            z: Tensor = self.block(y[..., :64])
            return z

    with pytest.warns(SpikeNMWarning):
        engine = pack(Twice().eval(), 2 * torch.rand(6, 2, 64), program=True)
    assert "does not call it once" in str(packing(engine).parts)
    assert not any(isinstance(m, ProgramPart) for m in engine.modules())


def test_a_single_step_model_keeps_the_states_of_its_parts() -> None:
    """One step a call: parts go on from where they were."""
    torch.manual_seed(0)
    body = [nn.Linear(64, 256), RuleNeuron(STEP), nn.Linear(256, 64), RuleNeuron(STEP)]
    model, frames = nn.Sequential(*body, Sorted()).eval(), 3 * torch.rand(8, 1, 64)
    with pytest.warns(SpikeNMWarning):
        engine = pack(model, frames[0], program=True)
    assert isinstance(engine[0], ProgramPart)  # type: ignore[index]
    with torch.no_grad():
        reset(model)
        for frame in frames:
            torch.testing.assert_close(engine(frame), model(frame))
