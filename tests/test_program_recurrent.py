# SPDX-License-Identifier: Apache-2.0
"""Recurrent networks from a file: in a fresh process, by ``spikenm-run``, cut into any calls."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_rounds import few_rounds
from test_program import program
from test_program_carried import Cells, Feedback, container, rest, runner, strong, tensor
from test_program_runtime import numbers
from torch import Tensor, nn

from spikenm_fx.native.build import wants_sanitizers
from spikenm_fx.native.toolchain import find_compiler
from spikenm_fx.pack import native_status, pack, packing
from spikenm_fx.program import Engine

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds", "runner"]

T, B, INPUTS, WIDTH = 7, 2, 10, 16


class Loop(nn.Module):
    """A step after another of a network that keeps its own states."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(frame) for frame in x])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "spikingjelly": lambda: container("linear", "m"),
    "snntorch": lambda: Loop(Feedback("leaky", hidden=True)),
    "norse": Cells,
}

CUTS = (1, 4, T - 1)
FRESH = f"""
import sys, torch, spikenm_fx
for name in sys.argv[1:]:
    x, engine = torch.load(f"{{name}}.pt"), spikenm_fx.load_engine(f"{{name}}.snm")
    found = [engine(x)]
    for cut in {CUTS}:
        engine.reset()
        found.append(torch.cat([engine(x[:cut]), engine(x[cut:])]))
    engine.reset()
    found.append(torch.stack([engine.step(frame) for frame in x]))
    torch.save(found, f"{{name}}-found.pt")
assert not {{"spikingjelly", "snntorch", "norse"}} & set(sys.modules)
"""


def parts_of(model: nn.Module, x: Tensor, cut: int) -> Tensor:
    """The model on both parts of a sequence, one after the other, from rest."""
    rest(model)
    with torch.no_grad():
        return torch.cat([tensor(model(x[:cut])), tensor(model(x[cut:]))])


@dataclass(frozen=True)
class Run:
    """A network, its program and an input, and what a fresh process made of both."""

    model: nn.Module
    engine: Engine
    x: Tensor
    found: list[Tensor]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All networks whose framework is here, run by one process from their files."""
    folder, made = tmp_path_factory.mktemp("fresh"), {}
    for name in filter(find_spec, NETWORKS):
        torch.manual_seed(0)
        model, x = NETWORKS[name]().eval(), 2 * torch.rand(T, B, INPUTS)
        made[name] = model, program(model, x), x
        made[name][1].save(folder / f"{name}.snm")
        torch.save(x, folder / f"{name}.pt")
    subprocess.run([sys.executable, "-c", FRESH, *made], cwd=folder, check=True)
    return {name: Run(*of, torch.load(folder / f"{name}-found.pt")) for name, of in made.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_recurrent_network_runs_in_a_fresh_process(name: str, fresh: dict[str, Run]) -> None:
    """Without the framework; cut anywhere into two calls, and step by step."""
    pytest.importorskip(name)
    model, engine, x = fresh[name].model, fresh[name].engine, fresh[name].x
    whole, *cut_up, steps = fresh[name].found
    assert torch.equal(whole, engine(x))
    assert whole.abs().max() > 0
    assert torch.equal(steps, whole)
    for cut, found in zip(CUTS, cut_up, strict=True):
        torch.testing.assert_close(found, parts_of(model, x, cut), rtol=1e-4, atol=1e-4)
        if name != "norse":  # whose forward starts at rest: its states are the caller's
            assert torch.equal(found, whole)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(wants_sanitizers(), reason="a sanitizer's runtime must be preloaded")
@pytest.mark.parametrize("name", NETWORKS)
def test_spikenm_run_of_a_recurrent_network(name: str, runner: Path, tmp_path: Path) -> None:
    """A whole input and a stream of steps give Python's bits."""
    torch.manual_seed(0)
    x = 2 * torch.rand(T, B, INPUTS)
    engine = program(NETWORKS[name]().eval(), x)
    engine.save(tmp_path / "net.snm")
    np.save(tmp_path / "x.npy", x.numpy())
    command = [runner, tmp_path / "net.snm"]
    done = subprocess.run([*command, tmp_path / "x.npy"], capture_output=True, check=True)
    assert torch.equal(numbers(done.stdout.decode()), engine(x).flatten(0, 1))
    stream = x[:, :1].contiguous()
    streamed = subprocess.run(
        command, input=stream.numpy().tobytes(), capture_output=True, check=True
    )
    engine.reset()
    expected = torch.cat([engine.step(frame) for frame in stream])
    assert torch.equal(numbers(streamed.stdout.decode()), expected)


def sinabs(kind: str, spikes: str = "MultiSpike") -> nn.Module:
    """A layer that feeds its spikes back through a weight, between two others: ``[B, T, C]``."""
    layers = pytest.importorskip("sinabs.layers")
    activation = pytest.importorskip("sinabs.activation")
    settings: dict[str, Any] = {"spike_fn": getattr(activation, spikes)}
    settings |= {} if kind.startswith("IAF") else {"tau_mem": 10.0}
    settings |= {"tau_adapt": 10.0} if kind.startswith("ALIF") else {}
    fire = getattr(layers, kind)(rec_connect=nn.Linear(WIDTH, WIDTH), **settings)
    body = nn.Sequential(nn.Linear(INPUTS, WIDTH), fire, nn.Linear(WIDTH, 4))
    strong(body[0])
    return body.eval()


@pytest.mark.parametrize("spikes", ["MultiSpike", "SingleSpike"])
@pytest.mark.parametrize("kind", ["LIFRecurrent", "IAFRecurrent"])
def test_sinabs_recurrent_layers_run_natively(kind: str, spikes: str) -> None:
    """Its membranes go on from call to call, and its feedback starts at rest in each."""
    torch.manual_seed(0)
    model, x = sinabs(kind, spikes), 2 * torch.rand(B, T, INPUTS)
    engine = program(model, x)
    assert packing(engine).proof is not None
    with torch.no_grad():
        for fire in model.modules():
            if hasattr(fire, "reset_states"):
                fire.reset_states()
        for given in (x, x.flip(1), x[:, :3]):
            torch.testing.assert_close(engine(given), model(given), rtol=1e-4, atol=1e-4)
        assert model[1](model[0](x)).sum() > 0  # type: ignore[index]


def test_a_layer_whose_own_copy_fails_is_packed() -> None:
    """The adaptive one of sinabs has no known rule: all else runs, and the model is as it was."""
    torch.manual_seed(0)
    model, x = sinabs("ALIFRecurrent"), 2 * torch.rand(B, T, INPUTS)
    with pytest.raises(TypeError, match="rec_connect"):
        copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="the update rule of sinabs ALIFRecurrent"):
        engine = pack(model, x, program=True)
    assert not isinstance(engine, Engine)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        model[1].reset_states()  # type: ignore[index]
        torch.testing.assert_close(engine(x), model(x))
    assert engine.get_submodule("1.rec_connect") is not model.get_submodule("1.rec_connect")
