# SPDX-License-Identifier: Apache-2.0
"""The decision for one layer: rules, roles and what is possible at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from spikenm_fx.errors import PatternError
from spikenm_fx.pattern import NM, BlockView, Remainder
from spikenm_fx.plan.roles import Role
from spikenm_fx.plan.rules import Rule
from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["Decisions", "LayerPlan"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The decision for one layer.

    Attributes:
        name: qualified name.
        kind: the torch class the layer is or inherits from, e.g. ``"Conv2d"``.
        shape: of its weight; empty where the layer has none yet, or computes it.
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


class Decisions:
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
        graph: SpikingGraph | None,
    ) -> None:
        self.layers, self.nm, self.remainder, self.rules = layers, nm, remainder, rules
        self.graph = graph
        self.sharing = _sharing(model, layers)

    def why(self, name: str) -> str:
        """What the graph knows of a layer that nothing keeps dense."""
        record = self.graph.layers.get(name) if self.graph is not None else None
        return (
            self.graph.why(name)
            if self.graph is not None and record and record.calls
            else "default"
        )

    def all(self, roles: Mapping[str, Role]) -> tuple[LayerPlan, ...]:
        """One entry per layer, in module order."""
        entries = {name: self.one(name, layer, roles) for name, layer in self.layers.items()}
        for name, (others, why_not) in self.sharing.items():
            dense = next((o for o in others if entries[o].nm != entries[name].nm), None)
            if entries[name].nm and (why_not or dense):
                why = why_not or f"shares its weight with {dense}, which differs"
                entries[name] = self.dense(name, self.layers[name], why)
        return tuple(entries.values())

    def one(self, name: str, layer: nn.Module, roles: Mapping[str, Role]) -> LayerPlan:
        """The decision for one layer, regardless of who shares its weight."""
        impossible = _impossible(layer)
        if impossible:
            return self.dense(name, layer, impossible)
        matching = [rule for rule in self.rules if rule.matches(name, layer)]
        ignored = next((rule for rule in matching if rule.action == "ignore"), None)
        rule = ignored or (matching[0] if matching else None)
        if rule is None and name in roles:
            return self.dense(name, layer, roles[name].reason)
        if rule is not None and rule.action != "sparsify":
            return self.dense(name, layer, rule.reason or f"rule {rule.match!r}: {rule.action}")
        nm = (rule and rule.pattern) or self.nm
        reason = self.why(name) if rule is None else rule.reason or f"rule {rule.match!r}"
        return self.sparse(name, layer, nm, (rule and rule.remainder) or self.remainder, reason)

    def sparse(
        self, name: str, layer: nn.Module, nm: NM, remainder: Remainder, reason: str
    ) -> LayerPlan:
        """N:M if the shape allows."""
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
        """Stays as it is."""
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
    # a computed weight is not asked for: computing may change buffers (spectral_norm)
    weight = layer._parameters.get("weight", layer.__dict__.get("weight"))
    if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter):
        return ()
    return tuple(weight.shape)
