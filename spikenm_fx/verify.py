# SPDX-License-Identifier: Apache-2.0
"""An independent checker: counts non-zeros block by block, sharing no code with the masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from spikenm_fx.errors import PlanError, VerificationError, no_module, some_of
from spikenm_fx.pattern import NM, PatternLike, is_weight_layer, not_finite, quantised_weights
from spikenm_fx.plan import LayerPlan, Plan
from spikenm_fx.plan.weights import RAW
from spikenm_fx.table import html_table

__all__ = ["LayerCheck", "Verification", "verify"]

_SHOWN = 3  # violations listed per layer
_CANDIDATES = (2, 4, 8, 16, 32)  # block sizes among which an unknown pattern is looked for


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """What was counted in one weight.

    Attributes:
        name: qualified layer name.
        shape: of the weight.
        required: the pattern it must have, or None where none is required.
        found: the tightest pattern it has among blocks of 2, 4, 8, 16, 32; None for a dense weight
            and for one of nothing but zeros.
        density: share of non-zeros; NaN and infinity count as non-zero.
        blocks: blocks counted under ``required``.
        violations: blocks with more than ``required.keep`` non-zeros.
        first: positions of the first violations, ``(index..., non-zeros)``: the index is that of
            the weight with the channel axis moved last and cut into blocks.
        not_finite: weights that are NaN or infinite.
    """

    name: str
    shape: tuple[int, ...]
    required: NM | None
    found: NM | None
    density: float
    blocks: int
    violations: int
    first: tuple[tuple[int, ...], ...]
    not_finite: int = 0

    def __str__(self) -> str:
        found = f"density {self.density:.3f}, found {self.found or 'dense'}"
        return f"{self.name} {self._shape}: {found}, {self.judgement}"

    @property
    def _shape(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def judgement(self) -> str:
        """What was required and whether it holds, in words."""
        odd = f"; {self.not_finite} weights are NaN or infinite" if self.not_finite else ""
        if self.required is None:
            return "no pattern required of it" + odd
        if not self.violations:
            return f"{self.required} holds in all {self.blocks} blocks" + odd
        where = "; ".join(f"{list(p[:-1])} has {p[-1]}" for p in self.first)
        seen = f"{self.violations} of {self.blocks} blocks: {where}"
        return f"{self.required} VIOLATED in {seen}{odd}"


@dataclass(frozen=True, slots=True)
class Verification:
    """The counts of all weights that were looked at; true where they are valid.

    ``assert verify(model, "2:4")`` fails for a dense model.

    Attributes:
        layers: one entry per weight, in the model's order.
    """

    layers: tuple[LayerCheck, ...]

    @property
    def valid(self) -> bool:
        """No violation, and at least one weight that is N:M at all."""
        return not any(layer.violations for layer in self.layers) and any(
            layer.required or layer.found for layer in self.layers
        )

    def __bool__(self) -> bool:
        return self.valid

    def raise_if_invalid(self) -> None:
        """Nothing where the weights are valid.

        Raises:
            VerificationError: with the first violations; or if no weight is N:M at all.
        """
        if self.valid:
            return
        wrong = [layer for layer in self.layers if layer.violations]
        if wrong:
            listed = "\n  ".join(map(str, wrong[:5]))
            raise VerificationError(
                f"{len(wrong)} of {len(self.layers)} weights are not N:M:\n  {listed}\n"
                "fold(model) writes exact zeros, and writing to weights after that undoes them.  "
                "Layers that the plan keeps dense are passed over where the plan is given: "
                "verify(model, plan).  A model that still learns its masks is counted in the mode "
                "that it is in, and is always N:M in evaluation mode (model.eval()) only"
            )
        raise VerificationError(
            f"none of the {len(self.layers)} weights is N:M: is this the folded model or "
            "checkpoint? Name the required pattern to see what violates it: verify(model, '2:4')"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        layers = [
            {
                **asdict(layer),
                "required": layer.required and str(layer.required),
                "found": layer.found and str(layer.found),
            }
            for layer in self.layers
        ]
        return {"valid": self.valid, "layers": layers}

    def __str__(self) -> str:
        return "\n".join([self._head(), *map(str, self.layers)])

    def _repr_html_(self) -> str:
        rows = [("weight", "shape", "density", "found", "required")]
        for layer in self.layers:
            found = str(layer.found or "dense")
            rows.append((layer.name, layer._shape, f"{layer.density:.1%}", found, layer.judgement))
        return html_table(rows, caption=self._head())

    def _head(self) -> str:
        odd = [layer.name for layer in self.layers if layer.not_finite]
        return self._verdict() + (f"; NaN or infinite weights in {some_of(odd)}" if odd else "")

    def _verdict(self) -> str:
        if self.valid:
            asked = sum(layer.required is not None for layer in self.layers)
            return f"valid: {len(self.layers)} weights, a pattern is required of {asked}"
        broken = sum(layer.violations > 0 for layer in self.layers)
        why = f"{broken} of them violate their pattern" if broken else "none of them is N:M"
        return f"NOT VALID: {len(self.layers)} weights, {why}"


@torch.no_grad()
def verify(
    model: nn.Module | Mapping[str, Tensor],
    nm: PatternLike | Plan | Mapping[str, PatternLike] | None = None,
) -> Verification:
    """Count the non-zeros of every block of every Linear and Conv weight; changes nothing.

    Raw parameters (``F.linear(x, self.w)``) are counted where they carry a mask, or a plan names
    them.

    Args:
        model: a sparse, folded or plain model, or a state dict (ours or anybody's; weights of two
            and more dimensions under keys ``...weight``; input channels on axis 1, except where
            a mask or plan says otherwise).
        nm: what is required.  A plan, or a mapping from layer name to pattern: of exactly these
            layers.  One pattern: of all layers but the first and the last (which a default plan
            keeps dense; of two it keeps the last) and those whose channels it does not divide.
            None: of each masked layer its own pattern, of other weights nothing; what they have is
            reported.

    Raises:
        PatternError: for a malformed pattern.
        PlanError: if ``nm`` names a layer that is not there, ``model`` is no model, or
            its weights are quantised.
    """
    if not isinstance(model, nn.Module | Mapping):
        raise PlanError(
            f"{no_module('verify', model)}; a state dict will do as well, a file after "
            "spikenm_fx.checkpoint.load_state(path)"
        )
    quantised = quantised_weights(model) if isinstance(model, nn.Module) else []
    if quantised:
        raise PlanError(
            f"{quantised[0]} and {len(quantised) - 1} more hold quantised weights, whose zeros "
            "verify() does not count; verify the folded model before torch quantises it"
        )
    weights = _of_model(model) if isinstance(model, nn.Module) else _of_state_dict(model)
    for entry in nm.sparse if isinstance(nm, Plan) else ():
        if entry.kind == RAW:
            weights.pop(entry.name.removesuffix(".weight"), None)  # a layer's, judged by the key
            weights |= _planned(model, entry)
        elif entry.name in weights:  # blocks lie along the axis that its use sums over
            known = weights[entry.name]
            weights[entry.name] = replace(known, transposed=entry.axis == 0, groups=entry.groups)
    required = _required(weights, nm)
    return Verification(tuple(_check(name, w, required.get(name)) for name, w in weights.items()))


@dataclass(frozen=True, slots=True)
class _Weight:
    tensor: Tensor
    transposed: bool = False
    groups: int = 1
    nm: NM | None = None
    not_finite: int = 0

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        shape = self.tensor.shape
        return shape[0] // self.groups if self.transposed else shape[1]

    def channels_last(self) -> Tensor:
        """Non-zeros with the input channels of one group as last axis."""
        nonzero: Tensor = self.tensor != 0
        if self.transposed:
            nonzero = nonzero.reshape(self.groups, -1, *nonzero.shape[1:])
        return nonzero.movedim(1, -1)


def _of_model(model: nn.Module) -> dict[str, _Weight]:
    weights = {}
    for name, layer in nn.Module.named_modules(model):
        weight = _weight_of(layer) if is_weight_layer(layer) else None
        if weight is None or weight.dim() < 2:
            continue
        transposed = bool(getattr(layer, "transposed", False))
        groups = int(getattr(layer, "groups", 1)) if transposed else 1
        meta = getattr(layer, "weight_nm", None)
        nm = None if meta is None else NM(*meta.tolist()[1:3])
        # of a computed weight only where it is not zero: all of them are held at once
        counted = weight.detach() if isinstance(weight, nn.Parameter) else weight != 0
        weights[name] = _Weight(counted, transposed, groups, nm, not_finite(weight))
    return weights | _masked_parameters(model)


def _masked_parameters(model: nn.Module) -> dict[str, _Weight]:
    """Raw parameters that carry a mask, which their module's class tells."""
    found = {}
    for name, module in nn.Module.named_modules(model):
        for key, _ in nn.Module.named_parameters(module, recurse=False):
            layer = key == "weight" and is_weight_layer(module)
            if not layer and isinstance(getattr(type(module), f"{key}_nm", None), property):
                weight = _by_meta(getattr(module, key), getattr(module, f"{key}_nm"))
                found[f"{name}.{key}".lstrip(".")] = weight
    return found


def _planned(model: nn.Module | Mapping[str, Tensor], entry: LayerPlan) -> dict[str, _Weight]:
    """A raw parameter that a plan names; nothing where it is not there."""
    if not isinstance(model, nn.Module):
        tensor = model.get(entry.name)
    else:
        owner, key = entry.holder(model)
        tensor = getattr(owner, key, None)
    if not isinstance(tensor, Tensor):
        return {}
    odd = not_finite(tensor)
    return {entry.name: _Weight(tensor.detach(), entry.axis == 0, entry.groups, None, odd)}


def _by_meta(tensor: Tensor, meta: Tensor) -> _Weight:
    _, keep, of, _, _, axis, groups, *_ = meta.tolist()
    return _Weight(tensor.detach(), axis == 0, groups, NM(keep, of), not_finite(tensor))


def _weight_of(layer: nn.Module) -> Tensor | None:
    if not is_parametrized(layer, "weight"):
        weight = getattr(layer, "weight", None)
        usable = isinstance(weight, Tensor) and not isinstance(weight, UninitializedParameter)
        return weight if usable else None
    # some parametrizations (spectral_norm) change their buffers at each access: ask a copy
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    with torch.random.fork_rng(devices=[]):
        computed: Tensor = copy.deepcopy(layer.parametrizations["weight"])()
    return computed


def _of_state_dict(state: Mapping[str, Tensor]) -> dict[str, _Weight]:
    weights: dict[str, _Weight] = {}
    for key, tensor in state.items():
        name, _, last = key.rpartition(".")
        meta = state.get(key + "_nm")
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            continue
        if last != "weight":  # a raw parameter: only a mask tells it from others
            weights |= {} if meta is None else {key: _by_meta(tensor, meta)}
        else:
            plain = _Weight(tensor.detach(), not_finite=not_finite(tensor))
            weights[name] = plain if meta is None else _by_meta(tensor, meta)
    return weights


def _required(
    weights: Mapping[str, _Weight], nm: PatternLike | Plan | Mapping[str, PatternLike] | None
) -> dict[str, NM]:
    if nm is None:
        return {name: weight.nm for name, weight in weights.items() if weight.nm}
    if isinstance(nm, Plan):
        nm = {layer.name: layer.nm for layer in nm.sparse if layer.nm}
    if isinstance(nm, Mapping):
        missing = [name for name in nm if name not in weights]
        if missing:
            raise PlanError(f"layer {missing[0]!r} is not among the weights: {list(weights)[:10]}")
        return {name: NM.parse(pattern) for name, pattern in nm.items()}
    pattern = NM.parse(nm)
    inner = list(weights)[1:-1] or list(weights)[:1]
    return {name: pattern for name in inner if weights[name].channels % pattern.of == 0}


def _check(name: str, weight: _Weight, required: NM | None) -> LayerCheck:
    nonzero = weight.channels_last()
    total = nonzero.numel()
    blocks, violations = 0, 0
    first: tuple[tuple[int, ...], ...] = ()
    if required is not None:
        counts = _count(nonzero, required.of)
        over = counts > required.keep
        blocks, violations = counts.numel(), int(torch.count_nonzero(over))
        where = over.nonzero()[:_SHOWN].tolist() if violations else []
        first = tuple((*index, int(counts[tuple(index)])) for index in where)
    return LayerCheck(
        name=name,
        shape=tuple(weight.tensor.shape),
        required=required,
        found=_tightest(nonzero),
        density=int(torch.count_nonzero(nonzero)) / total if total else 0.0,
        blocks=blocks,
        violations=violations,
        first=first,
        not_finite=weight.not_finite,
    )


def _count(nonzero: Tensor, of: int) -> Tensor:
    """Non-zeros per block of ``of`` along the last axis; the last block may be shorter."""
    missing = -nonzero.shape[-1] % of
    padded = torch.nn.functional.pad(nonzero, (0, missing)) if missing else nonzero
    counts = padded.new_zeros((*padded.shape[:-1], padded.shape[-1] // of), dtype=torch.int16)
    for position in range(of):  # faster than a sum over a short axis, and in a byte or two
        counts += padded[..., position::of]
    return counts


def _tightest(nonzero: Tensor) -> NM | None:
    found: list[NM] = []
    if not nonzero.any():
        return None  # zeros throughout are no pattern that anybody learnt
    for of in _CANDIDATES:
        if nonzero.numel() and nonzero.shape[-1] % of == 0:
            most = int(_count(nonzero, of).max())
            if most < of:
                found.append(NM(max(most, 1), of))
    return min(found, key=lambda nm: (nm.density, nm.of), default=None)
