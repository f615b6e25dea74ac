# SPDX-License-Identifier: Apache-2.0
"""The canonical packed form of one N:M weight: kept values and few-bit indices.

Everything is in fold order: a row is one output channel, along it run (kernel positions, input
channels), and each ``of`` consecutive input channels form a block that stores exactly ``keep``
values, ascending in their position.  A block with fewer non-zeros is filled up with explicit
zeros.  This form is device-neutral and is the only one that is saved; the layouts that kernels
execute are derived from it at load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikenm_fx.errors import PackError
from spikenm_fx.pattern import NM, PatternLike, not_finite

__all__ = ["LayerGeometry", "LayerKind", "PackedWeight", "pack_weight", "unpack_weight"]

LayerKind = Literal["linear", "conv1d", "conv2d"]
"""The layers that can be packed."""

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
"""What the kept values may be stored as; int8 carries one fp32 scale per row."""

PIECE = 2**18  # weights that are packed at once: indices of all would take many times the memory

INT8_MAX = 127  # symmetric: -128 is never used, so that negation stays in range


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What of a layer, beside its weight, decides its output shape.

    Attributes:
        kind: ``"linear"``, ``"conv1d"`` or ``"conv2d"``.
        stride: per spatial dimension; empty for linear.
        padding: zeros on each side, per spatial dimension.
        dilation: per spatial dimension.
        groups: channel groups (1 for linear).
    """

    kind: LayerKind = "linear"
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(LayerKind):
            raise PackError(f"layer kind {self.kind!r}; known are {', '.join(get_args(LayerKind))}")
        for name in ("stride", "padding", "dilation"):
            value = getattr(self, name)
            lowest = 0 if name == "padding" else 1
            if len(value) != self.spatial or any(v < lowest for v in value):
                raise PackError(
                    f"{name}={value} for a {self.kind}; {self.spatial} integers of at least "
                    f"{lowest} are required"
                )
        if self.groups < 1:
            raise PackError(f"groups={self.groups}; at least 1 is required")
        if self.kind == "linear" and self.groups != 1:
            raise PackError(f"groups={self.groups} for a linear layer; only convolutions have any")

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions."""
        return {"linear": 0, "conv1d": 1, "conv2d": 2}[self.kind]

    @classmethod
    def conv(
        cls,
        spatial: int,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Self:
        """A convolution of 1 or 2 spatial dimensions; integers count for each dimension."""

        def per_dim(value: int | tuple[int, ...]) -> tuple[int, ...]:
            return (value,) * spatial if isinstance(value, int) else tuple(value)

        kind: LayerKind = "conv1d" if spatial == 1 else "conv2d"
        return cls(kind, per_dim(stride), per_dim(padding), per_dim(dilation), groups)

    @classmethod
    def of_layer(cls, layer: nn.Module, *, name: str = "layer") -> Self:
        """The geometry of a Linear, Conv1d or Conv2d.

        Raises:
            PackError: for any other layer, or a padding mode other than zeros.
        """
        if isinstance(layer, nn.Linear):
            return cls()
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            raise PackError(
                f"{name} is a {type(layer).__name__}; Linear, Conv1d and Conv2d can be packed"
            )
        if layer.padding_mode != "zeros":
            raise PackError(
                f"{name}: padding_mode={layer.padding_mode!r}; only 'zeros' can be packed"
            )
        spatial = 1 if isinstance(layer, nn.Conv1d) else 2
        return cls.conv(
            spatial,
            stride=layer.stride,
            padding=_explicit_padding(layer, name),
            dilation=layer.dilation,
            groups=layer.groups,
        )


def _explicit_padding(layer: nn.Conv1d | nn.Conv2d, name: str) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise PackError(
            f"{name}: padding='same' with kernel {tuple(layer.kernel_size)} pads the two sides "
            "differently, which cannot be packed; pad explicitly before the layer"
        )
    return tuple(t // 2 for t in total)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One N:M weight in canonical packed form.

    Attributes:
        nm: the pattern; *keep at most* ``nm.keep`` of ``nm.of`` consecutive input channels.
        shape: the dense weight's shape, ``(O, C)`` or ``(O, C/groups, *kernel)``.
        geometry: stride, padding, dilation and groups.
        values: ``(O, J)`` kept values in fold order, ``J = prod(kernel) * ceil(C/of) * keep``.
        indices: uint8 ``(O, ceil(J * bits / 8))``: position of each value inside its block, in
            ``bits`` bits each, little-endian along the row.
        scale: fp32 ``(O,)`` for int8 values (weight = value * scale), else None.
    """

    nm: NM
    shape: tuple[int, ...]
    geometry: LayerGeometry
    values: Tensor
    indices: Tensor
    scale: Tensor | None = None

    @property
    def out_channels(self) -> int:
        """Output channels: rows of the weight."""
        return self.shape[0]

    @property
    def group_channels(self) -> int:
        """Input channels that one output channel sees."""
        return self.shape[1]

    @property
    def taps(self) -> int:
        """Positions of the kernel: 1 of a linear layer."""
        return math.prod(self.shape[2:])

    @property
    def blocks(self) -> int:
        """Blocks along the channels at one kernel position; the last one may be shorter."""
        return -(-self.group_channels // self.nm.of)

    @property
    def index_bits(self) -> int:
        """Bits of one stored index: 2 for M=4, 3 for M=8, 4 for M=16."""
        return (self.nm.of - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and scale: what the weight takes in a file."""
        tensors = (self.values, self.indices, self.scale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def rows(self, first: int, end: int) -> Self:
        """Some output channels of one group, by themselves; they share the memory.

        Args:
            first: output channel.
            end: after the last one.
        """
        scale = None if self.scale is None else self.scale[first:end]
        return replace(
            self,
            shape=(end - first, *self.shape[1:]),
            geometry=replace(self.geometry, groups=1),
            values=self.values[first:end],
            indices=self.indices[first:end],
            scale=scale,
        )

    def positions(self) -> Tensor:
        """Indices unpacked: uint8/int64 positions inside the block, ``(O, taps, blocks, keep)``."""
        count = self.taps * self.blocks * self.nm.keep
        flat = _unpack_bits(self.indices, count, self.index_bits)
        return flat.view(self.out_channels, self.taps, self.blocks, self.nm.keep)

    def kept(self) -> Tensor:
        """Values as ``(O, taps, blocks, keep)``, dequantised to fp32 where they are int8."""
        values = self.values
        if self.scale is not None:
            values = values.to(torch.float32) * self.scale[:, None]
        return values.view(self.out_channels, self.taps, self.blocks, self.nm.keep)

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(
            self, values=self.values.to(device), indices=self.indices.to(device), scale=scale
        )

    def check(self, name: str = "packed weight") -> None:
        """Raise unless shapes, dtypes, indices and values are those of a valid packed weight.

        Raises:
            PackError: naming the first thing that is wrong.
        """
        _check_fields(self, name)
        positions = self.positions()
        if positions.numel() and int(positions.max()) >= self.nm.of:
            raise PackError(f"{name}: an index points beyond its block of {self.nm.of}")
        if bool((positions[..., 1:] <= positions[..., :-1]).any()):
            raise PackError(f"{name}: indices must ascend strictly inside each block")
        if self.values.is_floating_point() and not bool(self.values.isfinite().all()):
            raise PackError(f"{name}: NaN or infinite values")
        tail = self.group_channels - (self.blocks - 1) * self.nm.of
        beyond = positions[:, :, -1:] >= tail
        if bool((self.kept()[:, :, -1:] != 0)[beyond].any()):
            raise PackError(f"{name}: a non-zero value lies beyond the last input channel")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedWeight):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]  # compares tensors by value


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def _check_fields(packed: PackedWeight, name: str) -> None:
    if len(packed.shape) != packed.geometry.spatial + 2:
        raise PackError(f"{name}: shape {packed.shape} does not fit a {packed.geometry.kind}")
    if packed.out_channels % packed.geometry.groups:
        raise PackError(
            f"{name}: {packed.out_channels} output channels in {packed.geometry.groups} groups"
        )
    count = packed.taps * packed.blocks * packed.nm.keep
    bytes_per_row = -(-count * packed.index_bits // 8)
    expected = {
        "values": (packed.out_channels, count),
        "indices": (packed.out_channels, bytes_per_row),
    }
    for field, shape in expected.items():
        tensor = getattr(packed, field)
        if tuple(tensor.shape) != shape:
            raise PackError(f"{name}: {field} are {tuple(tensor.shape)}, {shape} is required")
    if packed.values.dtype not in VALUE_DTYPES or packed.indices.dtype != torch.uint8:
        raise PackError(
            f"{name}: values {packed.values.dtype}, indices {packed.indices.dtype}; required are "
            "fp32, fp16, bf16 or int8 values and uint8 indices"
        )
    if (packed.scale is not None) != (packed.values.dtype == torch.int8):
        raise PackError(f"{name}: int8 values, and only they, carry a scale per row")
    if packed.scale is not None:
        ok = packed.scale.shape == (packed.out_channels,) and packed.scale.dtype == torch.float32
        if not ok or not bool((packed.scale.isfinite() & (packed.scale > 0)).all()):
            raise PackError(f"{name}: scale must be {packed.out_channels} positive finite fp32")


def pack_weight(
    weight: Tensor,
    nm: PatternLike,
    *,
    geometry: LayerGeometry | None = None,
    dtype: torch.dtype | None = None,
    name: str = "weight",
) -> PackedWeight:
    """Pack a dense weight that already is N:M.

    Args:
        weight: ``(O, C)``, ``(O, C/groups, k)`` or ``(O, C/groups, kh, kw)``; fp32, fp16 or bf16.
        nm: the pattern, e.g. ``"2:4"``.  Where ``of`` does not divide the channels, the last block
            is shorter and keeps at most ``keep`` of what is there.
        geometry: stride, padding, dilation, groups; None is a plain layer of the weight's rank.
        dtype: of the stored values; None keeps the weight's.  ``torch.int8`` quantises each row
            symmetrically, ``scale = max|row| / 127``; fp16 and bf16 round to nearest.
        name: for messages.

    Returns:
        The packed weight, detached.  Zeros come back as +0.0; everything else bit for bit.

    Raises:
        PackError: unless the weight is N:M, finite (also after rounding to ``dtype``) and floating.
        PatternError: for a pattern that is none.
    """
    pattern = NM.parse(nm)
    weight = weight.detach()
    geometry = geometry or _default_geometry(weight, name)
    _check_weight(weight, name)
    dtype = dtype or weight.dtype
    if dtype not in VALUE_DTYPES:
        raise PackError(f"{name}: dtype {dtype}; values can be fp32, fp16, bf16 or int8")
    shape = tuple(weight.shape)
    values: Tensor | None = None
    for first, end in _row_pieces(weight):
        made = _pack_rows(weight[first:end], pattern, dtype, name, first, shape)
        if values is None:  # all at once, not piece by piece: memory in between would be lost
            values, indices, scale = (
                None if part is None else part.new_empty(shape[0], *part.shape[1:]) for part in made
            )
        for whole, part in zip((values, indices, scale), made, strict=True):
            if whole is not None and part is not None:
                whole[first:end] = part
    assert values is not None
    assert indices is not None
    packed = PackedWeight(pattern, shape, geometry, values, indices, scale)
    _check_fields(packed, name)
    return packed


def _row_pieces(weight: Tensor) -> Iterator[tuple[int, int]]:
    """First and last rows of what is worked on at once."""
    rows = max(1, PIECE // max(1, weight[:1].numel()))
    for first in range(0, weight.shape[0], rows):
        yield first, min(first + rows, weight.shape[0])


def _pack_rows(
    rows: Tensor, nm: NM, dtype: torch.dtype, name: str, first: int, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    blocks = _fold_blocks(rows, nm)
    _check_pattern(blocks, nm, name, first, shape)
    positions = _kept_positions(blocks, nm)
    values = blocks.gather(-1, positions).flatten(1) + 0.0  # + 0.0 turns -0.0 into +0.0
    stored, scale = _convert(values, dtype, name)
    indices = _pack_bits(positions.flatten(1), (nm.of - 1).bit_length())
    return stored.contiguous(), indices, scale


def unpack_weight(packed: PackedWeight) -> Tensor:
    """The dense weight of ``packed.shape``: the inverse of :func:`pack_weight`.

    int8 values come back dequantised to fp32.
    """
    dtype = packed.values.dtype if packed.scale is None else torch.float32
    dense = torch.empty(packed.shape, dtype=dtype, device=packed.values.device)
    for first, end in _row_pieces(dense):
        dense[first:end] = _unpack_rows(packed.rows(first, end))
    return dense


def _unpack_rows(packed: PackedWeight) -> Tensor:
    kept = packed.kept()
    dense = kept.new_zeros(*kept.shape[:3], packed.nm.of)
    dense.scatter_(-1, packed.positions().long(), kept)
    channels_last = dense.flatten(2)[..., : packed.group_channels]
    return channels_last.transpose(1, 2).reshape(packed.shape)


def _default_geometry(weight: Tensor, name: str) -> LayerGeometry:
    spatial = weight.dim() - 2
    if spatial not in (0, 1, 2):
        raise PackError(
            f"{name} of shape {tuple(weight.shape)}; weights of Linear (2 dimensions), Conv1d (3) "
            "and Conv2d (4) can be packed"
        )
    return LayerGeometry() if spatial == 0 else LayerGeometry.conv(spatial)


def _check_weight(weight: Tensor, name: str) -> None:
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise PackError(f"{name} is {weight.dtype}; fp32, fp16 or bf16 is required")
    if weight.numel() == 0:
        raise PackError(f"{name} of shape {tuple(weight.shape)} is empty; there is nothing to pack")
    bad = not_finite(weight)
    if bad:
        raise PackError(f"{name} {tuple(weight.shape)} holds {bad} NaN or infinite values")


def _fold_blocks(weight: Tensor, nm: NM) -> Tensor:
    """View ``(O, C, *k)`` as ``(O, taps, blocks, of)``, zeros filling the last block."""
    folded = weight.flatten(2).transpose(1, 2) if weight.dim() > 2 else weight[:, None]
    folded = F.pad(folded, [0, -weight.shape[1] % nm.of])
    return folded.reshape(*folded.shape[:-1], -1, nm.of)


def _check_pattern(blocks: Tensor, nm: NM, name: str, first: int, shape: tuple[int, ...]) -> None:
    too_many = (blocks != 0).sum(-1, dtype=torch.int16) > nm.keep
    if bool(too_many.any()):
        o, tap, block = (int(i) for i in too_many.nonzero()[0])
        seen = int((blocks[o, tap, block] != 0).sum())
        raise PackError(
            f"{name} {shape} is not {nm.describe()}: the first block that holds more is output "
            f"{first + o}, kernel position {tap}, channels {block * nm.of}.."
            f"{block * nm.of + nm.of - 1} with {seen} non-zeros. Sparsify and fold the model first"
        )


def _kept_positions(blocks: Tensor, nm: NM) -> Tensor:
    """Where the non-zeros of each block are, and then its lowest unused places, in order."""
    taken = blocks != 0
    free = ~taken
    missing = nm.keep - taken.sum(-1, keepdim=True, dtype=torch.int16)
    taken |= free & (free.cumsum(-1, dtype=torch.int16) <= missing)
    places = taken.flatten().nonzero().remainder_(nm.of)  # quicker than a sort of each block
    return places.view(*blocks.shape[:-1], nm.keep)


def _convert(values: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor | None]:
    if dtype != torch.int8:
        stored = values.to(dtype)
        if not bool(stored.isfinite().all()):
            raise PackError(
                f"{name}: values up to {float(values.abs().max()):.3g} overflow {dtype}; "
                "pack as bfloat16 or float32"
            )
        return stored, None
    exact = values.to(torch.float32)
    peak = exact.abs().amax(1)
    # A row of zeros, or one so small that its scale underflows, still needs a usable scale.
    scale = (peak / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    stored = (exact / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return stored, scale


def _pack_bits(positions: Tensor, bits: int) -> Tensor:
    """Pack ``(rows, count)`` integers of ``bits`` bits each, little-endian along each row."""
    rows, count = positions.shape
    step = bits if bits in (1, 2, 4) else 1  # these never cross a byte
    flat = positions
    if step != bits:
        place = torch.arange(bits, device=positions.device)
        flat = ((positions[..., None] >> place) & 1).reshape(rows, count * bits)
    each = 8 // step
    flat = F.pad(flat.to(torch.uint8), [0, -flat.shape[1] % each]).view(rows, -1, each)
    packed = flat[..., 0].clone()
    for index in range(1, each):
        packed |= flat[..., index] << (index * step)
    return packed


def _unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse, as uint8 (int16 for more than 8 bits) ``(rows, count)``."""
    dtype = torch.uint8 if bits <= 8 else torch.int16
    if bits == 0:
        return torch.zeros(packed.shape[0], count, dtype=dtype, device=packed.device)
    if 8 % bits == 0:  # 1, 2 and 4 bits never cross a byte
        place = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        spread: Tensor = (packed[..., None] >> place) & (2**bits - 1)
        return spread.flatten(1)[:, :count]
    place = torch.arange(8, device=packed.device, dtype=torch.uint8)
    out = torch.empty(packed.shape[0], count, dtype=dtype, device=packed.device)
    powers = (1 << torch.arange(bits, device=packed.device)).to(dtype)
    for first, end in _row_pieces(packed):
        flat = ((packed[first:end, :, None] >> place) & 1).flatten(1)[:, : count * bits]
        flat = flat.view(end - first, count, bits).to(dtype)
        out[first:end] = (flat * powers).sum(-1, dtype=dtype)
    return out
