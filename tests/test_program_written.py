# SPDX-License-Identifier: Apache-2.0
"""Networks that write their outputs item by item into a tensor that was made before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few_rounds import few_rounds
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from program_strategies import RuleNeuron
from test_program import STEP, program, reset
from torch import Tensor, nn

from spikenm_fx.errors import SpikeNMWarning
from spikenm_fx.pack import native_status, pack, packing
from spikenm_fx.program import Engine

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds"]


class Written(nn.Module):
    """Spikes of each step, written where ``write`` says."""

    def __init__(self, make: Callable[[Tensor], Tensor], write: Callable[..., None]) -> None:
        super().__init__()
        self.make, self.write = make, write
        self.layer, self.fire = nn.Linear(6, 4), RuleNeuron(STEP)

    def forward(self, x: Tensor) -> Tensor:
        out = self.make(x)
        for step in range(x.shape[0]):
            self.write(out, step, self.fire(self.layer(x[step])))
        return out


def first(out: Tensor, step: int, y: Tensor) -> None:
    out[step] = y


def second(out: Tensor, step: int, y: Tensor) -> None:
    out[:, step] = y


def last(out: Tensor, step: int, y: Tensor) -> None:
    out[..., step] = y


def all_axes(out: Tensor, step: int, y: Tensor) -> None:
    out[step, :, :] = y


def from_the_end(out: Tensor, step: int, y: Tensor) -> None:
    out[step - out.shape[0]] = y


WRITES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., None]]] = {
    "zeros, first": (lambda x: torch.zeros(*x.shape[:2], 4), first),
    "empty, second": (lambda x: x.new_empty(x.shape[1], x.shape[0], 4), second),
    "full, last": (lambda x: torch.full((x.shape[1], 4, x.shape[0]), 7.0), last),
    "zeros, all axes": (lambda x: torch.zeros(*x.shape[:2], 4), all_axes),
    "zeros, from the end": (lambda x: x.new_zeros(*x.shape[:2], 4), from_the_end),
}


@tries(12)
@given(st.sampled_from(sorted(WRITES)), st.integers(2, 5), st.integers(1, 3))
def test_each_step_written_once_is_a_stack(name: str, steps: int, batch: int) -> None:
    """Of any length and batch, as the model."""
    torch.manual_seed(0)
    model, x = Written(*WRITES[name]).eval(), 4 * torch.rand(steps, batch, 6)
    engine = program(model, x)
    with torch.no_grad():
        for y in (x, torch.cat([x, x]), torch.cat([x, x], dim=1)):
            engine.reset()
            reset(model)
            torch.testing.assert_close(engine(y), model(y))


def test_a_long_loop_with_a_membrane_of_its_own() -> None:
    """Recordings as snnTorch users make them, whose state the caller carries, over many steps."""
    snn = pytest.importorskip("snntorch")

    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.fire = nn.Linear(6, 4), snn.Leaky(beta=0.9)

        def forward(self, x: Tensor) -> Any:
            spikes = torch.zeros(x.shape[0], x.shape[1], 4)
            membranes = torch.zeros(x.shape[0], x.shape[1], 4)
            state = self.fire.init_leaky()
            for step in range(x.shape[0]):
                spikes[step], state = self.fire(self.layer(x[step]), state)
                membranes[step] = state
            return spikes, membranes

    torch.manual_seed(0)
    model, x = Recorded().eval(), 4 * torch.rand(40, 2, 6)
    engine = program(model, x)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x))
        assert model(x)[0].mean() > 0


class Parts(nn.Module):
    """Two layers that write into halves of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 3), nn.Linear(6, 5), nn.Linear(8, 2)
        self.fire = RuleNeuron(STEP)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.empty(x.shape[0], 8)
        both[:, 3:] = self.b(x)
        both[:, :3] = self.a(x)
        out: Tensor = self.head(self.fire(both))
        return out


def test_slices_written_once_are_a_concatenation() -> None:
    """In any order."""
    torch.manual_seed(0)
    model, x = Parts().eval(), 4 * torch.rand(2, 6)
    engine = program(model, x)
    assert any(op.startswith("concat") for op in engine.operations)
    with torch.no_grad():
        reset(model)
        torch.testing.assert_close(engine(x), model(x))


def twice(out: Tensor, step: int, y: Tensor) -> None:
    out[step] = y
    out[step] = 2 * y


def not_the_last(out: Tensor, step: int, y: Tensor) -> None:
    if step + 1 < out.shape[0]:
        out[step] = y


def read_before(out: Tensor, step: int, y: Tensor) -> None:
    out[step] = y + out[step - 1]


@pytest.mark.parametrize("write", [twice, not_the_last, read_before])
def test_other_writes_are_refused_by_name(write: Callable[..., None]) -> None:
    """The engine is then the one without a program, and says what to do."""
    torch.manual_seed(0)
    model, x = Written(lambda x: torch.zeros(*x.shape[:2], 4), write).eval(), torch.rand(3, 2, 6)
    with pytest.warns(SpikeNMWarning, match="There is no program of this network"):
        engine = pack(model, x, program=True)
    assert not isinstance(engine, Engine)
    assert "torch.stack them" in packing(engine).note
