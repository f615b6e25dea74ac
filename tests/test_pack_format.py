# SPDX-License-Identifier: Apache-2.0
"""The packed format: exact round trips, refusals, and files that cannot be tampered with."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pack_strategies import Case, cases, prune
from profiles import tries
from safetensors.torch import load_file, save_file
from torch import nn

from spikenm_fx.errors import CheckpointError, PackedFileError, PackError
from spikenm_fx.pack.kernels.reference import packed_layer
from spikenm_fx.pack.weights import files
from spikenm_fx.pack.weights.files import load_packed, save_packed
from spikenm_fx.pack.weights.format import LayerGeometry, PackedWeight, pack_weight, unpack_weight
from spikenm_fx.pattern import NM

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
@tries(60)
def test_round_trip_is_exact(dtype, data):
    """Unpacking gives the packed weight back bit for bit, for every pattern, layer and dtype."""
    case = data.draw(cases(dtype=dtype))
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry)
    packed.check()
    back = unpack_weight(packed)
    assert back.dtype == dtype
    assert back.is_contiguous()
    # Adding zero makes both zeros positive, which is all that packing may change.
    assert torch.equal(
        back.view(torch.uint8 if dtype.itemsize == 1 else _bits(dtype)),
        (case.weight + 0.0).view(_bits(dtype)),
    )


def _bits(dtype: torch.dtype) -> torch.dtype:
    return {4: torch.int32, 2: torch.int16}[dtype.itemsize]


@given(case=cases())
@tries(60)
def test_int8_is_the_rounded_row(case: Case):
    """int8 values are within half a step of the weight, and packing them again changes nothing."""
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry, dtype=torch.int8)
    packed.check()
    back = unpack_weight(packed)
    step = packed.scale.view(-1, *[1] * (case.weight.dim() - 1))
    assert bool(((back - case.weight).abs() <= step * 0.5001).all())
    again = pack_weight(back, case.nm, geometry=case.geometry, dtype=torch.int8)
    assert torch.allclose(unpack_weight(again), back, rtol=1e-6, atol=0)


@given(case=cases())
@tries(40)
def test_reference_runs_the_dense_layer(case: Case):
    """The reference backend gives what torch gives for the dense weight, for each geometry."""
    geometry = case.geometry
    channels = case.weight.shape[1] * geometry.groups
    packed = pack_weight(case.weight, case.nm, geometry=geometry)
    if geometry.kind == "linear":
        x = torch.randn(3, channels)
        expected = nn.functional.linear(x, case.weight)
    else:
        layer_class = nn.Conv1d if geometry.kind == "conv1d" else nn.Conv2d
        layer = layer_class(
            channels,
            case.weight.shape[0],
            case.weight.shape[2:],
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            bias=False,
        )
        layer.weight.data.copy_(case.weight)
        assert LayerGeometry.of_layer(layer) == geometry
        x = torch.randn(2, channels, *[7] * geometry.spatial)
        expected = layer(x)
    # Not to the bit: torch's convolutions may round differently with the alignment of their memory.
    torch.testing.assert_close(packed_layer(x, packed), expected, rtol=1e-5, atol=1e-6)


@given(case=cases(dtype=torch.float32), data=st.data())
@tries(40)
def test_refuses_what_is_not_nm(case: Case, data):
    """One non-zero too many in any block is refused, and the message names the block."""
    weight, nm = case.weight.clone(), case.nm
    if nm.keep >= min(nm.of, weight.shape[1]):
        return
    o = data.draw(st.integers(0, weight.shape[0] - 1))
    weight[o, : nm.keep + 1] = 1.0
    with pytest.raises(PackError, match=f"is output {o}, .* channels 0"):
        pack_weight(weight, nm, geometry=case.geometry, name="layer")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad):
    """NaN and infinities are refused, also where rounding to the stored dtype makes them."""
    weight = torch.zeros(4, 8)
    weight[1, 2] = bad
    with pytest.raises(PackError, match="1 NaN or infinite"):
        pack_weight(weight, "2:4")
    weight[1, 2] = 1e6
    with pytest.raises(PackError, match="overflow"):
        pack_weight(weight, "2:4", dtype=torch.float16)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (torch.zeros(4, 8, dtype=torch.float64), "float64"),
        (torch.zeros(0, 8), "empty"),
        (torch.zeros(8), "Linear"),
        (torch.zeros(1, 1, 1, 1, 1), "Conv1d"),
    ],
)
def test_refuses_other_tensors(weight, match):
    """A dtype, rank or size that has no packed form is refused with the reason."""
    with pytest.raises(PackError, match=match):
        pack_weight(weight, "2:4")


def test_refuses_layers_without_packed_form():
    """Padding modes and layers that no kernel computes are refused by name."""
    with pytest.raises(PackError, match="circular"):
        LayerGeometry.of_layer(nn.Conv2d(4, 4, 3, padding_mode="circular"))
    with pytest.raises(PackError, match="ConvTranspose2d"):
        LayerGeometry.of_layer(nn.ConvTranspose2d(4, 4, 3))
    assert LayerGeometry.of_layer(nn.Conv2d(4, 4, 3, padding="same")).padding == (1, 1)
    with pytest.raises(PackError, match="same"):
        LayerGeometry.of_layer(nn.Conv2d(4, 4, 2, padding="same"))


@pytest.mark.parametrize(("nm", "bits"), [("2:4", 2), ("2:8", 3), ("1:16", 4)])
def test_size(nm, bits):
    """A packed weight takes keep/of of the values and 2, 3 or 4 bits per value, no more."""
    pattern = NM.parse(nm)
    packed = pack_weight(prune(torch.randn(64, 128), pattern), pattern)
    kept = 64 * 128 * pattern.keep // pattern.of
    assert packed.nbytes == kept * 4 + kept * bits // 8


def test_meta_nibbles():
    """At 2:4 two indices form the nibble ``first | second << 2``, as torch and CUTLASS store it."""
    packed = pack_weight(torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0]]), "2:4")
    assert packed.indices.tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4]]
    assert packed.values.tolist() == [[5.0, 7.0, 1.0, 2.0]]


@pytest.fixture
def packed_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    conv = LayerGeometry.conv(2, stride=2, padding=1)
    weights = {
        "head": pack_weight(prune(torch.randn(4, 16), NM(2, 4)), "2:4", dtype=torch.int8),
        "conv": pack_weight(prune(torch.randn(6, 8, 3, 3), NM(1, 4)), "1:4", geometry=conv),
    }
    save_packed(path, weights, tensors={"head.bias": torch.ones(4)})
    return path


@given(case=cases(), dtype=st.sampled_from([*FLOATS, torch.int8]))
@tries(30)
def test_files_round_trip(case: Case, dtype, tmp_path_factory):
    """A file gives back exactly what was saved."""
    path = tmp_path_factory.mktemp("packed") / "w.safetensors"
    packed = pack_weight(case.weight, case.nm, geometry=case.geometry, dtype=dtype)
    save_packed(path, {"a.b": packed}, tensors={"a.bias": torch.arange(3.0)})
    weights, tensors = load_packed(path)
    assert weights == {"a.b": packed}
    assert list(tensors) == ["a.bias"]
    assert torch.equal(tensors["a.bias"], torch.arange(3.0))


def _rewrite(path: Path, *, tensor=None, **changes: str) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        metadata = handle.metadata() | changes
    tensors = load_file(path)
    if tensor:
        tensors[tensor] = tensors[tensor] + 1
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("tensor", ["head::values", "conv::indices", "head::scale", "head.bias"])
def test_tampered_tensor_is_refused(packed_file, tensor):
    """A value, index, scale or bias that was edited by hand is noticed."""
    _rewrite(packed_file, tensor=tensor)
    with pytest.raises(PackedFileError, match="checksum"):
        load_packed(packed_file)


def test_tampered_metadata_is_refused(packed_file):
    """An edited pattern, another version, a foreign format: each is refused with its reason."""
    from safetensors import safe_open

    with safe_open(packed_file, "pt") as handle:
        layers = json.loads(handle.metadata()["layers"])
    layers["head"]["pattern"] = "1:2"
    _rewrite(packed_file, layers=json.dumps(layers, sort_keys=True))
    with pytest.raises(PackedFileError, match="checksum"):
        load_packed(packed_file)
    _rewrite(packed_file, version="2")
    with pytest.raises(PackedFileError, match="version '2'"):
        load_packed(packed_file)
    _rewrite(packed_file, format="other")
    with pytest.raises(PackedFileError, match="not a packed file"):
        load_packed(packed_file)


def test_invalid_content_with_a_right_checksum_is_refused(packed_file, monkeypatch):
    """A well-formed file whose indices are impossible is refused by validation, not by a crash."""
    weights, _ = load_packed(packed_file)
    weights["head"].indices.fill_(0)
    monkeypatch.setattr(PackedWeight, "check", lambda *_: None)
    save_packed(packed_file, weights)
    monkeypatch.undo()
    with pytest.raises(PackedFileError, match="ascend"):
        load_packed(packed_file)


def test_damaged_files_are_refused(packed_file, tmp_path):
    """Truncated files and files of other kinds give a clear error."""
    packed_file.write_bytes(packed_file.read_bytes()[:-7])
    with pytest.raises(PackedFileError, match="safetensors"):
        load_packed(packed_file)
    text = tmp_path / "x.txt"
    text.write_text("hello")
    with pytest.raises(PackedFileError, match="safetensors"):
        load_packed(text)


def _declared(path: Path, layers: str) -> None:
    """Another description of the layers, under a checksum that is right."""
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        metadata = handle.metadata() | {"layers": layers}
    metadata.pop("checksum")
    tensors = load_file(path)
    metadata["checksum"] = files._checksum(metadata, tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "layers",
    [
        "[1]",
        "null",
        "5",
        '"abc"',
        "{",
        "[" * 100_000,
        '{"head": 5}',
        '{"head": []}',
        '{"head": {}}',
    ],
    ids=lambda text: text[:12],
)
def test_layers_that_are_no_description_are_refused(packed_file, layers):
    """Whatever JSON stands where the layers should be, the error is the documented one."""
    _declared(packed_file, layers)
    with pytest.raises(PackedFileError, match=re.escape(str(packed_file))):
        load_packed(packed_file)


@pytest.mark.parametrize("value", [None, True, 5, 1.5, "abc", [], [1.5], ["a"], [-1], {}, 2**70])
@pytest.mark.parametrize("field", ["pattern", "shape", "kind", "stride", "padding", "groups"])
def test_a_field_of_another_kind_is_refused(packed_file, field, value):
    """No value of a wrong kind gets past loading, or makes it fail otherwise."""
    from safetensors import safe_open

    with safe_open(packed_file, "pt") as handle:
        layers = json.loads(handle.metadata()["layers"])
    layers["conv"][field] = value
    _declared(packed_file, json.dumps(layers))
    with pytest.raises(PackedFileError, match=re.escape(str(packed_file))):
        load_packed(packed_file)


def test_a_linear_layer_in_groups_is_refused(packed_file):
    """Only convolutions have groups, in a file as in a geometry."""
    from safetensors import safe_open

    with pytest.raises(PackError, match="groups=2"):
        LayerGeometry(groups=2)
    with safe_open(packed_file, "pt") as handle:
        layers = json.loads(handle.metadata()["layers"])
    layers["head"]["groups"] = 2
    _declared(packed_file, json.dumps(layers))
    with pytest.raises(PackedFileError, match="groups=2"):
        load_packed(packed_file)


def test_a_folder_is_no_packed_file(tmp_path):
    """A folder is refused by name; a missing file stays what it is for Python."""
    with pytest.raises(PackedFileError, match=re.escape(str(tmp_path))):
        load_packed(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("x::values", "part of a packed"),
        ("x::scale", "part of a packed"),
        ("x.weight", "packed already"),
        ("__metadata__", "__metadata__"),
    ],
)
def test_names_that_a_packed_file_cannot_hold(tmp_path, key, match):
    """A file that could not be read as it was meant is not written."""
    packed = pack_weight(torch.zeros(8, 8), "2:4")
    with pytest.raises(PackedFileError, match=match):
        save_packed(tmp_path / "w.safetensors", {"x": packed}, tensors={key: torch.ones(8)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    ["text", None, 3.0, torch.ones(2).to_sparse(), torch.ones(2, device="meta")],
    ids=["text", "none", "number", "sparse", "meta"],
)
def test_values_that_a_packed_file_cannot_hold(tmp_path, value):
    """What is no dense tensor is refused by its name."""
    with pytest.raises(PackedFileError, match=r"x\.bias"):
        save_packed(tmp_path / "w.safetensors", {}, tensors={"x.bias": value})
    with pytest.raises(PackedFileError, match="x is a"):
        save_packed(tmp_path / "w.safetensors", {"x": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int64])
def test_other_dtypes_come_back(tmp_path, dtype):
    """Tensors beside the weights come back as they were, whatever their dtype."""
    path, value = tmp_path / "w.safetensors", torch.ones(2, dtype=dtype)
    save_packed(path, {}, tensors={"x": value})
    assert torch.equal(load_packed(path)[1]["x"], value)


def test_a_dtype_that_safetensors_lacks(tmp_path):
    """It is refused by name, before anything is written."""
    with pytest.raises(PackedFileError, match="complex128"):
        save_packed(
            tmp_path / "w.safetensors", {}, tensors={"x": torch.ones(2, dtype=torch.complex128)}
        )
    assert list(tmp_path.iterdir()) == []


def test_writing_is_atomic(packed_file, monkeypatch):
    """A write that fails half-way leaves the older file whole and no temporary file behind."""
    before = packed_file.read_bytes()

    def broken(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(CheckpointError, match="disk full"):
        save_packed(packed_file, {}, tensors={"x": torch.zeros(3)})
    assert packed_file.read_bytes() == before
    assert list(packed_file.parent.iterdir()) == [packed_file]
