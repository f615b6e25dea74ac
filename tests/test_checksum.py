# SPDX-License-Identifier: Apache-2.0
"""The checksum that tells evaluation whether values were written to behind torch's back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikenm_fx.masks import checksum as module
from spikenm_fx.masks.checksum import checksum
from spikenm_fx.native.library import kernels

EDITS = {
    "negated": torch.Tensor.neg_,
    "shifted": lambda t: t.add_(1),
    "scaled": lambda t: t.mul_(2),
    "reversed": lambda t: t.copy_(t.flip(0)),
    "two negated": lambda t: t[-2:].neg_(),
    "one negated": lambda t: t[:1].neg_(),
    "last swapped": lambda t: t[-2:].copy_(t[-2:].flip(0)),
    "halves swapped": lambda t: t.copy_(t.roll(len(t) // 2)),
}


@pytest.fixture(params=[True, False], ids=["native", "numpy"])
def native(request, monkeypatch):
    """With the compiled kernel, and with what serves without one."""
    if not request.param:
        monkeypatch.setattr(module, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip("no compiled kernels")


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [8, 64, 65, 512, 1024, 8192, 8176, 40_000])
def test_edits_change_it(native, edit, dtype, size):
    """Sign bits that all flip cancel in sums and products alike, unless one takes care."""
    tensor = (torch.arange(1, size + 1, dtype=torch.float64) / 8).to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.remainder(97) + 1  # values apart, far from overflow
    before = tensor.clone()
    known = checksum(tensor)
    assert checksum(before) == known
    EDITS[edit](tensor)
    if not torch.equal(tensor, before):
        assert checksum(tensor) != known


@given(st.integers(1, 5000), st.integers(0, 10_000), st.integers(0, 31))
def test_one_bit_is_enough(size, index, bit):
    """Whichever bit of whichever value flips."""
    tensor = torch.zeros(size, dtype=torch.int32)
    known = checksum(tensor)
    tensor[index % size] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    assert checksum(tensor) != known
