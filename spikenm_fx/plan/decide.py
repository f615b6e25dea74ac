# SPDX-License-Identifier: Apache-2.0
"""The decision for one weight: rules, roles and what is possible at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from spikenm_fx.errors import PatternError, PlanError
from spikenm_fx.pattern import NM, BlockView, Remainder
from spikenm_fx.plan.roles import DefaultRole
from spikenm_fx.plan.rules import Rule
from spikenm_fx.plan.weights import RAW, Weight
from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["Decisions", "LayerPlan"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The decision for one weight.

    Attributes:
        name: qualified name: of the layer; of the parameter where a raw one is used.
        kind: the torch class the layer is or inherits from, e.g. ``"Conv2d"``; ``"Parameter"``
            for a raw parameter.
        shape: of its weight; empty where the layer has none yet, or computes it.
        action: what ``sparsify`` will do.
        nm: the pattern, None where the layer stays dense.
        padded: True where the last block is shorter than the others.
        reason: why.
        axis: the weight's axis of input channels, along which blocks lie.
        groups: the groups that share axis 0 (transposed convolutions).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    action: Literal["sparsify", "keep_dense"]
    nm: NM | None
    padded: bool
    reason: str
    axis: int = 1
    groups: int = 1

    def holder(self, model: nn.Module) -> tuple[nn.Module, str]:
        """The module of ``model`` that holds the weight, and its key there.

        Raises:
            AttributeError: if ``model`` has no such module.
        """
        owner, _, key = self.name.rpartition(".") if self.kind == RAW else (self.name, "", "weight")
        return model.get_submodule(owner), key

    def subject(self, model: nn.Module) -> nn.Module | Tensor | None:
        """What a rule's class means in ``model``: the layer, or the raw parameter itself."""
        return self.find(model) if self.kind == RAW else self.holder(model)[0]

    def find(self, model: nn.Module) -> Tensor | None:
        """The weight parameter in ``model``; None where there is none of this name."""
        try:
            module, key = self.holder(model)
        except AttributeError:
            return None
        return module._parameters.get(key)


class Decisions:
    """Rules, defaults and hard limits, applied to each weight.

    Precedence: impossible > ignored > first matching rule > default role > the plan's pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Weight],
        nm: NM,
        remainder: Remainder,
        rules: tuple[Rule, ...],
        graph: SpikingGraph | None,
    ) -> None:
        self.weights, self.nm, self.remainder, self.rules = weights, nm, remainder, rules
        self.graph = graph
        self.sharing = _sharing(model, weights)

    def why(self, name: str) -> str:
        """What the graph knows of a layer that nothing keeps dense."""
        record = self.graph.record(name) if self.graph is not None else None
        if self.graph is None or record is None:
            return "default"
        return self.graph.why(name) if record.calls or self.graph.ran else "default"

    def all(self, roles: Mapping[str, DefaultRole]) -> tuple[LayerPlan, ...]:
        """One entry per weight, in their order."""
        entries = {name: self.one(weight, roles) for name, weight in self.weights.items()}
        for name, (others, why_not) in self.sharing.items():
            dense = next((o for o in others if entries[o].nm != entries[name].nm), None)
            if entries[name].nm and (why_not or dense):
                why = why_not or f"shares its weight with {dense}, which differs"
                entries[name] = self.dense(self.weights[name], why)
        self.refuse_rules_in_vain(entries)
        return tuple(entries.values())

    def refuse_rules_in_vain(self, entries: Mapping[str, LayerPlan]) -> None:
        """A rule that states a pattern must be able to give it to one weight at least.

        Raises:
            PlanError: for one that only weights match which no rule can change.
        """
        for rule in self.rules:
            if rule.action != "sparsify" or rule.nm is None:
                continue
            decided = [name for name, weight in self.weights.items() if self.rule(weight) is rule]
            if decided and not any(self.can_change(name) for name in decided):
                seen = "; ".join(f"{name}: {entries[name].reason}" for name in decided[:3])
                raise PlanError(
                    f"rule {rule.match!r} asks for {rule.pattern} and cannot have it: "
                    f"{seen}. Take the rule out, or give such weights action='keep_dense'"
                )

    def rule(self, weight: Weight) -> Rule | None:
        """The rule that decides ``weight``: ignore before all others, else the first to match."""
        matching = [rule for rule in self.rules if rule.matches(weight.name, weight.subject)]
        ignored = next((rule for rule in matching if rule.action == "ignore"), None)
        return ignored or (matching[0] if matching else None)

    def can_change(self, name: str) -> bool:
        """Whether a rule could make the weight N:M, were its shape to allow it."""
        _, shared = self.sharing.get(name, ((), None))
        return not self.weights[name].impossible and not shared

    def one(self, weight: Weight, roles: Mapping[str, DefaultRole]) -> LayerPlan:
        """The decision for one weight, regardless of who shares its parameter."""
        if weight.impossible:
            return self.dense(weight, weight.impossible)
        rule = self.rule(weight)
        if rule is None and weight.name in roles:
            return self.dense(weight, roles[weight.name].reason)
        if rule is not None and rule.action != "sparsify":
            return self.dense(weight, rule.reason or f"rule {rule.match!r}: {rule.action}")
        nm = (rule and rule.pattern) or self.nm
        reason = self.why(weight.name) if rule is None else rule.reason or f"rule {rule.match!r}"
        return self.sparse(weight, nm, (rule and rule.remainder) or self.remainder, reason)

    def sparse(self, weight: Weight, nm: NM, remainder: Remainder, reason: str) -> LayerPlan:
        """The entry of a weight that becomes N:M, if its shape allows.

        Raises:
            PatternError: for channels that are left over where ``remainder`` is ``"error"``.
        """
        view = BlockView(nm, weight.shape, weight.axis == 0, weight.groups)
        if view.channels == 1:
            return self.dense(weight, _one_channel(weight))
        if view.remainder:
            seen = f"{view.channels} input channels are not a multiple of {nm.of}"
            if remainder == "error":
                raise PatternError(
                    f"{weight.name} {view.shape} at {nm}: {seen}; choose remainder='pad' or "
                    "'skip', or give the layer a pattern of its own by a rule"
                )
            if remainder == "skip":
                return self.dense(weight, seen)
            reason += f"; {seen}: last block padded"
        if weight.kind == RAW:
            reason += "; raw parameter: learns without EID"
        return self.entry(weight, nm, bool(view.remainder), reason)

    def possible(self, remainder: Remainder) -> list[tuple[str, Weight]]:
        """Weights that a rule could make N:M, whatever keeps them dense now."""
        return [
            (name, weight)
            for name, weight in self.weights.items()
            if self.can_change(name) and self.sparse(weight, self.nm, remainder, "").nm
        ]

    def dense(self, weight: Weight, reason: str) -> LayerPlan:
        """The entry of a weight that stays as it is."""
        return self.entry(weight, None, False, reason)

    def entry(self, weight: Weight, nm: NM | None, padded: bool, reason: str) -> LayerPlan:
        """The line of the plan for ``weight``."""
        return LayerPlan(
            weight.name,
            weight.kind,
            weight.shape,
            "keep_dense" if nm is None else "sparsify",
            nm,
            padded,
            reason,
            weight.axis,
            weight.groups,
        )


def _one_channel(weight: Weight) -> str:
    depthwise = getattr(weight.holder, "groups", 1) > 1
    kind = "depthwise: one input channel per output" if depthwise else "one input channel"
    return f"{kind}: a block would hold a single weight"


def _sharing(
    model: nn.Module, weights: Mapping[str, Weight]
) -> dict[str, tuple[list[str], str | None]]:
    """Weights whose Parameter others hold too: who they are, and why one mask cannot serve all."""
    places = {(id(weight.holder), weight.key): weight for weight in weights.values()}
    holders: dict[int, list[tuple[str, Weight | None]]] = defaultdict(list)
    for name, module in nn.Module.named_modules(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                weight = places.get((id(module), key))
                holders[id(parameter)].append((f"{name}.{key}", weight))
    sharing: dict[str, tuple[list[str], str | None]] = {}
    for held in holders.values():
        users = [weight for _, weight in held if weight is not None]
        if len(held) == 1 or not users:
            continue
        foreign = [place for place, weight in held if weight is None]
        why_not = (
            f"shares its weight with {foreign[0]}, which is not a weight layer"
            if foreign
            else "shares its weight with a layer of another kind"
            if len({(weight.axis, weight.groups) for weight in users}) > 1
            else None
        )
        for weight in users:
            sharing[weight.name] = ([o.name for o in users if o is not weight], why_not)
    return sharing
