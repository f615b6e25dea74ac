# SPDX-License-Identifier: Apache-2.0
"""The plan: every weight layer of a model, once, with what will be done to it and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.parameter import UninitializedParameter

from spikenm_fx.errors import PatternError, PlanError
from spikenm_fx.pattern import NM, BlockView, PatternLike, Remainder, is_weight_layer
from spikenm_fx.plan.rules import Rule, unmatched

__all__ = ["LayerPlan", "Plan", "plan"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The decision for one layer.

    Attributes:
        name: qualified name.
        kind: the torch class the layer is or inherits from, e.g. ``"Conv2d"``.
        shape: of its weight; empty where the layer has none yet.
        action: what ``sparsify`` will do.
        nm: the pattern, None where the layer stays dense.
        padded: True where the last block is shorter than the others.
        reason: why.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    action: Literal["sparsify", "keep_dense"]
    nm: NM | None
    padded: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one model, in module order.

    Attributes:
        model: class name of the model.
        layers: one entry for each Linear or Conv in the module tree.
    """

    model: str
    layers: tuple[LayerPlan, ...]

    @property
    def sparse(self) -> tuple[LayerPlan, ...]:
        """The layers that become N:M."""
        return tuple(layer for layer in self.layers if layer.action == "sparsify")

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        layers = [{**asdict(layer), "nm": layer.nm and str(layer.nm)} for layer in self.layers]
        return {"model": self.model, "layers": layers}

    def __str__(self) -> str:
        rows = [("layer", "kind", "weight", "pattern", "reason")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape)) or "-"
            rows.append((layer.name, layer.kind, shape, str(layer.nm or "dense"), layer.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
        head = f"{self.model}: {len(self.sparse)} of {len(self.layers)} weight layers become N:M"
        return "\n".join([head, *(line.rstrip() for line in lines)])


def plan(
    model: nn.Module,
    nm: PatternLike = "2:4",
    *,
    rules: Iterable[Rule] = (),
    remainder: Remainder = "skip",
) -> Plan:
    """Decide for every Linear and Conv of ``model`` whether it becomes N:M; changes nothing.

    Kept dense by default, and turned on by a rule that names them: the layer that sees the analog
    input, depthwise convolutions, and the classifier head.

    Args:
        model: any module; layers are found by inheritance, whatever framework they come from.
        nm: pattern, keep at most n of m consecutive input channels.
        rules: ordered; the first that matches a layer decides, ``"ignore"`` wins over all.
        remainder: where ``m`` does not divide the input channels: ``"skip"`` the layer, ``"pad"``
            (the last, shorter block keeps at most n too), or raise an ``"error"``.

    Raises:
        PatternError: for a malformed pattern, or a remainder under policy ``"error"``.
        PlanError: if a rule matches nothing, or if no layer at all would become N:M.
    """
    pattern = NM.parse(nm)
    if remainder not in get_args(Remainder):
        raise PlanError(f"remainder {remainder!r} is not one of {get_args(Remainder)}")
    layers = {name: module for name, module in model.named_modules() if is_weight_layer(module)}
    ordered = tuple(rules)
    for rule in ordered:
        if not any(rule.matches(name, layer) for name, layer in layers.items()):
            raise unmatched(rule, layers)
    roles = _default_roles(layers)
    decisions = _Decisions(model, layers, pattern, remainder, ordered)
    entries = decisions.all(roles)
    if not any(entry.nm for entry in entries):
        # a network with one hidden layer: better its input layer than nothing at all
        entries = decisions.all({n: why for n, why in roles.items() if why != _INPUT})
    result = Plan(type(model).__name__, entries)
    if not result.sparse:
        raise PlanError(_nothing_to_do(result, pattern))
    return result


_INPUT = "sees the analog input"
_HEAD = "classifier head"


def _default_roles(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers kept dense unless a rule names them, by their place in the module tree."""
    names = list(layers)
    return {names[-1]: _HEAD, names[0]: _INPUT} if names else {}


class _Decisions:
    """Rules, defaults and hard limits, applied to each layer.

    Precedence: impossible > ignored > first matching rule > default role > the plan's pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        nm: NM,
        remainder: Remainder,
        rules: tuple[Rule, ...],
    ) -> None:
        self.layers, self.nm, self.remainder, self.rules = layers, nm, remainder, rules
        self.sharing = _sharing(model, layers)

    def all(self, roles: Mapping[str, str]) -> tuple[LayerPlan, ...]:
        entries = {name: self.one(name, layer, roles) for name, layer in self.layers.items()}
        for name, (others, why_not) in self.sharing.items():
            dense = next((o for o in others if entries[o].nm != entries[name].nm), None)
            if entries[name].nm and (why_not or dense):
                why = why_not or f"shares its weight with {dense}, which differs"
                entries[name] = self.dense(name, self.layers[name], why)
        return tuple(entries.values())

    def one(self, name: str, layer: nn.Module, roles: Mapping[str, str]) -> LayerPlan:
        impossible = _impossible(layer)
        if impossible:
            return self.dense(name, layer, impossible)
        matching = [rule for rule in self.rules if rule.matches(name, layer)]
        ignored = next((rule for rule in matching if rule.action == "ignore"), None)
        rule = ignored or (matching[0] if matching else None)
        if rule is None and name in roles:
            return self.dense(name, layer, roles[name])
        if rule is not None and rule.action != "sparsify":
            return self.dense(name, layer, rule.reason or f"rule {rule.match!r}: {rule.action}")
        nm = (rule and rule.pattern) or self.nm
        reason = "default" if rule is None else rule.reason or f"rule {rule.match!r}"
        return self.sparse(name, layer, nm, (rule and rule.remainder) or self.remainder, reason)

    def sparse(
        self, name: str, layer: nn.Module, nm: NM, remainder: Remainder, reason: str
    ) -> LayerPlan:
        view = BlockView.of_layer(layer, nm, name=name)
        depthwise = view.channels == 1
        if depthwise:
            return self.dense(name, layer, "depthwise: one input channel per output")
        if view.remainder:
            seen = f"{view.channels} input channels are not a multiple of {nm.of}"
            if remainder == "error":
                raise PatternError(
                    f"{name} {view.shape} at {nm}: {seen}; choose remainder='pad' or 'skip', "
                    "or give the layer a pattern of its own by a rule"
                )
            if remainder == "skip":
                return self.dense(name, layer, seen)
            reason += f"; {seen}: last block padded"
        return LayerPlan(
            name, _kind(layer), view.shape, "sparsify", nm, bool(view.remainder), reason
        )

    def dense(self, name: str, layer: nn.Module, reason: str) -> LayerPlan:
        return LayerPlan(name, _kind(layer), _shape(layer), "keep_dense", None, False, reason)


def _impossible(layer: nn.Module) -> str | None:
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, a parametrization), not a parameter"
    if isinstance(weight, UninitializedParameter):
        return "lazy: run one forward pass before planning"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    return "its weight is empty" if weight.numel() == 0 else None


def _sharing(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, tuple[list[str], str | None]]:
    """Layers whose Parameter others hold too: who they are, and why one mask cannot serve all."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders[id(parameter)].append((name, module, key))
    sharing: dict[str, tuple[list[str], str | None]] = {}
    for held in holders.values():
        users = [name for name, _, key in held if name in layers and key == "weight"]
        if len(held) == 1 or not users:
            continue
        foreign = [f"{name}.{key}" for name, _, key in held if name not in users or key != "weight"]
        views = {
            BlockView.of_layer(layers[name], NM(1, 1))
            for name in users
            if not _impossible(layers[name])
        }
        why_not = (
            f"shares its weight with {foreign[0]}, which is not a weight layer"
            if foreign
            else "shares its weight with a layer of another kind"
            if len(views) > 1
            else None
        )
        for name in users:
            sharing[name] = ([other for other in users if other != name], why_not)
    return sharing


def _kind(layer: nn.Module) -> str:
    return next(c.__name__ for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))


def _shape(layer: nn.Module) -> tuple[int, ...]:
    weight = getattr(layer, "weight", None)
    return (
        () if weight is None or isinstance(weight, UninitializedParameter) else tuple(weight.shape)
    )


def _nothing_to_do(result: Plan, nm: NM) -> str:
    if not result.layers:
        return (
            f"{result.model} holds no Linear or Conv module, so nothing can become {nm}; "
            "pass the module that holds the weight layers"
        )
    seen = "\n  ".join(
        f"{layer.name or '(the model itself)'} {layer.kind} {layer.shape}: {layer.reason}"
        for layer in result.layers[:20]
    )
    return (
        f"none of the {len(result.layers)} weight layers of {result.model} would become {nm}:\n"
        f"  {seen}\nturn one on by a rule, e.g. rules=[Rule({result.layers[0].name!r})], or choose "
        "another pattern or remainder='pad'"
    )
