# SPDX-License-Identifier: Apache-2.0
"""The plan: every weight layer of a model, once, with what will be done to it and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self, get_args

from torch import nn

from spikenm_fx._torch import is_scripted
from spikenm_fx.errors import PlanError, TraceError, no_module
from spikenm_fx.pattern import NM, PatternLike, Remainder
from spikenm_fx.plan.decide import Decisions, LayerPlan
from spikenm_fx.plan.roles import default_roles
from spikenm_fx.plan.rules import Rule, ordered_rules, unmatched
from spikenm_fx.plan.weights import weights_of
from spikenm_fx.table import html_table, text_table
from spikenm_fx.trace.api import trace
from spikenm_fx.trace.graph import SpikingGraph

__all__ = ["LayerPlan", "Plan", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one model, in module order.

    Attributes:
        model: class name of the model.
        layers: one entry for each Linear or Conv in the module tree, then one for each raw
            parameter that the trace saw multiplied with data.
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The plan that :meth:`to_dict` wrote, from JSON too: equal to the one that was written.

        Raises:
            PlanError: for anything else.
            PatternError: for a malformed pattern.
        """
        try:
            layers = tuple(_read_entry(entry) for entry in data["layers"])
            return cls(str(data["model"]), layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"this is no plan ({type(error).__name__}: {error}); give what Plan.to_dict() "
                "returned: {'model': ..., 'layers': [...]}"
            ) from error

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("layer", "kind", "weight", "pattern", "reason")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape)) or "-"
            rows.append((layer.name, layer.kind, shape, str(layer.nm or "dense"), layer.reason))
        return [*rows]

    def _head(self) -> str:
        return f"{self.model}: {len(self.sparse)} of {len(self.layers)} weight layers become N:M"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), caption=self._head())

    def __str__(self) -> str:
        return "\n".join([self._head(), *text_table(self._rows())])


def _read_entry(data: Mapping[str, Any]) -> LayerPlan:
    known = [field.name for field in fields(LayerPlan)]
    foreign = [key for key in data if key not in known]
    if foreign or data["action"] not in ("sparsify", "keep_dense"):
        raise PlanError(
            f"an entry of the plan reads {dict(data)}; it takes {', '.join(known)}, and its action "
            "is sparsify or keep_dense"
        )
    nm = data["nm"] and NM.parse(data["nm"])
    return LayerPlan(**{**data, "shape": tuple(data["shape"]), "nm": nm or None})


def plan(
    model: nn.Module,
    nm: PatternLike = "2:4",
    *,
    example_inputs: Any = None,
    graph: SpikingGraph | None = None,
    rules: Iterable[Rule] = (),
    remainder: Remainder = "skip",
) -> Plan:
    """Decide for every weight of ``model`` whether it becomes N:M; changes nothing.

    Weights are those of Linear and Conv modules, and raw parameters (``F.conv2d(x, self.w)``,
    ``x @ self.w``) that the trace sees multiplied with data, by the parameter's name.  Blocks of a
    raw parameter lie along the axis that its product sums over; it stays dense, with the reason,
    where that cannot be told or where zeros would not stay in place on the way to the product.

    Kept dense by default, and turned on by a rule that names them: the layer that multiplies the
    analog input, behind no other layer, and the head, whose output the model returns without a
    neuron or layer after it.  A layer that the forward does not use is planned like any other, so
    that examples leave none dense for it.  Depthwise convolutions stay dense: their blocks would
    hold one weight.  What a layer sees and feeds is read from the graph; where the code alone does
    not tell, the first and the last of the module tree stand for input and head.

    Args:
        model: any module; layers are found by inheritance, whatever framework they come from.
            Raw parameters need ``example_inputs``.
        nm: pattern, keep at most n of m consecutive input channels.
        example_inputs: as for :func:`spikenm_fx.trace`; without them the graph holds what the code
            alone tells.
        graph: a trace of this model, instead of tracing it here.
        rules: ordered; the first that matches a layer decides, ``"ignore"`` wins over all.
        remainder: where ``m`` does not divide the input channels: ``"skip"`` the layer, ``"pad"``
            (the last, shorter block keeps at most n too), or raise an ``"error"``.

    Raises:
        PatternError: for a malformed pattern, or a remainder under policy ``"error"``.
        PlanError: if ``model`` is no module, if a rule is none, matches nothing or states a
            pattern that none of its weights can have, or if no layer at all would become N:M.
        TraceError: if the model raises on the example inputs.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(no_module("plan", model))
    pattern = NM.parse(nm)
    if remainder not in get_args(Remainder):
        raise PlanError(f"remainder {remainder!r} is not one of {get_args(Remainder)}")
    ordered = ordered_rules(rules)
    if graph is None:
        graph = _read(model, example_inputs)
    weights = weights_of(model, graph)
    subjects = {name: weight.subject for name, weight in weights.items()}
    for rule in ordered:
        if not any(rule.matches(name, subject) for name, subject in subjects.items()):
            raise unmatched(rule, subjects)
    roles = default_roles(weights, graph)
    decisions = Decisions(model, weights, pattern, remainder, ordered, graph)
    entries = decisions.all(roles)
    sparse = [entry.name for entry in entries if entry.nm]
    if not ordered and all(_is_last(graph, name) for name in sparse):
        # a network with one hidden layer: better its input layer than nothing at all
        entries = decisions.all({n: role for n, role in roles.items() if role.place != "input"})
        why = "no other layer can become N:M, so the one behind the input does"
        if sparse:
            why = "only the last layer is another that can become N:M, so the first does too"
        entries = tuple(replace(e, reason=why) if e.nm and e.name in roles else e for e in entries)
    result = Plan(type(model).__name__, (*entries, *_hidden(model)))
    if not result.sparse:
        raise PlanError(_nothing_to_do(result, pattern, decisions))
    return result


def _is_last(graph: SpikingGraph | None, name: str) -> bool:
    """Whether no other layer comes after it, or none uses it in the forward that ran."""
    record = graph.record(name) if graph is not None else None
    if graph is None or record is None:
        return False
    return record.is_head or (not record.calls and graph.ran)


def _hidden(model: nn.Module) -> Iterator[LayerPlan]:
    """Weights that the script compiler has taken: listed, so that nobody misses them unawares."""
    for name, module in nn.Module.named_modules(model):
        kind = str(getattr(module, "original_name", ""))
        if not is_scripted(module) or not kind.startswith(("Linear", "Conv")):
            continue
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None:
            reason = "hidden in TorchScript: build the model with PYTORCH_JIT=0"
            shape = tuple(weight.shape)
            yield LayerPlan(name, kind, shape, "keep_dense", None, False, reason)


def _read(model: nn.Module, example_inputs: Any) -> SpikingGraph | None:
    """The graph; None where nothing was given to run and the code alone cannot be read."""
    if example_inputs is not None:
        return trace(model, example_inputs)
    try:
        return trace(model)
    except TraceError:
        return None


def _nothing_to_do(result: Plan, nm: NM, decisions: Decisions) -> str:
    if not result.layers:
        return (
            f"{result.model} holds no Linear or Conv module and no raw weight was seen in use, so "
            f"nothing can become {nm}; pass the module that holds the weights, and example_inputs "
            "where they are raw parameters"
        )
    seen = "\n  ".join(
        f"{layer.name or '(the model itself)'} {layer.kind} {layer.shape}: {layer.reason}"
        for layer in result.layers[:20]
    )
    return (
        f"none of the {len(result.layers)} weight layers of {result.model} would become {nm}:\n"
        f"  {seen}\n{_way_out(decisions)}"
    )


def _way_out(decisions: Decisions) -> str:
    """What would make a layer sparse: only what would."""
    if whole := decisions.possible("skip"):
        name, weight = whole[0]
        match = name or f"class:{weight.kind}"
        return f"turn one on by a rule, e.g. rules=[Rule({match!r})]"
    if padded := decisions.possible("pad"):
        match = padded[0][0] or f"class:{padded[0][1].kind}"
        return (
            "choose a pattern that divides the input channels, or a shorter last block by a rule, "
            f"e.g. rules=[Rule({match!r}, remainder='pad')]"
        )
    return "no rule can change that: none of these weights can be cut into blocks"
