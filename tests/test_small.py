# SPDX-License-Identifier: Apache-2.0
"""``memory="small"``: weights stay in memory as they are stored, and compute what the fast do."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from few_rounds import few_rounds
from hypothesis import given
from hypothesis import strategies as st
from pack_strategies import prune
from profiles import tries
from program_strategies import Example, RuleNeuron, examples
from test_program import LIF, STEP, program, reset
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.errors import PackedFileError, PackError
from spikenm_fx.pack import native_status, pack, packing
from spikenm_fx.pattern import NM
from spikenm_fx.program import Engine
from spikenm_fx.program.image import DIGEST, sealed

pytestmark = [
    pytest.mark.usefixtures("few_rounds"),
    pytest.mark.skipif(not native_status().available, reason="no compiled kernels"),
]
__all__ = ["few_rounds"]

PATTERNS = ["1:4", "2:4", "2:8", "1:8", "4:8", "1:2", "3:16", "5:32", "7:64"]
DTYPES = [None, torch.float16, torch.bfloat16, torch.int8]


def pruned(model: nn.Module, pattern: str) -> nn.Module:
    """The model at N:M, in eval mode."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.copy_(prune(layer.weight, NM.parse(pattern)))
    return model.eval()


def dense_bytes(model: nn.Module) -> int:
    return sum(p.numel() * 4 for p in model.parameters() if p.dim() > 1)


def deep() -> nn.Module:
    """A stream of two wide layers, and a convolution before them."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 32, 3, padding=1), RuleNeuron(STEP), nn.Flatten())
    wide = (nn.Linear(32 * 16, 384), RuleNeuron(STEP), nn.Linear(384, 512))
    return nn.Sequential(*layers, *wide)


@pytest.mark.parametrize(("dtype", "share"), [(None, 0.6), (torch.int8, 0.35)])
@pytest.mark.parametrize("kind", ["program", "layers"])
def test_resident_weights_are_as_small_as_promised(
    kind: str, dtype: torch.dtype | None, share: float
) -> None:
    """All buffers count: those of the engine, and those inside the library."""
    model = pruned(deep(), "2:4")
    x = torch.rand(1, 4, 4, 4)
    dense = dense_bytes(model)
    engine = pack(model, x, program=kind == "program", memory="small", dtype=dtype)
    if isinstance(engine, Engine):
        held = sum(engine.layer_bytes)
        activations = engine.resident_bytes - held
        assert activations < 0.1 * dense  # what calls reuse, and the file without its weights
    else:
        tensors = {
            t.data_ptr(): t.numel() * t.element_size()
            for m in engine.modules()
            for t in (*m._parameters.values(), *m._buffers.values())
            if isinstance(t, Tensor)
        }
        held = sum(tensors.values())
    assert held <= share * dense
    report = packing(engine)
    assert sum(layer.resident_bytes for layer in report.layers) <= share * dense
    assert "they stay as they are stored" in str(report)
    fast = packing(pack(model, x, program=True, dtype=dtype))
    assert sum(layer.resident_bytes for layer in fast.layers) > 1.4 * held
    assert "are layouts for speed" in str(fast)


@tries(25)
@given(
    st.sampled_from(PATTERNS),
    st.sampled_from(DTYPES),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from([0.1, 0.6]),
    st.booleans(),
    st.integers(0, 99),
)
def test_small_and_fast_programs_give_the_same_bits(
    pattern: str,
    dtype: torch.dtype | None,
    inputs: int,
    outputs: int,
    rate: float,
    spikes: bool,
    seed: int,
) -> None:
    """Any pattern, stored type and odd size, spikes or other numbers, on every ISA level."""
    torch.manual_seed(seed)
    model = pruned(nn.Sequential(nn.Linear(inputs, outputs)), pattern)
    x = (torch.rand(3, inputs) < rate) * (1.0 if spikes else torch.randn(3, inputs))
    fast = program(model, x, dtype=dtype, nm=None)
    small = program(model, x, dtype=dtype, memory="small")
    for level in range(4):
        if fast._net.level(level) and small._net.level(level):
            assert torch.equal(small(x), fast(x))
    if dtype is None:
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@tries(15)
@given(examples(), st.sampled_from(DTYPES))
def test_a_random_network_keeps_its_answers(example: Example, dtype: torch.dtype | None) -> None:
    """Convolutions with groups, strides and pools, one step or many; compared by ``pack``."""
    with torch.no_grad():
        engine = program(example.model, example.x, dtype=dtype, memory="small")
        fast = program(example.model, example.x, dtype=dtype)
        assert engine(example.x).shape == fast(example.x).shape
        if dtype is None:
            assert packing(engine).proof is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_is_the_same_again(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """What the library holds is written back as it was read: saved, loaded, copied, pickled."""
    model = pruned(nn.Sequential(nn.Linear(37, 21), RuleNeuron(LIF), nn.Linear(21, 5)), "2:4")
    x = torch.rand(4, 3, 37)
    engine = program(model, x, dtype=dtype, memory="small")
    engine.save(tmp_path / "a.snm")
    loaded = spikenm_fx.load_engine(tmp_path / "a.snm")
    assert loaded.small
    for other in (loaded, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        other.save(tmp_path / "b.snm")
        assert (tmp_path / "a.snm").read_bytes() == (tmp_path / "b.snm").read_bytes()
        engine.reset()
        assert torch.equal(other(x), engine(x))
    assert set(spikenm_fx.load_packed(tmp_path / "a.snm")[0]) == {"0", "2"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_spreads_as_in_a_dense_layer(bad: float) -> None:
    """Also to the outputs that have a weight of zero for it."""
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.Linear(16, 20)), "2:4")
    x = torch.rand(2, 16)
    small, fast = (program(model, x, memory=m) for m in ("small", "fast"))
    x[0, 5], x[0, 7] = bad, 0.0
    with torch.no_grad():
        assert torch.equal(small(x).isnan(), model(x).isnan())
    assert torch.equal(small(x).nan_to_num(7), fast(x).nan_to_num(7))


def test_a_flattened_image_is_read_in_the_order_of_the_weight() -> None:
    """A linear layer behind a convolution counts channels first; tokens hold them last."""
    model = pruned(nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 12, 9)), "2:4")
    x = torch.rand(3, 2, 5, 6).round()
    with torch.no_grad():
        small = program(model, x, memory="small")
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "2:8", "1:8", "4:8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_run_from_what_is_stored(pattern: str, dtype: torch.dtype | None) -> None:
    """The engine that is no program: convolutions with groups, and neurons fused behind them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, padding=1, groups=2)
    model = pruned(nn.Sequential(conv, RuleNeuron(STEP), nn.Flatten(), nn.Linear(24, 7)), pattern)
    model[3] = nn.Linear(24 * 9, 7)
    model = pruned(model, pattern)
    x = torch.rand(2, 16, 3, 3)
    engine = pack(model, x, memory="small", dtype=dtype)
    found = packing(engine)
    assert set(found.choices.values()) == {"fma"}
    assert found.proof is not None
    assert not found.proof.put_back
    reset(model)
    reset(engine)
    if dtype is None:
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "tiny"}, "known are 'fast' and 'small'"),
        ({"memory": "small", "backend": "lut"}, "leave one of the two out"),
    ],
)
def test_other_memories_are_refused(options: dict[str, Any], said: str) -> None:
    """By name, before anything is done."""
    with pytest.raises(PackError, match=said):
        pack(nn.Sequential(nn.Linear(8, 8)), torch.rand(1, 8), **options)


def test_a_file_of_an_unknown_memory_is_refused(tmp_path: Path) -> None:
    """It may be of a newer release."""
    engine = program(pruned(nn.Sequential(nn.Linear(8, 8)), "2:4"), torch.rand(1, 8))
    engine.save(tmp_path / "net.snm")
    content = (tmp_path / "net.snm").read_bytes().replace(b'"memory":"fast"', b'"memory":"huge"')
    at = content.index(b'"digest":"') + 10
    content = sealed(content[:at] + DIGEST.encode() + content[at + 64 :])
    (tmp_path / "net.snm").write_bytes(content)
    with pytest.raises(PackedFileError, match="memory huge"):
        spikenm_fx.load_engine(tmp_path / "net.snm")
