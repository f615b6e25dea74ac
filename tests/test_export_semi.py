# SPDX-License-Identifier: Apache-2.0
"""2:4 weights in the layout of sparse tensor cores: counted before, exact after, told where not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import spikenm_fx
from spikenm_fx import Rule, export
from spikenm_fx.bench import gpu
from spikenm_fx.errors import ExportError
from spikenm_fx.export.semi_layout import MULTIPLES, compress, expand, padded, too_full

DTYPES = list(MULTIPLES)


def sparse_matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """At most two non-zeros in each four, sometimes fewer; extreme values among them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(rows, columns // 4, 4, generator=generator) * 50
    order = torch.rand(blocks.shape, generator=generator).argsort(-1).argsort(-1)
    keep = torch.randint(0, 3, (*blocks.shape[:2], 1), generator=generator)
    return blocks.masked_fill(order >= keep, 0.0).reshape(rows, columns).to(dtype)


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_expansion_gives_back_every_bit(rows: int, columns: int, dtype, seed: int) -> None:
    """Our expansion, written from the layout, undoes torch's conversion; so does torch's own."""
    from torch.sparse import _semi_structured_conversions as torchs

    height, width = MULTIPLES[dtype]
    matrix = sparse_matrix(rows * height, columns * width, dtype, seed)
    values, positions = compress(matrix)
    assert values.shape == (matrix.shape[0], matrix.shape[1] // 2)
    found = expand(values, positions)
    assert torch.equal(found.view(torch.int8), matrix.view(torch.int8))
    theirs = torchs.sparse_semi_structured_to_dense_cutlass(values, positions)
    assert torch.equal(found, theirs)


@given(st.integers(0, 31), st.integers(0, 15), st.sampled_from(DTYPES))
def test_a_third_non_zero_is_refused(row: int, block: int, dtype) -> None:
    """Torch's conversion drops it without a word: counted before."""
    matrix = torch.zeros(MULTIPLES[dtype], dtype=dtype)
    matrix[row, 4 * block : 4 * block + 3] = 1
    assert too_full(matrix) == 1
    with pytest.raises(ExportError, match="1 blocks hold more than 2 of 4"):
        compress(matrix, "layer")


def test_float32_is_refused_by_name() -> None:
    """It is 1:2 on sparse tensor cores, and would lose half of a 2:4 weight."""
    with pytest.raises(ExportError, match="float32 is 1:2 there"):
        compress(torch.zeros(32, 64))
    with pytest.raises(ExportError, match="in float32 they take 1:2"):
        export.semi_structured(net(), dtype=torch.float32)


@given(st.integers(1, 70), st.integers(1, 33), st.sampled_from(DTYPES))
def test_padding_reaches_the_vendors_multiples(rows: int, blocks: int, dtype) -> None:
    """Zeros below and to the right; what was there stays."""
    matrix = sparse_matrix(rows, 4 * blocks, dtype, rows)
    out = padded(matrix)
    assert out.shape[0] % MULTIPLES[dtype][0] == out.shape[1] % MULTIPLES[dtype][1] == 0
    assert torch.equal(out[:rows, : 4 * blocks], matrix)
    assert int((out != 0).sum()) == int((matrix != 0).sum())


class Steps(nn.Module):
    """Conv, strided conv, 1x1 conv, Linear over ``[T, N, ...]``, spikes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.point, self.grouped = nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 16, 3, groups=4)
        self.fc, self.head = nn.Linear(64, 40), nn.Linear(40, 5)

    def forward(self, x):
        steps, batch = x.shape[:2]
        x = (self.conv(x.flatten(0, 1)) > 0).float()
        x = (self.point(x) > 0.1).float()
        x = (self.grouped(x) > 0).float().flatten(1)
        return self.head((self.fc(x.unflatten(0, (steps, batch))) > 0).float())


def net() -> nn.Module:
    rules = [Rule("head", action="keep_dense"), Rule("re:.*")]
    return spikenm_fx.fold(spikenm_fx.sparsify(Steps(), "2:4", rules=rules, method="magnitude"))


def spikes() -> torch.Tensor:
    return (torch.rand(2, 3, 4, 8, 8) < 0.3).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_compute_what_they_did(dtype: torch.dtype) -> None:
    """Each layer's output on the same spikes, within its dtype's rounding."""
    model, x = net(), spikes()
    with torch.no_grad():
        made = export.semi_structured(model, x, dtype=dtype)
        report = export.semi_report(made)
        runs = {row.name: row.sparse for row in report.rows}
        assert runs == {n: n in ("conv", "point", "fc") for n in runs}
        sizes = {"conv": (6, 4, 8, 8), "point": (6, 8, 4, 4), "fc": (2, 3, 64)}
        for name, shape in sizes.items():
            given = (torch.rand(shape) < 0.3).float()
            wanted, seen = (m.get_submodule(name)(given) for m in (model, made))
            assert seen.shape == wanted.shape
            rounding = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.int8: 2**-6}[dtype]
            assert float((seen - wanted).abs().max()) <= rounding * float(wanted.abs().max()) * 2
    assert "groups are products of their own" in str(report)
    assert export.semi_structured.__module__ in report.__class__.__module__
    assert (report.measured == "not measured: no CUDA device") == (not torch.cuda.is_available())


def test_int8_is_for_spikes() -> None:
    """Analog inputs would be rounded: such layers stay dense, and without inputs nobody knows."""
    model = net()
    with pytest.raises(ExportError, match="give example inputs"):
        export.semi_structured(model, dtype=torch.int8)
    report = export.semi_report(
        export.semi_structured(model, torch.rand(2, 3, 4, 8, 8), dtype=torch.int8)
    )
    conv = report.rows[0]
    assert not conv.sparse
    assert "analog" in conv.why


def test_what_is_not_24_stays_dense() -> None:
    """A dense model is refused, a layer of another pattern named, an unfolded model told so."""
    with pytest.raises(ExportError, match=r"no layer of Steps is 2:4 \(conv: dense"):
        export.semi_structured(Steps())
    half = spikenm_fx.sparsify(Steps(), "4:8", rules=[Rule("fc"), Rule("point", nm="2:4")])
    with pytest.raises(ExportError, match=r"fold\(model\) first"):
        export.semi_structured(half)
    report = export.semi_report(export.semi_structured(spikenm_fx.fold(half)))
    assert {row.name: row.sparse for row in report.rows}["point"]
    assert "not 2:4" in next(row.why for row in report.rows if row.name == "fc")
    with pytest.raises(ExportError, match="was not made by"):
        export.semi_report(Steps())


def test_the_model_stays_as_it_was() -> None:
    """The copy shares nothing with it."""
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export.semi_structured(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.fc) is nn.Linear


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_table_claims_no_speed_without_a_device(monkeypatch) -> None:
    """The bench's rows hold differences on any device, and times on CUDA alone."""
    row = gpu._products("cpu", 32, 64, 8)
    for dtype in ("float16", "bfloat16", "int8"):
        assert row[dtype]["dense_ms"] is None
        assert row[dtype]["sparse_ms"] is None
        assert row[dtype]["difference_to_cpu_float32"] < 0.02
    assert all("not measured" in line for line in map(str, gpu._table([row])[1:]))
