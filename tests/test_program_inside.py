# SPDX-License-Identifier: Apache-2.0
"""Neurons whose rule nobody has told: the program is made of what their code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from test_program import program
from torch import Tensor, nn

from spikenm_fx import export
from spikenm_fx.bench.nets.handwritten import StatefulLIF, Step
from spikenm_fx.errors import ExportError
from spikenm_fx.pack import native_status, pack
from spikenm_fx.trace import trace

pytestmark = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")


class Handwritten(nn.Module):
    """A neuron as people write it: any of several rules, over ``[T, B, C]`` or ``[B, T, C]``."""

    def __init__(self, channels: int, rule: str, threshold: float, axis: int) -> None:
        super().__init__()
        self.rule, self.threshold, self.axis = rule, threshold, axis
        self.beta = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Currents to spikes."""
        mem, spike = torch.zeros_like(x.select(self.axis, 0)), 0.0
        adaptation, out = torch.zeros_like(mem), []
        for current in x.unbind(self.axis):
            if self.rule == "hard":
                mem = self.beta.clamp(0, 1) * mem * (1 - spike) + current
            elif self.rule == "adaptive":
                mem = 0.8 * mem + current - 0.5 * adaptation - self.threshold * spike
            else:
                mem = mem + (current - mem) * torch.sigmoid(self.beta) - self.threshold * spike
            spike = Step.apply(mem - self.threshold)
            adaptation = 0.9 * adaptation + 0.1 * spike
            out.append(spike)
        return torch.stack(out, self.axis)


@tries(20)
@given(
    rule=st.sampled_from(["hard", "adaptive", "learned leak"]),
    axis=st.sampled_from([0, 1]),
    steps=st.integers(3, 6),
    batch=st.integers(1, 3),
    threshold=st.floats(0.3, 1.2),
)
def test_the_code_of_a_neuron_becomes_operations(
    rule: str, axis: int, steps: int, batch: int, threshold: float
) -> None:
    """Any rule that elementwise operations make, learned per channel too; other lengths as well."""
    torch.manual_seed(0)
    layers = (nn.Linear(9, 14), Handwritten(14, rule, threshold, axis))
    model = nn.Sequential(*layers, nn.Linear(14, 7), Handwritten(7, rule, threshold, axis)).eval()
    for layer in (model[0], model[2]):
        layer.weight.data.mul_(4)
    shape = (steps, batch, 9) if axis == 0 else (batch, steps, 9)
    x = torch.randn(shape)
    with torch.no_grad():
        engine = program(model, x)
        torch.testing.assert_close(engine(x), model(x))
        longer = torch.cat([x, x.flip(axis)], dim=axis)
        torch.testing.assert_close(engine(longer), model(longer))


class Looping(nn.Module):
    """A neuron over ``[B, T, C]`` that takes its input step by step."""

    def forward(self, x: Tensor) -> Tensor:
        """Currents to spikes."""
        mem, out = 0, []
        for t in range(x.shape[1]):
            mem = mem * 0.5 + x[:, t]
            spike = Step.apply(mem - 0.6)
            mem = (1 - spike) * mem
            out.append(spike)
        return torch.stack(out, 1)


class Still(nn.Module):
    """An input that is the same in all steps, because the model itself repeats it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(9, 14), nn.Linear(14, 7)
        self.first, self.last = Looping(), Looping()

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of all steps."""
        return self.last(self.after(self.first(torch.stack([self.before(x)] * 5, 1))))


def test_a_state_changes_though_its_input_does_not() -> None:
    """What a loop carries differs from step to step where the input is always the same."""
    torch.manual_seed(0)
    model, x = Still().eval(), torch.randn(2, 9)
    model.after.weight.data.mul_(4)
    with torch.no_grad():
        engine = program(model, x)
        for frame in (x, torch.randn(3, 9)):
            wanted = model(frame)
            assert not torch.equal(wanted[:, 0], wanted[:, 1])
            torch.testing.assert_close(engine(frame), wanted)


def test_a_neuron_of_one_step_keeps_its_state_between_calls() -> None:
    """One call is one step: what the module keeps of it, the program keeps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 14), StatefulLIF(), nn.Linear(14, 7), StatefulLIF()).eval()
    model[0].weight.data.mul_(6)
    model[2].weight.data.mul_(4)
    frames = torch.rand(7, 2, 9)
    with torch.no_grad():
        engine = program(model, frames[0])
        for _ in range(2):
            wanted = [model(frame) for frame in frames]
            found = [engine.step(frame) for frame in frames]
            torch.testing.assert_close(torch.stack(found), torch.stack(wanted))
            engine.reset()
            model[1].reset()
            model[3].reset()


class Shapes(nn.Module):
    """What a neuron does otherwise than number by number."""

    def forward(self, x: Tensor) -> Tensor:
        """Fires where a membrane is above those of all the others' mean."""
        mem, out = torch.zeros_like(x[0]), []
        for current in x:
            mem = 0.5 * mem + current
            out.append(Step.apply(mem - torch.linalg.vector_norm(mem, dim=0)))
        return torch.stack(out)


def test_what_the_code_does_that_has_no_operation_is_named() -> None:
    """The reason tells of the neuron, what to do about it, and of its code."""
    model = nn.Sequential(nn.Linear(4, 6), Shapes(), nn.Linear(6, 2)).eval()
    with pytest.warns(
        UserWarning, match=r"1: .*register_neuron.*nor .*its code does \(.*norm in 1"
    ):
        pack(model, torch.rand(5, 2, 4), program=True)


def test_a_membrane_that_cannot_fall_below_a_floor() -> None:
    """What sinabs makes of a network: several spikes a step, and a floor of the membrane."""
    from_model = pytest.importorskip("sinabs.from_torch").from_model
    torch.manual_seed(0)
    body = (nn.Conv2d(2, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 5))
    net: Any = from_model(nn.Sequential(*body, nn.ReLU()), batch_size=2, min_v_mem=-0.3)
    model = net.spiking_model.eval()
    model[0].weight.data.mul_(4)
    x = (torch.rand(2 * 6, 2, 8, 8) < 0.3).float()
    with torch.no_grad():
        engine = program(model, x)
        for _ in range(2):
            torch.testing.assert_close(engine(x), model(x), rtol=0, atol=0)
        membrane = model[1].v_mem
        assert float(membrane.min()) == pytest.approx(-0.3)  # it matters


def test_nir_cannot_say_a_floor() -> None:
    """Its neurons have none, so that a reader would run others."""
    layers = pytest.importorskip("sinabs.layers")
    model = nn.Sequential(nn.Linear(4, 3), layers.IAF(min_v_mem=-0.5)).eval()
    with pytest.raises(ExportError, match=r"below -0.5.*min_v_mem=None"):
        export.nir(model, torch.rand(2, 5, 4))


class Residual(nn.Module):
    """A branch that ``contiguous`` finds as it is, and what goes on from the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.gain, self.head = nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 2, H, W]`` to ``[T, B, 3]``."""
        y = torch.relu(self.stem(x.flatten(0, 1)))
        branch = y.reshape(*x.shape[:2], 4, *x.shape[3:]).contiguous()
        y = self.conv(y).float().reshape(branch.shape) + branch
        return y.mean((-2, -1)) @ (self.head * self.gain[:, None])


def test_what_returns_its_argument_writes_nothing() -> None:
    """``contiguous`` and the like give the tensor itself where that is already so."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.rand(3, 2, 2, 6, 6)
    operations = trace(model, x).operations
    assert operations is not None
    assert not [node for node in operations.nodes if "write_view" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(program(model, x)(x), model(x))


class TimeLast(nn.Module):
    """Time as the last axis, taken by an ellipsis; a membrane that starts at one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(9, 14), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 9, T]`` to ``[B, 3, T]``."""
        like = torch.ones_like(self.layer(x[..., 0]))
        mem, out = like if self.how == "like" else torch.ones(x.shape[0], 14), []
        for t in range(x.shape[-1]):
            mem = (mem if self.how == "whole" else 0.5 * mem) + self.layer(x[..., t])
            spike = Step.apply(mem - 1.0)
            mem = mem - spike.data
            out.append(self.head(spike))
        return torch.stack(out, -1)


@pytest.mark.parametrize("how", ["decayed", "whole", "like"])
def test_time_behind_an_ellipsis(how: str) -> None:
    """``x[..., t]`` selects a step as ``x[t]`` does, and ``ones`` starts a membrane."""
    torch.manual_seed(0)
    model, x = TimeLast(how).eval(), 2 * torch.rand(2, 9, 5)
    with torch.no_grad():
        engine = program(model, x)
        torch.testing.assert_close(engine(x), model(x))
        longer = torch.cat([x, x], dim=-1)
        torch.testing.assert_close(engine(longer), model(longer))
