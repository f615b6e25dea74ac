# SPDX-License-Identifier: Apache-2.0
"""Which part of a weight this rank holds, and what follows for its masks.

FSDP2 and tensor parallelism make DTensors of weights.  Blocks lie along the input channels, so that
a rank that holds some output channels holds whole blocks, and can mask them by itself: with the
noise of the unsharded weight, counted from its own first block, and with two numbers a layer that
all ranks add up (:func:`total`).  Scores, their momentum and credits are cut as the weight is.

# What sharded masks cost

On paper: a spiking transformer of 1 B masked fp32 weights in 144 layers, Adam, on 64 ranks under
``fully_shard``, which gathers weights in forward and in backward and scatters gradients.

| per rank               | dense FSDP2                | with learnt masks                    |
|------------------------|----------------------------|--------------------------------------|
| weights, grads, Adam   | 16 B/64 a weight: 250 MB   | the same                             |
| logits, momentum, EID  | -                          | 12 B/64 a weight: 188 MB             |
| masks                  | -                          | 1 B/64 a weight: 16 MB               |
| layer of each block    | -                          | 4 B/64 a block of n:4, or less: 16 MB |
| at rest together       | 250 MB                     | 469 MB, 1.88 times                   |
| gathered and scattered | 3 * 4 GB * 63/64 = 11.8 GB | the same: what travels is masked     |
| added up each step     | -                          | two vectors of 144, 2.3 kB           |
| every 20th step (EID)  | -                          | 2 GB more, 0.8 % on average          |
| kernels of a step      | those of Adam              | about 200 more                       |

``tests/test_sharded.py`` counts the same of small networks, by bytes and calls: memory on two and
on four ranks, what a step sends between refreshes of the credits and with one, kernels with few
layers and many.  Under DistributedDataParallel, whose gradients make two thirds of FSDP's traffic,
credits travel in six bits a number and are 1 % of it (:mod:`spikenm_fx.masks.eid.together`).

The two vectors are the root mean squares of the scores' gradients, before they move, and of the
scores, after it: the second depends on the first.  Both are summed in float64, where the order of
additions decides the 53rd bit, and rounded once to 24 bits, which that bit changes once in 10^8
times: the masks of any number of ranks are those of one process.

EID needs to know which neuron each layer drives.  Where ``sparsify`` gets ``example_inputs`` before
``fully_shard``, it knows; else the first training forward gathers the whole model once to see it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikenm_fx._torch import local_part, shard_offsets
from spikenm_fx.errors import PlanError
from spikenm_fx.masks.noise import Key, gumbel_of_runs
from spikenm_fx.pattern import BlockView

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from spikenm_fx.masks.layer import MaskedWeight

__all__ = [
    "Shard",
    "blocked",
    "is_sharded",
    "laid_out",
    "part_of",
    "refuse_whole",
    "shard_of",
    "total",
    "whole_of",
]


_REDUCE_SCATTERS = ("reduce_scatter_single", "reduce_scatter_tensor")  # the second one is older


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor``, of any shape, is a DTensor; asked without importing what that is."""
    return hasattr(tensor, "device_mesh")


def laid_out(view: BlockView, scores: Tensor) -> Tensor:
    """Scores as checkpoints and DTensors hold them: with an axis of their own for what is sharded.

    Args:
        view: of the weight, or of a rank's part of it.
        scores: ``(lead, K, inner)``, K numbers a block.

    Returns:
        a view: ``(outputs, blocks, K, inner)``; ``(blocks, K, outputs, kernel)`` if transposed.
    """
    lead, k, inner = scores.shape
    if view.transposed:
        outputs = view.shape[1]
        return scores.view(lead, k, outputs, inner // max(outputs, 1))
    outputs = view.shape[0]
    return scores.view(outputs, _blocks(view), k, inner)


def blocked(view: BlockView, stored: Tensor) -> Tensor:
    """The inverse of :func:`laid_out`: ``(lead, K, inner)``, a view."""
    return stored.flatten(2, 3) if view.transposed else stored.flatten(0, 1)


def _blocks(view: BlockView) -> int:
    """Blocks along the input channels of one group."""
    return (view.channels + view.padding) // view.nm.of


class Shard:
    """This rank's part of one masked weight.

    Args:
        name: of the weight, for errors.
        weight: the DTensor.
        whole: the whole weight as blocks.

    Attributes:
        mesh: of the weight.
        placements: of the weight on it.
        whole: the whole weight as blocks.
        view: the part as blocks.
        first: where the part begins in the whole weight, by axis.

    Raises:
        PlanError: if a block would lie on two ranks.
    """

    def __init__(self, name: str, weight: DTensor, whole: BlockView) -> None:
        self.mesh, self.placements, self.whole = weight.device_mesh, weight.placements, whole
        _refuse_cut_blocks(name, weight, whole)
        shape, self.first = shard_offsets(weight)
        groups = whole.groups
        if whole.transposed and groups > 1:
            groups = shape[0] // whole.channels
        self.view = replace(whole, shape=tuple(shape), groups=max(groups, 1))

    @property
    def groups(self) -> list[Any]:
        """Process groups over which the parts make the whole, one for each sharding mesh axis."""
        axes = [axis for axis, p in enumerate(self.placements) if p.is_shard()]
        return [self.mesh.get_group(axis) for axis in axes]

    @property
    def axis(self) -> int:
        """The axis of the weight that the first sharding axis of the mesh cuts: that of FSDP."""
        return next(_axis(p) for p in self.placements if p.is_shard())

    @property
    def key(self) -> tuple[int, ...]:
        """By which shards can be added up together."""
        return tuple(id(group) for group in self.groups)

    def fits(self, weight: DTensor) -> bool:
        """Whether ``weight`` is laid out as this shard."""
        return weight.device_mesh == self.mesh and weight.placements == self.placements

    def fits_scores(self, scores: DTensor) -> bool:
        """Whether ``scores`` are laid out as those of this shard."""
        placed = tuple(scores.placements) == self._placements_of_scores
        return scores.device_mesh == self.mesh and placed

    @property
    def _placements_of_scores(self) -> tuple[Any, ...]:
        return tuple(_moved(p, self.whole.transposed) for p in self.placements)

    def like_weight(self, part: Tensor) -> DTensor:
        """A DTensor of the whole weight's shape of this rank's part, laid out as the weight."""
        return self._dtensor(part, self.whole.shape, self.placements)

    def like_scores(self, part: Tensor) -> DTensor:
        """The same of scores ``(lead, K, inner)``, in the shape of :func:`laid_out`."""
        lead, _, inner = self.whole.blocked_shape
        k = part.shape[1]
        if self.whole.transposed:
            outputs = self.whole.shape[1]
            shape: tuple[int, ...] = (lead, k, outputs, inner // max(outputs, 1))
        else:
            shape = (self.whole.shape[0], _blocks(self.whole), k, inner)
        placements = self._placements_of_scores
        return self._dtensor(laid_out(self.view, part.contiguous()), shape, placements)

    def _dtensor(self, part: Tensor, shape: tuple[int, ...], placements: Sequence[Any]) -> DTensor:
        from torch.distributed.tensor import DTensor

        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return DTensor.from_local(
            *(part.contiguous(), self.mesh, placements),
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(strides),
        )

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the weight's whole shape, in memory of its own."""
        for axis, (first, size) in enumerate(zip(self.first, self.view.shape, strict=True)):
            whole = whole.narrow(axis, min(first, whole.shape[axis]), size)
        return whole.clone(memory_format=torch.contiguous_format)

    def part_of_scores(self, scores: Tensor) -> Tensor:
        """The same of scores ``(lead, K, inner)`` of the whole weight."""
        stored = laid_out(self.whole, scores.contiguous())
        lead, _, inner = self.view.blocked_shape
        if self.whole.transposed:
            ranges = {0: (self._first_block, lead), 2: (self.first[1], self.view.shape[1])}
        else:
            ranges = {0: (self.first[0], self.view.shape[0])}
            ranges[1] = (self.first[1] // self.whole.nm.of, _blocks(self.view))
        for axis, (first, size) in ranges.items():
            stored = stored.narrow(axis, min(first, stored.shape[axis]), size)
        return stored.reshape(lead, scores.shape[1], inner).clone()

    @property
    def _first_block(self) -> int:
        """Of transposed weights: blocks before this part's along axis 0."""
        channels = self.whole.channels
        groups, rest = divmod(self.first[0], max(channels, 1))
        return groups * _blocks(self.whole) + rest // self.whole.nm.of

    def noise(
        self, key: Key, k: int, device: torch.device, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Gumbel noise ``(lead, k, inner)``: the very bits of the whole weight's, of this part.

        Args:
            key: of the weight and step.
            k: numbers a block.
            device: where to make it.
            rows: of some of its output channels alone, from the first to before the second.
        """
        inner = self.view.blocked_shape[2]
        return gumbel_of_runs(*self._runs(k, rows), key, device).view(-1, k, inner)

    def noise_start(self, k: int, rows: tuple[int, int] | None = None) -> int | None:
        """The counter of the first number of :meth:`noise`, if the others follow one by one."""
        start, runs, run, stride = self._runs(k, rows)
        return start if runs < 2 or run == stride else None

    def _runs(self, k: int, rows: tuple[int, int] | None) -> tuple[int, int, int, int]:
        """Where the noise of this part lies in that of the whole: start, runs, length, stride."""
        lead, _, inner = self.view.blocked_shape
        wide = self.whole.blocked_shape[2]
        if self.whole.transposed:
            kernel = wide // max(self.whole.shape[1], 1)
            start = self._first_block * k * wide + self.first[1] * kernel
            return start, lead * k, inner, wide
        row = _blocks(self.whole) * k * wide
        start = self.first[0] * row + self.first[1] // self.whole.nm.of * k * wide
        begin, end = rows or (0, self.view.shape[0])
        return start + begin * row, end - begin, _blocks(self.view) * k * inner, row

    def sum_parts(self, whole: Tensor) -> Tensor:
        """What the ranks of the mesh have measured of the whole weight, added up: this part of it.

        Args:
            whole: of the weight's whole shape, on every rank.
        """
        for axis, placement in enumerate(self.placements):
            group = self.mesh.get_group(axis)
            if placement.is_shard():
                whole = _reduce_scattered(whole, _axis(placement), group, self.mesh.size(axis))
            else:
                torch.distributed.all_reduce(whole, group=group)
        shape = self.view.shape
        for axis, size in enumerate(shape):
            whole = whole.narrow(axis, 0, size)
        return whole.contiguous()

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """Numbers of any shape added up over all ranks of the mesh, in place."""
        for axis in range(self.mesh.ndim):
            torch.distributed.all_reduce(numbers, group=self.mesh.get_group(axis))
        return numbers


def total(weights: Sequence[MaskedWeight], squares: Tensor) -> Tensor:
    """Add up what each weight's parts have: one collective for all that lie on the same ranks.

    Args:
        weights: W of them.
        squares: float64 ``[W]``, one number each of this rank's part.

    Returns:
        float64 ``[W]``, of the whole weights.
    """
    by_ranks: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, weight in enumerate(weights):
        if weight.shard is not None:
            by_ranks[weight.shard.key].append(index)
    for members in by_ranks.values():
        shard = weights[members[0]].shard
        assert shard is not None
        own = squares[members]
        for group in shard.groups:
            torch.distributed.all_reduce(own, group=group)
        squares[members] = own
    return squares


def _reduce_scattered(whole: Tensor, axis: int, group: Any, ranks: int) -> Tensor:
    """The sum over ``group``, of which this rank's chunk along ``axis`` is returned, padded."""
    rows = whole.movedim(axis, 0)
    size = -(-rows.shape[0] // ranks)
    padded = rows.new_zeros(size * ranks, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    own = padded.new_empty(size, *rows.shape[1:])
    names = [n for n in _REDUCE_SCATTERS if hasattr(torch.distributed, n)]
    getattr(torch.distributed, names[0])(own, padded, group=group)
    return own.movedim(0, axis)


def _axis(placement: Any) -> int:
    """The axis of the tensor that a placement shards."""
    return int(placement.dim)


def _moved(placement: Any, transposed: bool) -> Any:
    """The placement of scores where the weight has ``placement``."""
    if not transposed or not placement.is_shard(1):
        return placement
    from torch.distributed.tensor import Shard as Sharded

    return Sharded(2)


def _refuse_cut_blocks(name: str, weight: DTensor, whole: BlockView) -> None:
    """Every rank decides by the same sizes, so that all refuse or none."""
    where = f"{name} {whole.shape} at {whole.nm}"
    mesh = weight.device_mesh
    ranks: dict[int, int] = defaultdict(lambda: 1)
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard():
            ranks[_axis(placement)] *= mesh.size(axis)
        elif not placement.is_replicate():
            raise PlanError(
                f"{where} is placed as {placement} on {mesh}; masks need weights that are sharded "
                "or replicated"
            )
    inputs = 0 if whole.transposed else 1
    for axis, n in ranks.items():
        chunk = -(-whole.shape[axis] // n)
        unit = 1
        if axis == inputs:
            unit = whole.channels if whole.transposed and whole.groups > 1 else whole.nm.of
        if axis > 1 or (n > 1 and chunk % unit):
            what = "positions of the kernel" if axis > 1 else f"{chunk} input channels"
            raise PlanError(
                f"{where} is sharded along axis {axis} over {n} ranks, {what} each, which cuts "
                f"blocks of {whole.nm.of}: shard it along axis {1 - inputs}, the output channels "
                f"(fully_shard(..., shard_placement_fn=lambda p: Shard({1 - inputs})), or "
                "ColwiseParallel), or keep it dense by a rule"
            )


def shard_of(mask: MaskedWeight, sharded: DTensor) -> Shard:
    """How the weight of a mask is cut.

    Args:
        mask: of which weight.
        sharded: its parameter.

    Raises:
        PlanError: if blocks would lie on two ranks, or its method needs whole weights.
    """
    refuse_whole(mask)
    return Shard(mask.name, sharded, mask.whole)


def refuse_whole(mask: MaskedWeight) -> None:
    """Let through a mask that can be made part by part.

    Raises:
        PlanError: if its method needs whole weights.
    """
    if mask.method.remembers or mask.method.guided:
        raise PlanError(
            f"{mask.name} {mask.whole.shape} is sharded, and its method {mask.method.name!r} goes "
            "by the whole weight: use 'spikenm', 'srste', 'magnitude' or 'cyclical', or do not "
            "shard it"
        )


def whole_of(tensor: Tensor) -> Tensor:
    """A whole tensor of any shape: of a DTensor what all ranks have of it, gathered."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part_of(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor of any shape: all of it but for a DTensor."""
    return local_part(tensor) if is_sharded(tensor) else tensor
