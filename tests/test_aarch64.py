# SPDX-License-Identifier: Apache-2.0
"""The aarch64 build, run by qemu-user: bit for bit what x86 computes.

``nox -s aarch64`` compiles the library, ``spikenm-run`` and ``kernel_driver.cpp`` and names their
folder; elsewhere these tests skip.  Sums of spikes are the same at every ISA level.  Multiply-adds
are fused on aarch64 as on x86 from AVX2 on, whose results are compared where inputs are analog.
"""

from __future__ import annotations

import os
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_strategies import cases, prune
from program_strategies import Example, examples
from test_program import program
from test_program_carried import (
    FUNCTIONS,
    INPUTS,
    OVER_TIME,
    Between,
    T,
    tensor,
    two_sources,
)
from torch import Tensor, nn

from spikenm_fx.native.library import Neuron, kernels, native_status
from spikenm_fx.pack.kernels.cpu import LayerShape, pack_spikes, run_spikes
from spikenm_fx.pack.kernels.layouts import Layout, layout_for, supports
from spikenm_fx.pack.weights.format import LayerGeometry, pack_weight
from spikenm_fx.pattern import NM
from spikenm_fx.program import Engine

FOLDER = os.environ.get("SPIKENM_FX_AARCH64", "")
LEVELS = native_status().levels
pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="run by nox -s aarch64"),
    pytest.mark.skipif("v3" not in LEVELS, reason="x86 results of AVX2 are compared with"),
]
KERNELS = ("fma", "lut", "event", "event8")
RUN = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
LAYERS = 60


def emulated(program_name: str, *arguments: object) -> str:
    """What a program of the aarch64 build prints."""
    command = (*RUN, str(Path(FOLDER) / program_name), *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Rule:
    """Parameters of a neuron that a kernel is given: one row each, and how it resets."""

    rows: Tensor
    modes: tuple[int, int, int, int]
    v: Tensor
    current: Tensor | None

    def structure(self) -> Neuron:
        rows = [row.data_ptr() for row in self.rows]
        synapse = (None, None) if self.current is None else (rows[5], rows[6])
        current = None if self.current is None else self.current.data_ptr()
        return Neuron(*rows[:5], self.v.data_ptr(), *synapse, current, *self.modes)


@dataclass(frozen=True)
class LayerCall:
    """One call of a kernel, as it is written for the driver, and what x86 makes of it."""

    words: bytes
    level: str
    expected: bytes


@st.composite
def layer_calls(draw: st.DrawFn) -> LayerCall:
    """Any kernel, layer, pattern and input; with a neuron behind it or without."""
    kernel = draw(st.sampled_from(KERNELS))
    nms = st.sampled_from(["2:4", "1:4", "2:8", "1:8", *(["5:7"] if kernel == "fma" else [])])
    case = draw(cases(nms=nms.map(NM.parse), channels=140, outputs=40))
    dtype = torch.int8 if kernel == "event8" else None
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry, dtype=dtype)
    assert supports(kernel, packed)
    layout = layout_for(kernel, packed, small=kernel == "fma" and draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 999)))
    steps, analog = draw(st.integers(1, 3)), kernel == "fma" and draw(st.booleans())
    size = 1 if case.geometry.kind == "linear" else 9
    shape = (steps * draw(st.integers(1, 70 if size == 1 else 2)), *_input_size(packed, size))
    x = torch.randn(shape) if analog else (torch.rand(shape) < draw(st.floats(0, 1))).float()
    sizes = LayerShape.of_call(shape, packed.shape, packed.geometry)
    rule = _rule(draw, sizes.tokens // steps, sizes.outputs) if draw(st.booleans()) else None
    if rule is not None:
        images = sizes.images // steps
        sizes = LayerShape(steps, images, *_rest(sizes))
    bias = torch.randn(sizes.outputs) if draw(st.booleans()) else None
    return _call(kernel, layout, sizes, x, rule, bias, "v3" if kernel == "fma" else "baseline")


def _rest(s: LayerShape) -> tuple:  # type: ignore[type-arg]
    return s.size, s.out, s.kernel, s.geometry, s.channels, s.outputs


def _input_size(packed: object, size: int) -> tuple[int, ...]:
    shape, geometry = packed.shape, packed.geometry  # type: ignore[attr-defined]
    channels = shape[1] * geometry.groups
    return (channels, *[size] * geometry.spatial)


def _rule(draw: st.DrawFn, tokens: int, outputs: int) -> Rule:
    synapse = draw(st.booleans())
    kind, timing = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    modes = (kind, timing, draw(st.integers(0, 1)), draw(st.integers(0, 1)))
    rows = torch.rand(7, outputs)
    current = torch.randn(tokens, outputs) if synapse else None
    return Rule(rows, modes, torch.randn(tokens, outputs), current)


def _call(
    kernel: str,
    layout: Layout,
    shape: LayerShape,
    x: Tensor,
    rule: Rule | None,
    bias: Tensor | None,
    level: str,
) -> LayerCall:
    native = kernels(level)
    assert native is not None
    if kernel == "fma":
        source = x if x.dim() == 2 else x.movedim(1, -1).contiguous()
    else:
        packed_input = pack_spikes(x, shape, native)
        assert packed_input is not None
        source = packed_input
    before = [b"", b""] if rule is None else [_bytes(rule.v), _bytes(rule.current)]
    bits = torch.zeros(shape.tokens, -(-shape.outputs // 64), dtype=torch.int64)
    out = torch.zeros(shape.tokens * shape.outputs)
    first = rule is None and shape.geometry.spatial > 0
    wanted = {"out": out} if rule is None else {"out_bits": bits, "neuron": rule}
    assert run_spikes(source, layout, shape, native, bias=bias, channels_first=first, **wanted)  # type: ignore[arg-type]
    given = out if rule is None else bits
    modes = (0, 0, 0, 0, 0) if rule is None else (1, *rule.modes)
    out_bytes, bit_bytes = (len(_bytes(out)), 0) if rule is None else (0, len(_bytes(bits)))
    head = (KERNELS.index(kernel), len(layout.blocks), layout.kind, int(first), out_bytes)
    words = struct.pack("<12q", *head, bit_bytes, *modes, 0) + bytes(shape.structure())
    arrays = (source, layout.weights, layout.codes, layout.blocks, bias, layout.scale)
    parts = [_bytes(t) for t in arrays] + [b"" if rule is None else _bytes(rule.rows), *before]
    words += b"".join(struct.pack("<q", len(part)) + part for part in parts)
    after = b"" if rule is None else _bytes(rule.v) + _bytes(rule.current)
    return LayerCall(words, level, _bytes(given) + after)


def _bytes(x: Tensor | None) -> bytes:
    return b"" if x is None else bytes(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(layer_calls(), min_size=LAYERS // 3, max_size=LAYERS))
def test_layer_kernels_give_the_bits_of_x86(calls: list[LayerCall]) -> None:
    """Sums, neurons' spikes and their states."""
    folder = Path(FOLDER)
    words = struct.pack("<q", len(calls)) + b"".join(call.words for call in calls)
    (folder / "cases.bin").write_bytes(words)
    emulated("kernel_driver", folder / "cases.bin", folder / "results.bin")
    found, at = (folder / "results.bin").read_bytes(), 0
    for call in calls:
        part = found[at : at + len(call.expected)]
        assert part == call.expected
        at += len(part)
    assert at == len(found)


def run_by_arm(*inputs: Tensor) -> Tensor:
    """The first output of the saved network, in one row."""
    files = [Path(FOLDER) / f"x{at}.npy" for at in range(len(inputs))]
    for file, x in zip(files, inputs, strict=True):
        np.save(file, x.numpy())
    text = emulated("spikenm-run", Path(FOLDER) / "net.snm", *files)
    return torch.tensor([float(number) for number in text.split()])


def gives_the_bits_of_x86(engine: Engine, *inputs: Tensor) -> None:
    engine.save(Path(FOLDER) / "net.snm")
    assert engine._net.level(1)
    engine.reset()
    assert torch.equal(run_by_arm(*inputs), tensor(engine(*inputs)).flatten())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(examples(), st.sampled_from([None, torch.int8, torch.float16]), st.booleans())
def test_programs_give_the_bits_of_x86(
    example: Example, dtype: torch.dtype | None, small: bool
) -> None:
    """Random networks of layers and neurons, fast and small, in every stored type."""
    memory = "small" if small else "fast"
    engine = program(example.model, example.x, dtype=dtype, memory=memory)
    gives_the_bits_of_x86(engine, example.x)


@pytest.mark.parametrize("name", OVER_TIME)
def test_what_steps_carry_gives_the_bits_of_x86(name: str) -> None:
    """Recurrent layers, feedback, neurons written in forward."""
    torch.manual_seed(0)
    x = 2 * torch.rand(T, 2, INPUTS)
    gives_the_bits_of_x86(program(OVER_TIME[name]().eval(), x), x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_softmax_give_the_bits_of_x86(name: str) -> None:
    """Exponentials and what is made of them, on numbers of both signs and of any size."""
    torch.manual_seed(0)
    x = 3 * torch.randn(4, 2, 5, 6)
    gives_the_bits_of_x86(program(Between(FUNCTIONS[name]).eval(), x), x)


def test_several_inputs_give_the_bits_of_x86() -> None:
    """Two over time, and one that is the same in all steps."""
    _, engine, x = two_sources()
    gives_the_bits_of_x86(engine, *x)


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:16", "5:32"])
@pytest.mark.parametrize("memory", ["fast", "small"])
def test_spikes_give_the_bits_of_every_level(pattern: str, memory: str) -> None:
    """Nothing is multiplied: the level without fused multiply-adds agrees as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(97, 53)).eval()
    with torch.no_grad():
        model[0].weight.copy_(prune(model[0].weight, NM.parse(pattern)))
    x = (torch.rand(4, 97) < 0.3).float()
    engine = program(model, x, memory=memory)
    engine.save(Path(FOLDER) / "net.snm")
    found = run_by_arm(x)
    for level in range(2):
        assert engine._net.level(level)
        assert torch.equal(found, engine(x).flatten())


def test_the_geometry_is_packed_as_the_driver_reads_it() -> None:
    """19 words of 64 bits."""
    shape = LayerShape.of_call((1, 4), (4, 4), LayerGeometry())
    assert len(bytes(shape.structure())) == 19 * 8
