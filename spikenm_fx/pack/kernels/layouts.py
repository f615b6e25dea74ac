# SPDX-License-Identifier: Apache-2.0
"""Execution layouts: what the native kernels read, derived from packed weights at load.

Layouts are never saved.  They are the same for every ISA level; each is described where the
kernel that reads it addresses it (``csrc/*.h``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from spikenm_fx.native.library import Kernel
from spikenm_fx.pack.weights.format import PackedWeight, pack_weight, unpack_weight
from spikenm_fx.pattern import NM

__all__ = ["Layout", "layout_for", "supports"]


TILE = 64  # bytes of one index plane: one per token of a tile
FMA_MAX_BLOCK = 256
EVENT_INPUTS = 64
AMX_INPUTS = 256
SMALLEST_SPLIT = 2.0**-100  # below, the third bf16 term of a weight would be flushed to zero
INT16_MAX = 32767
PIECE = 2**18  # weights that are laid out at once, of those that have more than four times as many


@dataclass(frozen=True, slots=True)
class Scheme:
    """A look-up scheme of ``csrc/lut.h``: its pattern, and input channels per unit and block."""

    kind: int
    nm: NM
    inputs: int
    block: int


# The sparser the scheme, the fewer look-ups: the first that a weight satisfies is taken.
SCHEMES = (
    Scheme(3, NM(1, 8), 32, 128),
    Scheme(2, NM(2, 8), 16, 128),
    Scheme(1, NM(1, 4), 16, 128),
    Scheme(0, NM(2, 4), 8, 64),
)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Tensors that one kernel reads for one layer.

    Attributes:
        kernel: which one.
        weights: fp32 tables or values, or int16 weights for ``event8``.
        codes: uint8 or int16 positions; empty for the event kernels.
        blocks: int64 ``(n, 5)``: kernel position, first channel, channels, offset, ends a segment.
        kind: scheme (LUT) or ``stored << 32 | keep << 16 | of`` (FMA), where ``stored`` is not 0 if
            weights and codes are those of the packed weight.
        scale: fp32 ``(O,)`` that int8 sums are multiplied by, or None.
    """

    kernel: Kernel
    weights: Tensor
    codes: Tensor
    blocks: Tensor
    kind: int
    scale: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that the layout takes in memory."""
        tensors = (self.weights, self.codes, self.blocks, self.scale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def supports(kernel: Kernel, packed: PackedWeight) -> bool:
    """Whether ``kernel`` can run this weight."""
    if kernel == "fma":
        return packed.nm.of <= FMA_MAX_BLOCK
    if kernel == "lut":
        return _scheme_for(packed.nm) is not None
    if kernel == "amx":
        small = packed.kept().float().abs()
        return not bool(((small > 0) & (small < SMALLEST_SPLIT)).any())
    return kernel == "event" or packed.scale is not None


def layout_for(kernel: Kernel, packed: PackedWeight, *, small: bool = False) -> Layout:
    """Derive the layout of ``kernel``; call :func:`supports` first.

    int8 weights run dequantised to fp32, but for ``event8`` and ``amx8``, which add the integers.

    Args:
        kernel: that is to run.
        packed: the weight.
        small: of ``fma``: the stored values and indices themselves, which take no more memory.
    """
    if small:
        return _stored(packed)
    plan = _PLANS[kernel]
    if packed.taps * packed.group_channels * packed.out_channels <= 4 * PIECE:
        made = plan.make(packed)
    else:
        made = _in_pieces(plan, packed)
    if kernel == "event8":
        return replace(made, blocks=_segmented(made.blocks, _integers(packed)))
    return made


def _in_pieces(plan: _Plan, packed: PackedWeight) -> Layout:
    """The same made of some rows at a time, as what that takes meanwhile is many times a layout."""
    groups, rows = packed.geometry.groups, packed.out_channels // packed.geometry.groups
    at_once = max(1, PIECE // (packed.taps * packed.group_channels) // plan.unit) * plan.unit
    whole: Layout | None = None
    for group in range(groups):
        for first in range(0, rows, at_once):
            end = min(first + at_once, rows)
            made = plan.make(packed.rows(group * rows + first, group * rows + end))
            if whole is None:
                many, few = groups * plan.padded(rows), plan.padded(end - first)
                whole = replace(
                    made,
                    weights=made.weights.new_empty(made.weights.numel() // few * many),
                    codes=made.codes.new_empty(made.codes.numel() // few * many),
                    scale=None if made.scale is None else _scale(packed),
                )
            at = (plan.padded(first), plan.padded(end - first), plan.padded(rows))
            sizes = plan.sizes(packed, made.blocks)
            for name in ("weights", "codes"):
                part = getattr(whole, name).chunk(groups)[group]
                _place(part, getattr(made, name), sizes, *at)
    assert whole is not None
    return whole


def _place(
    whole: Tensor, part: Tensor, sizes: list[int], first: int, rows: int, all_rows: int
) -> None:
    """Write rows ``[block][rows of the part][...]`` to where they are in ``[block][row][...]``."""
    width, taken, there = part.numel() // (rows * sum(sizes)), 0, 0
    for size in sizes:
        line = size * width
        start = there + first * line
        whole[start : start + rows * line] = part[taken : taken + rows * line]
        taken, there = taken + rows * line, there + all_rows * line


def _implies(nm: NM, scheme: NM) -> bool:
    """Whether every weight that is ``nm`` also is ``scheme``."""
    if scheme.of % nm.of == 0:
        return nm.keep * (scheme.of // nm.of) <= scheme.keep
    return nm.of % scheme.of == 0 and nm.keep <= scheme.keep


def _scheme_for(nm: NM) -> Scheme | None:
    return next((scheme for scheme in SCHEMES if _implies(nm, scheme.nm)), None)


def _blocks(packed: PackedWeight, size: int, units_of: int, per_unit: int = 1) -> Tensor:
    """Cut each kernel position's channels into blocks; offsets count units of ``units_of``."""
    rows, offset = [], 0
    for tap in range(packed.taps):
        for first in range(0, packed.group_channels, size):
            channels = min(size, packed.group_channels - first)
            rows.append([tap, first, channels, offset, 0])
            offset += -(-channels // units_of) * per_unit
    rows[-1][4] = 1
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _units(blocks: Tensor, units_of: int, per_unit: int = 1) -> list[int]:
    """How many units each block has."""
    return [-(-channels // units_of) * per_unit for channels in blocks[:, 2].tolist()]


def _by_group_and_block(packed: PackedWeight, parts: Tensor, sizes: list[int]) -> Tensor:
    """Lay out ``(O, taps * n, ...)`` as [group][block][output][...], flat.

    ``sizes`` are the blocks' lengths along axis 1.
    """
    rows = packed.out_channels // packed.geometry.groups
    pieces = []
    for group in range(packed.geometry.groups):
        of_group = parts[group * rows : (group + 1) * rows]
        pieces += [piece.reshape(-1) for piece in torch.split(of_group, sizes, dim=1)]
    return torch.cat(pieces).contiguous()


def _fp32(packed: PackedWeight) -> Tensor:
    return unpack_weight(packed).to(torch.float32)


def _lut(packed: PackedWeight) -> Layout:
    scheme = _scheme_for(packed.nm)
    assert scheme is not None
    again = pack_weight(_fp32(packed), scheme.nm, geometry=packed.geometry)
    per_unit = scheme.inputs // scheme.nm.of
    kept = _pad_blocks(again.kept(), per_unit)
    positions = _pad_blocks(again.positions().to(torch.int64), per_unit, of=scheme.nm)
    shape = (*kept.shape[:2], -1, 2, 2)  # (O, taps, unit, half, non-zero)
    w, at = kept.reshape(shape), positions.reshape(shape)
    zero = torch.zeros_like(w[..., 0])
    tables = torch.stack([zero, w[..., 0], w[..., 1], w[..., 0] + w[..., 1]], dim=-1)
    blocks = _blocks(packed, scheme.block, scheme.inputs)
    sizes = _units(blocks, scheme.inputs)
    codes = _plane_offsets(at, scheme).flatten(1, 2)
    return Layout(
        "lut",
        _by_group_and_block(packed, tables.flatten(1, 2), sizes),
        _by_group_and_block(packed, codes, sizes),
        blocks,
        scheme.kind,
        None,
    )


def _pad_blocks(x: Tensor, multiple: int, of: NM | None = None) -> Tensor:
    """Pad the block axis of ``(O, taps, blocks, keep)``; positions with a legal pattern."""
    missing = -x.shape[2] % multiple
    if not missing:
        return x
    filler = x.new_zeros(*x.shape[:2], missing, x.shape[3])
    if of is not None:
        filler += torch.arange(of.keep, device=filler.device)
    return torch.cat([x, filler], dim=2)


def _plane_offsets(at: Tensor, scheme: Scheme) -> Tensor:
    """Byte offsets of index planes inside a unit, int16 ``(O, taps, units, codes)``."""
    m = scheme.nm.of
    first, second = at[..., 0], at[..., 1]
    if scheme.nm.keep == 2:  # pairs i < j, counted in lexicographic order
        pattern = first * m - first * (first + 1) // 2 + second - first - 1
        patterns = m * (m - 1) // 2
    else:
        pattern, patterns = first * m + second, m * m
    low, high = pattern[..., 0], pattern[..., 1]
    if scheme.kind == 0:
        planes = (low * patterns + high)[..., None]
    else:
        planes = torch.stack([low, patterns + high], dim=-1)
    return (planes * TILE).to(torch.int16)


def _fma(packed: PackedWeight) -> Layout:
    nm, groups = packed.nm, packed.geometry.groups
    size = max(nm.of, (128 if nm.density <= 1 / 8 else 64) // nm.of * nm.of)
    blocks = _blocks(packed, size, nm.of, nm.keep)
    sizes = _units(blocks, nm.of, nm.keep)
    local = torch.arange(packed.blocks, device="cpu") % (size // nm.of) * nm.of
    picks = (packed.positions().to(torch.int64) + local[:, None]).to(torch.uint8)
    return Layout(
        "fma",
        _paired(packed.kept().to(torch.float32).flatten(1), sizes, groups),
        _paired(picks.flatten(1), sizes, groups),
        blocks,
        nm.keep << 16 | nm.of,
        None,
    )


def _stored(packed: PackedWeight) -> Layout:
    nm = packed.nm
    size = max(nm.of, 64 // nm.of * nm.of)
    blocks = _blocks(packed, size, nm.of, nm.keep)
    types = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
    stored = 1 + types.index(packed.values.dtype)
    kind = stored << 32 | nm.keep << 16 | nm.of
    values = packed.values.detach()  # a parameter that a module is given becomes one of its own
    return Layout("fma", values, packed.indices, blocks, kind, packed.scale)


def _paired(flat: Tensor, sizes: list[int], groups: int) -> Tensor:
    """``(O, J)`` as [group][block][output pair][non-zero][2]; odd rows get a row of zeros."""
    rows = flat.view(groups, -1, flat.shape[1])
    rows = F.pad(rows, [0, 0, 0, rows.shape[1] % 2])
    pairs = rows.view(groups, -1, 2, flat.shape[1]).transpose(2, 3)
    pieces = [piece.reshape(-1) for group in pairs for piece in torch.split(group, sizes, dim=1)]
    return torch.cat(pieces).contiguous()


def _event(packed: PackedWeight) -> Layout:
    weights = _input_major(_fp32(packed), packed, outputs=128, granule=16)
    blocks = _blocks(packed, EVENT_INPUTS, 1)
    return Layout(
        "event", weights, torch.empty(0, dtype=torch.uint8, device="cpu"), blocks, 0, None
    )


def _event8(packed: PackedWeight) -> Layout:
    integers = _integers(packed).to(torch.int16)
    weights = _input_major(integers, packed, outputs=256, granule=32)
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    blocks = _blocks(packed, EVENT_INPUTS, 1)
    return Layout("event8", weights, empty, blocks, 0, _scale(packed))


def _scale(packed: PackedWeight) -> Tensor:
    assert packed.scale is not None
    return packed.scale.contiguous()


def _integers(packed: PackedWeight) -> Tensor:
    """The dense int8 weight as fp32 integers."""
    values = packed.values.to(torch.float32)
    return unpack_weight(
        PackedWeight(packed.nm, packed.shape, packed.geometry, values, packed.indices)
    )


def _amx(packed: PackedWeight) -> Layout:
    weight = _fp32(packed)
    terms = []
    for _ in range(3):  # each term takes the next 8 bits of the significand, exactly
        term = weight.to(torch.bfloat16)
        weight = weight - term.float()
        terms.append(term)
    tiles = [_tiles(term, packed, channels=32, depth=2) for term in terms]
    return Layout(
        "amx",
        torch.stack(tiles, dim=3).flatten().contiguous(),
        torch.empty(0, dtype=torch.uint8, device="cpu"),
        _blocks(packed, AMX_INPUTS, 32),
        0,
        None,
    )


def _amx8(packed: PackedWeight) -> Layout:
    tiles = _tiles(_integers(packed).to(torch.int8), packed, channels=64, depth=4)
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    blocks = _blocks(packed, AMX_INPUTS, 64)
    return Layout("amx8", tiles.flatten().contiguous(), empty, blocks, 0, _scale(packed))


def _tiles(dense: Tensor, packed: PackedWeight, *, channels: int, depth: int) -> Tensor:
    """Dense weight as (group, 32 outputs, channel tile, 2, 16, 16 * depth).

    A tile holds ``channels`` input channels of 16 outputs; ``depth`` neighbouring channels of one
    output lie side by side.
    """
    groups = packed.geometry.groups
    folded = dense.flatten(2).transpose(1, 2) if dense.dim() > 2 else dense[:, None]
    folded = F.pad(folded, [0, -folded.shape[2] % channels])
    rows = folded.reshape(groups, -1, folded.shape[1] * folded.shape[2])
    rows = F.pad(rows, [0, 0, 0, -rows.shape[1] % 32])
    split = rows.reshape(groups, -1, 2, 16, rows.shape[2] // channels, channels // depth, depth)
    return split.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).contiguous()


def _input_major(dense: Tensor, packed: PackedWeight, *, outputs: int, granule: int) -> Tensor:
    """Dense weight as [group][output block][kernel position, channel][output], flat."""
    groups = packed.geometry.groups
    folded = dense.flatten(2).transpose(1, 2).flatten(1) if dense.dim() > 2 else dense
    rows = folded.reshape(groups, -1, folded.shape[1])
    rows = F.pad(rows, [0, 0, 0, -rows.shape[1] % granule])
    pieces = [piece.t().reshape(-1) for group in rows for piece in torch.split(group, outputs)]
    return torch.cat(pieces).contiguous()


def _segmented(blocks: Tensor, integers: Tensor) -> Tensor:
    """Mark where int16 sums must be flushed so that no spikes whatsoever can overflow them.

    The largest sum a segment can reach is that of a row's positive weights, the smallest that of
    its negative ones: both stay inside int16 in every segment.
    """
    folded = integers.flatten(2).transpose(1, 2) if integers.dim() > 2 else integers[:, None]
    high = torch.zeros(integers.shape[0], dtype=torch.float32, device="cpu")
    low = torch.zeros(integers.shape[0], dtype=torch.float32, device="cpu")
    blocks[:, 4] = 0
    for index, (tap, first, channels, _, _) in enumerate(blocks.tolist()):
        part = folded[:, tap, first : first + channels]
        up, down = part.clamp_min(0).sum(1), part.clamp_max(0).sum(1)
        if index and (float((high + up).max()) > INT16_MAX or float((low + down).min()) < -32768):
            blocks[index - 1, 4] = 1
            high, low = torch.zeros_like(high), torch.zeros_like(low)
        high, low = high + up, low + down
    blocks[-1, 4] = 1
    return blocks


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the layout of one kernel is made.

    Attributes:
        make: the layout of a whole weight, or of some rows of one group.
        granule: rows are padded to a multiple of it.
        unit: rows that must be laid out together; a multiple of the granule.
        units_of: input channels by which the parts of a row are counted that lie beside those of
            other rows, block by block; None where rows lie one after the other.
    """

    make: Callable[[PackedWeight], Layout]
    granule: int
    unit: int
    units_of: Callable[[NM], int] | None = None

    def padded(self, rows: int) -> int:
        """Rows with the padding."""
        return -(-rows // self.granule) * self.granule

    def sizes(self, packed: PackedWeight, blocks: Tensor) -> list[int]:
        """Relative lengths of a row's parts, of which those of all rows lie side by side.

        Args:
            packed: the weight.
            blocks: of the layout.
        """
        return [1] if self.units_of is None else _units(blocks, self.units_of(packed.nm))


def _inputs_of_look_ups(nm: NM) -> int:
    scheme = _scheme_for(nm)
    assert scheme is not None
    return scheme.inputs


_PLANS: dict[Kernel, _Plan] = {
    "fma": _Plan(_fma, 2, 2, lambda nm: nm.of),
    "lut": _Plan(_lut, 1, 1, _inputs_of_look_ups),
    "event": _Plan(_event, 16, 128),
    "event8": _Plan(_event8, 32, 256),
    "amx": _Plan(_amx, 32, 32),
    "amx8": _Plan(_amx8, 32, 32),
}
