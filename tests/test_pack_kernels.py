# SPDX-License-Identifier: Apache-2.0
"""Every native kernel at every ISA level of this machine, against the reference backend."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack_strategies import COMMON, Case, cases, prune
from profiles import tries
from torch import Tensor

from spikenm_fx.native.library import available_kernels, kernels, native_status
from spikenm_fx.pack.kernels.cpu import LayerShape, pack_spikes, run_layer
from spikenm_fx.pack.kernels.layouts import layout_for, supports
from spikenm_fx.pack.kernels.reference import dense_layer, packed_layer
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight
from spikenm_fx.pattern import NM

STATUS = native_status()
pytestmark = pytest.mark.skipif(not STATUS.available, reason=f"no kernels: {STATUS.reason}")
HERE = available_kernels()
SPIKE_KERNELS = [k for k in HERE if k != "fma"]
BINARY_RATES = st.sampled_from([0.0, 0.03, 0.15, 0.5, 1.0])


def _input(data: st.DataObject, case: Case, *, binary: bool = True) -> Tensor:
    """An input that fits the layer: any batch (also empty), any memory format, both zeros."""
    geometry, shape = case.geometry, case.weight.shape
    channels = shape[1] * geometry.groups
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    if geometry.kind == "linear":
        lead = data.draw(st.sampled_from([(1,), (0,), (7,), (65,), (130,), (2, 3)]), label="lead")
        size: tuple[int, ...] = (*lead, channels)
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, shape[2:], strict=True)]
        spatial = [
            data.draw(st.integers(max(1, r - 2 * p), r + 8), label="size")
            for r, p in zip(reach, geometry.padding, strict=True)
        ]
        size = (data.draw(st.sampled_from([1, 0, 2, 3]), label="batch"), channels, *spatial)
    x = torch.rand(size, generator=generator)
    if binary:
        x = (x < data.draw(BINARY_RATES, label="rate")).float()
        if data.draw(st.booleans(), label="negative zeros"):
            x = torch.where(x == 0, -torch.zeros(()), x)
    else:
        x = (x * 8 - 4) * (torch.rand(size, generator=generator) < 0.7)
        x *= data.draw(st.sampled_from([1.0, 1.0, 1e-41]), label="denormals")
    form = data.draw(st.sampled_from(["contiguous", "channels_last", "strided"]), label="format")
    if form == "channels_last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if form == "strided" else x


def _bias(case: Case, data: st.DataObject) -> Tensor | None:
    return torch.randn(case.weight.shape[0]) if data.draw(st.booleans(), label="bias") else None


def _assert_close(y: Tensor | None, expected: Tensor) -> None:
    assert y is not None
    assert y.shape == expected.shape
    if expected.numel():
        denormal_steps = 1e-41  # fp32 cannot be finer than 1.4e-45 per addition
        bound = 1e-5 * float(expected.abs().max()) + denormal_steps
        assert float((y - expected).abs().max()) <= bound


@pytest.mark.parametrize("level", STATUS.levels)
@pytest.mark.parametrize("kernel", ["fma", "lut", "event", "amx"])
@given(data=st.data())
@tries(40)
def test_fp32_kernels_match_the_reference(kernel, level, data):
    """Within 1e-5 of the largest output, for any layer, pattern, size, rate and memory format."""
    _skip_unless_at(kernel, level)
    channels = 600 if kernel == "amx" else 140
    case = data.draw(cases(nms=_patterns(kernel), channels=channels, outputs=40))
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry)
    if not supports(kernel, packed):
        assert kernel == "amx"  # denormal weights, which tiles would flush
        return
    x, bias = _input(data, case), _bias(case, data)
    y = run_layer(x, layout_for(kernel, packed), packed.shape, packed.geometry, bias, level=level)
    _assert_close(y, packed_layer(x.double(), packed, None if bias is None else bias.double()))


def _skip_unless_at(kernel: str, level: str) -> None:
    if kernel not in available_kernels(level):
        pytest.skip(f"{kernel} has no kernel at level {level}")


def _patterns(kernel: str) -> st.SearchStrategy[NM]:
    lut = ["2:4", "1:4", "2:8", "1:8", "1:16", "1:2", "1:3", "2:16"]
    names = [n for n in lut if n != "1:3"] if kernel == "lut" else [*COMMON, "3:7", "5:5", "1:100"]
    return st.sampled_from(names).map(NM.parse)


@pytest.mark.parametrize("level", STATUS.levels)
@given(data=st.data())
@tries(25)
def test_fma_takes_any_activation(level, data):
    """The multiply-add kernel is right for analog inputs too."""
    case = data.draw(cases(channels=140, outputs=20))
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry)
    if not supports("fma", packed):
        return
    x = _input(data, case, binary=False)
    y = run_layer(x, layout_for("fma", packed), packed.shape, packed.geometry, level=level)
    _assert_close(y, packed_layer(x.double(), packed))


@pytest.mark.parametrize("level", STATUS.levels)
@pytest.mark.parametrize("kernel", ["event8", "amx8"])
@given(data=st.data())
@tries(30)
def test_integer_kernels_are_bit_exact(kernel, level, data):
    """Integer sums are exact; only the scale and the bias round, as they do in the reference."""
    _skip_unless_at(kernel, level)
    case = data.draw(cases(channels=200, outputs=40))
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry, dtype=torch.int8)
    x, bias = _input(data, case), _bias(case, data)
    layout = layout_for(kernel, packed)
    y = run_layer(x, layout, packed.shape, packed.geometry, bias, level=level)
    _assert_exact(y, _integer_reference(x, packed, bias))


def _integer_reference(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    integers = PackedWeight(
        packed.nm, packed.shape, packed.geometry, packed.values.double(), packed.indices
    )
    sums = packed_layer(x.double(), integers).float()
    per_row = (-1,) + (1,) * (0 if packed.geometry.kind == "linear" else sums.dim() - 2)
    return sums * packed.scale.view(per_row) + (0.0 if bias is None else bias.view(per_row))


def _assert_exact(y: Tensor | None, expected: Tensor) -> None:
    assert y is not None
    assert torch.equal(y, expected)


@pytest.mark.parametrize("level", STATUS.levels)
@pytest.mark.parametrize("sign", [1, -1])
def test_int16_sums_cannot_overflow(level, sign):
    """All spikes at once on rows of the largest weights: sums of 2^19 stay exact."""
    packed = pack_weight(torch.full((40, 4096), 0.5 * sign), "4:4", dtype=torch.int8)
    x = torch.ones(3, 4096)
    y = run_layer(x, layout_for("event8", packed), packed.shape, packed.geometry, level=level)
    _assert_exact(y, _integer_reference(x, packed, None))
    assert abs(float(y[0, 0])) == pytest.approx(2048, rel=1e-6)


@pytest.mark.parametrize("level", STATUS.levels)
@given(
    channels=st.sampled_from([800, 5000]),
    spatial=st.sampled_from([0, 1]),
    skew=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**31),
)
@tries(10)
def test_int16_sums_at_their_worst(level, channels, spatial, skew, seed):
    """Exactly the spikes that drive one row's sum highest, then lowest: no segment overflows."""
    generator = torch.Generator().manual_seed(seed)
    shape = (40, channels, *[1] * spatial)
    weight = torch.rand(shape, generator=generator) * 0.2 + 0.8  # all near the largest integer
    weight *= 1 - 2 * (torch.rand(shape, generator=generator) < skew).float()
    geometry = LayerGeometry.conv(1) if spatial else LayerGeometry()
    packed = pack_weight(weight, "1:1", geometry=geometry, dtype=torch.int8)
    worst = torch.stack([(weight[row] * sign > 0).float() for row in range(3) for sign in (1, -1)])
    y = run_layer(worst, layout_for("event8", packed), packed.shape, geometry, level=level)
    _assert_exact(y, _integer_reference(worst, packed, None))
    assert float(y.abs().max() / packed.scale.min()) > 32767  # sums that int16 cannot hold


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [k for k in HERE if not k.endswith("8")])
@given(data=st.data())
@tries(15)
def test_half_precision_weights(kernel, dtype, data):
    """Kernels compute in fp32 with the values that were stored."""
    case = data.draw(cases(nms=_patterns(kernel), channels=140, outputs=20))
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry, dtype=dtype)
    if not supports(kernel, packed):
        assert kernel == "amx"
        return
    x = _input(data, case)
    y = run_layer(x, layout_for(kernel, packed), packed.shape, packed.geometry)
    _assert_close(y, packed_layer(x.double(), packed))


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize(("outputs", "channels"), [(1, 1), (1, 65), (3, 63), (17, 127), (65, 64)])
def test_corner_sizes(kernel, outputs, channels):
    """One output, one input, and sizes on both sides of a word: no tokens, one, and a tile more."""
    nm = NM(2, 4) if channels >= 4 else NM(1, 1)
    weight = prune(torch.randn(outputs, channels), nm)
    packed = pack_weight(weight, nm, dtype=torch.int8 if kernel.endswith("8") else None)
    if not supports(kernel, packed):
        assert (kernel, nm) == ("lut", NM(1, 1))
        return
    for tokens in (0, 1, 65):
        x = (torch.rand(tokens, channels) < 0.5).float()
        y = run_layer(x, layout_for(kernel, packed), packed.shape, packed.geometry)
        _assert_close(y, packed_layer(x.double(), packed))


@pytest.mark.parametrize("kernel", SPIKE_KERNELS)
@pytest.mark.parametrize("bad", [2.0, 0.5, -1.0, float("nan"), float("inf"), 1e-45])
@given(where=st.integers(0, 10**6), spatial=st.sampled_from([0, 1, 2]), last=st.booleans())
@tries(6)
def test_spike_kernels_refuse_other_values(kernel, bad, where, spatial, last):
    """One value that is neither 0 nor 1, anywhere, is noticed: the kernel declines."""
    geometry = LayerGeometry.conv(spatial) if spatial else LayerGeometry()
    weight = prune(torch.randn(8, 70, *[2] * spatial), NM(2, 4))
    packed = pack_weight(weight, "2:4", geometry=geometry, dtype=torch.int8)
    x = (torch.rand(5, 70, *[9] * spatial) < 0.2).float()
    if last and spatial == 2:
        x = x.to(memory_format=torch.channels_last)
    layout = layout_for(kernel, packed)
    assert run_layer(x, layout, packed.shape, geometry) is not None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where % x.numel()), x.shape))
    x[index] = bad
    assert run_layer(x, layout, packed.shape, geometry) is None


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("spatial", [0, 2])
def test_deterministic_across_threads(kernel, spatial):
    """The same bits come out on 1, 2 and 5 threads, and again."""
    geometry = LayerGeometry.conv(2, padding=1) if spatial else LayerGeometry()
    weight = prune(torch.randn(96, 136, *[3] * spatial), NM(2, 4))
    packed = pack_weight(weight, "2:4", geometry=geometry, dtype=torch.int8)
    x = (torch.rand(*([3, 136, 17, 17] if spatial else [333, 136])) < 0.2).float()
    layout = layout_for(kernel, packed)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(run_layer(x, layout, packed.shape, geometry))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_one_openmp_runtime():
    """The kernels bring no OpenMP runtime of their own."""
    import re
    from pathlib import Path

    if STATUS.threads:
        library = Path(STATUS.path).read_bytes()
        assert not re.search(rb"libgomp|libomp|libiomp", library)


def test_memory_format_is_kept():
    """channels_last in, channels_last out, as torch's convolutions do."""
    geometry = LayerGeometry.conv(2, padding=1)
    packed = pack_weight(prune(torch.randn(8, 8, 3, 3), NM(2, 4)), "2:4", geometry=geometry)
    x = (torch.rand(2, 8, 6, 6) < 0.5).float()
    for form in (torch.contiguous_format, torch.channels_last):
        y = run_layer(x.to(memory_format=form), layout_for("lut", packed), packed.shape, geometry)
        assert y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("level", STATUS.levels)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 3, 70, 9, 9)]),
    seed=st.integers(0, 2**31),
    last=st.booleans(),
)
@tries(30)
def test_spike_bits_round_trip(level, sizes, seed, last):
    """Bits unpack to the spikes they were packed from, and unused bits are zero."""
    images, groups, cg, h, w = sizes
    native = kernels(level)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(images, groups * cg, h, w, generator=generator) < 0.4).float()
    geometry = LayerGeometry.conv(2, groups=groups)
    shape = LayerShape.of_call(x.shape, (groups, cg, 1, 1), geometry)
    source = x.to(memory_format=torch.channels_last) if last else x
    bits = pack_spikes(source, shape, native)
    counts = sum((bits >> i) & 1 for i in range(64)).sum()
    assert int(counts) == int(x.sum())
    back = torch.empty_like(x)
    native.unpack_planes(bits.data_ptr(), images, groups, cg, h * w, back.data_ptr(), 1)
    assert torch.equal(back, x)
    rows = torch.empty(images, h, w, groups * cg)
    native.unpack_rows(bits.data_ptr(), images * h * w, groups, cg, rows.data_ptr(), 1)
    assert torch.equal(rows.permute(0, 3, 1, 2), x)


def test_reference_agrees_with_torch():
    """The reference itself is torch's dense layer on the unpacked weight."""
    weight = prune(torch.randn(8, 8), NM(2, 4))
    x = torch.randn(5, 8)
    packed = pack_weight(weight, "2:4")
    assert torch.equal(packed_layer(x, packed), dense_layer(x, weight, None, LayerGeometry()))
