# SPDX-License-Identifier: Apache-2.0
"""N:M patterns, and the one place that views a weight as blocks of M along its reduction axis.

``n:m`` always means *keep at most n of m*.  A block is ``of`` consecutive input channels at one
output channel and one kernel position, the axis that ASP, TensorRT and cuSPARSELt use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from spikenm_fx._torch import ConvNd, ConvTransposeNd
from spikenm_fx.errors import PatternError

__all__ = [
    "NM",
    "BlockView",
    "PatternLike",
    "Remainder",
    "WeightLayer",
    "is_weight_layer",
    "not_finite",
    "quantised_weights",
    "tightest",
    "torch_class",
]

Remainder = Literal["skip", "pad", "error"]
"""What to do where ``of`` does not divide the input channels."""

WeightLayer: TypeAlias = nn.Linear | ConvNd
"""The layers whose weight can be N:M; subclasses of any framework included."""


def is_weight_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a Linear or Conv of any kind: by inheritance, never by exact type."""
    return isinstance(module, nn.Linear | ConvNd)


def quantised_weights(model: nn.Module) -> list[str]:
    """Names of layers and parameters whose weights torch has quantised: no floats to be zeros of.

    Layers are those of ``torch.ao.nn.quantized`` and its like, by inheritance.
    """
    modules = list(nn.Module.named_modules(model))
    of_torch = re.compile(r"torch\..*\.quantized\.")
    layers = [n for n, m in modules if any(of_torch.match(c.__module__) for c in type(m).__mro__)]
    return layers + [n for n, p in nn.Module.named_parameters(model) if p.is_quantized]


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch that ``module`` is of or inherits from first; its own where none is."""
    classes = (c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules."))
    return next((c for c in classes if c is not nn.Module), type(module))


@dataclass(frozen=True, slots=True)
class NM:
    """The pattern *keep at most* ``keep`` *of* ``of`` consecutive input channels.

    Raises:
        PatternError: unless both are integers with ``1 <= keep <= of``.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        for value in (self.keep, self.of):
            if isinstance(value, bool) or not isinstance(value, int):
                raise PatternError(
                    f"pattern {self.keep!r}:{self.of!r}: both must be integers, e.g. NM(2, 4)"
                )
        if not 1 <= self.keep <= self.of:
            raise PatternError(
                f"pattern {self.keep}:{self.of}: n:m keeps at most n of m and needs 1 <= n <= m; "
                "write e.g. '2:4' to keep two of four"
            )

    @classmethod
    def parse(cls, pattern: PatternLike) -> Self:
        """Read ``"2:4"``, ``(2, 4)`` or an ``NM``.

        Raises:
            PatternError: for anything else; the integer that YAML 1.1 makes of an unquoted ``2:4``
                is explained.
        """
        if isinstance(pattern, cls):
            return pattern
        if isinstance(pattern, str):
            found = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", pattern, re.ASCII)
            if found is None:
                raise PatternError(
                    f"pattern {pattern!r} is not of the form 'n:m'; "
                    "write e.g. '2:4' to keep at most two of four"
                )
            return cls(int(found[1]), int(found[2]))
        if isinstance(pattern, tuple) and len(pattern) == 2:
            return cls(*pattern)
        if isinstance(pattern, int) and not isinstance(pattern, bool):
            hint = (
                f"; YAML reads an unquoted {pattern // 60}:{pattern % 60} as the number {pattern}: "
                f"quote it, '{pattern // 60}:{pattern % 60}'"
                if 60 < pattern < 3600
                else ""
            )
            raise PatternError(
                f"pattern {pattern!r} is an integer; a pattern is the string 'n:m'{hint}"
            )
        raise PatternError(
            f"pattern {pattern!r} is a {type(pattern).__name__}; give a string such as '2:4', "
            "a pair (2, 4) or NM(2, 4)"
        )

    @property
    def density(self) -> float:
        """The largest share of weights that stays."""
        return self.keep / self.of

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def describe(self) -> str:
        """The pattern with its meaning, for wherever it is printed or stored for people."""
        return f"{self.keep}:{self.of} (keep at most {self.keep} of {self.of})"


PatternLike: TypeAlias = NM | str | tuple[int, int]


@dataclass(frozen=True, slots=True)
class BlockView:
    """How one weight is viewed as blocks of ``of`` along its reduction (input-channel) axis.

    The blocked shape is ``(lead, of, inner)``: axis 1 runs inside a block.  For every layer kind
    it is a view of the weight (no copy) unless the last block must be padded:

    * Linear ``(O, C)``             -> ``(O * C/M, M, 1)``
    * Conv ``(O, C/groups, *k)``    -> ``(O * C/groups/M, M, prod(k))``
    * ConvTranspose ``(C, O/groups, *k)`` -> ``(C/M, M, O/groups * prod(k))``, blocks staying inside
      a group of input channels.

    Attributes:
        nm: the pattern.
        shape: the weight's shape.
        transposed: True where the input channels are axis 0 (ConvTranspose).
        groups: groups that share axis 0 (only meaningful where ``transposed``).
    """

    nm: NM
    shape: tuple[int, ...]
    transposed: bool = False
    groups: int = 1

    @classmethod
    def of_layer(cls, layer: nn.Module, nm: NM, *, name: str = "layer") -> Self:
        """The view of ``layer.weight``.

        Raises:
            PatternError: if ``layer`` is not a Linear or Conv.
        """
        if not isinstance(layer, nn.Linear | ConvNd):
            raise PatternError(
                f"{name} is a {type(layer).__name__}; blocks are defined for Linear, Conv1d/2d/3d "
                "and ConvTranspose1d/2d/3d"
            )
        transposed = isinstance(layer, ConvTransposeNd)
        groups = layer.groups if isinstance(layer, ConvTransposeNd) else 1
        return cls(nm, tuple(layer.weight.shape), transposed, groups)

    @property
    def channels(self) -> int:
        """Input channels that one output sees: the length of the axis that is cut into blocks."""
        return self.shape[0] // self.groups if self.transposed else self.shape[1]

    @property
    def remainder(self) -> int:
        """Channels left over after the last whole block."""
        return self.channels % self.nm.of

    @property
    def padding(self) -> int:
        """Channels that are missing to fill the last block."""
        return -self.channels % self.nm.of

    @property
    def blocked_shape(self) -> tuple[int, int, int]:
        """``(lead, of, inner)`` with the padding counted in."""
        blocks = (self.channels + self.padding) // self.nm.of
        if self.transposed:
            return (self.groups * blocks, self.nm.of, math.prod(self.shape[1:]))
        return (self.shape[0] * blocks, self.nm.of, math.prod(self.shape[2:]))

    def to_blocks(self, weight: Tensor, *, fill: float = 0.0) -> Tensor:
        """View ``weight`` as ``(lead, of, inner)``; missing channels hold ``fill``.

        Args:
            weight: tensor of ``self.shape`` (a weight, a gradient, a mask).
            fill: value of the channels that pad the last block.

        Raises:
            PatternError: if the shape is another one.
        """
        if tuple(weight.shape) != self.shape:
            raise PatternError(
                f"a tensor of shape {tuple(weight.shape)} was given; this view is of {self.shape}"
            )
        m = self.nm.of
        if not weight.numel():  # a rank may hold nothing of a weight
            return weight.reshape(self.blocked_shape)
        if self.transposed:
            split = rearrange(weight, "(g c) ... -> g c ...", g=self.groups)
            split = _pad_axis1(split, self.padding, fill)
            return rearrange(split, "g (b m) ... -> (g b) m (...)", m=m)
        weight = _pad_axis1(weight, self.padding, fill)
        return rearrange(weight, "o (b m) ... -> (o b) m (...)", m=m)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The inverse of :meth:`to_blocks`: drop the padding, restore the weight's shape.

        Raises:
            PatternError: if ``blocks`` is not of ``self.blocked_shape``.
        """
        if tuple(blocks.shape) != self.blocked_shape:
            raise PatternError(
                f"blocks of shape {tuple(blocks.shape)} were given; "
                f"a weight {self.shape} at {self.nm} has blocks of {self.blocked_shape}"
            )
        if not blocks.numel():
            return blocks.reshape(self.shape)
        if self.transposed:
            split = rearrange(blocks, "(g b) m i -> g (b m) i", g=self.groups)
            return split[:, : self.channels].reshape(self.shape)
        split = rearrange(blocks, "(o b) m i -> o (b m) i", o=self.shape[0])
        return split[:, : self.channels].reshape(self.shape)

    def output_major(self, weight: Tensor) -> Tensor:
        """``(C_out, C_in / groups, *kernel)`` of a tensor of ``self.shape``, as every kind has it.

        Args:
            weight: of a transposed convolution the output channels come second, by groups.
        """
        if not self.transposed:
            return weight
        split: Tensor = weight.unflatten(0, (self.groups, -1))
        return split.transpose(1, 2).flatten(0, 1)

    def rows(self, blocks: Tensor) -> Tensor:
        """Blocks ``(lead, of, inner)`` by output channel: ``(C_out, blocks of one output, of)``."""
        of = self.nm.of
        if self.transposed:
            outputs, kernel = self.shape[1], math.prod(self.shape[2:])
            pattern = "(g b) m (o k) -> (g o) (b k) m"
            return rearrange(blocks, pattern, g=self.groups, m=of, o=outputs, k=kernel)
        return rearrange(blocks, "(o b) m k -> o (b k) m", o=self.shape[0], m=of)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: blocks of ``self.blocked_shape``.

        Args:
            rows: ``(C_out, blocks of one output, of)``.
        """
        if self.transposed:
            outputs, kernel = self.shape[1], math.prod(self.shape[2:])
            pattern = "(g o) (b k) m -> (g b) m (o k)"
            return rearrange(rows, pattern, g=self.groups, o=outputs, k=kernel)
        return rearrange(rows, "o (b k) m -> (o b) m k", k=self.blocked_shape[2])

    def packed_bytes(self, element_size: int) -> int:
        """Bytes of the kept values and their indices of ``ceil(log2(of))`` bits."""
        lead, of, inner = self.blocked_shape
        kept = lead * self.nm.keep * inner
        return kept * element_size - (-kept * (of - 1).bit_length() // 8)

    def present(self, device: torch.device | None = None) -> Tensor | None:
        """Which positions of a block exist: bool ``(lead, of, 1)``, or None where all do."""
        if not self.padding:
            return None
        lead, m, _ = self.blocked_shape
        blocks = lead // (self.groups if self.transposed else max(self.shape[0], 1))
        block = torch.arange(lead, device=device).remainder(blocks)
        position = torch.arange(m, device=device)
        return ((block[:, None] * m + position) < self.channels).unsqueeze(-1)


def tightest(
    weight: Tensor,
    patterns: Iterable[NM],
    *,
    transposed: bool = False,
    groups: int = 1,
    remainder: bool = False,
) -> NM | None:
    """The sparsest of ``patterns`` that the zeros of a weight obey; None where none is obeyed.

    Among equally sparse ones that of the smallest block wins: a 2:4 weight is also 4:8.

    Args:
        weight: ``(O, C / groups, *kernel)``, or ``(C, O / groups, *kernel)`` where ``transposed``;
            a mask will do.  NaN counts as non-zero.
        patterns: the candidates.
        transposed: the input channels are axis 0.
        groups: that share axis 0, where ``transposed``.
        remainder: try blocks that do not divide the channels, too; the last one is then shorter.
    """
    fullest: dict[int, int] = {}
    for nm in sorted(patterns, key=lambda nm: (nm.density, nm.of)):
        view = BlockView(nm, tuple(weight.shape), transposed, groups)
        if view.channels < nm.of or (view.remainder and not remainder):
            continue
        if nm.of not in fullest:
            fullest[nm.of] = _fullest_block(weight, view)
        if fullest[nm.of] <= nm.keep:
            return nm
    return None


def not_finite(tensor: Tensor) -> int:
    """How many numbers are NaN or infinite; a finite sum says at once that none is.

    Args:
        tensor: of any shape; integers and tensors without memory have none.
    """
    plain = tensor.detach()
    if not plain.is_floating_point() or plain.is_meta or bool(plain.sum().isfinite()):
        return 0
    return int(torch.count_nonzero(~plain.isfinite()))


def _fullest_block(weight: Tensor, view: BlockView) -> int:
    """Non-zeros of the fullest block: one row, which tells a dense weight, then millions a time."""
    if view.transposed:
        return _most(view.to_blocks(weight != 0))
    most = 0
    rest = weight[1:].split(max(1, 2**22 // max(1, weight[:1].numel())))
    for rows in (weight[:1], *rest):
        most = max(most, _most(BlockView(view.nm, tuple(rows.shape)).to_blocks(rows != 0)))
        if most == view.nm.of:
            break
    return most


def _most(nonzero: Tensor) -> int:
    if not nonzero.numel():
        return 0
    counts = torch.zeros_like(nonzero[:, 0], dtype=torch.int16)
    for position in range(nonzero.shape[1]):  # faster than a sum over a short axis
        counts += nonzero[:, position]
    return int(counts.amax())


def _pad_axis1(tensor: Tensor, padding: int, fill: float) -> Tensor:
    if not padding:
        return tensor
    return F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, padding], value=fill)
