# SPDX-License-Identifier: Apache-2.0
"""Read one time step of a model from its trace, however the model steps through time.

Modules over ``[T, N, ...]``, one step a call and loops inside of ``forward`` become the same parts
and connections.  A loop is read step by step: what differs between two steps is refused.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

from torch import Tensor, fx, nn

from spikenm_fx.errors import ExportError, some_of
from spikenm_fx.export.parts import (
    Flow,
    Lead,
    OtherLayout,
    Part,
    State,
    StepGraph,
    Unreadable,
    Zero,
)
from spikenm_fx.export.recurrent import own_recurrence
from spikenm_fx.export.step_operations import (
    added,
    cannot,
    flat,
    flow_of,
    moved,
    new_lead,
    over_time,
    picked,
    stacked,
    whole_shape,
)
from spikenm_fx.export.step_pools import pool_options
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import SpikingGraph
from spikenm_fx.trace.analysis.ops import MOVES, RESHAPES, module_family, op_name
from spikenm_fx.trace.execution.leaves import NORMS

__all__ = ["read_steps"]

_LEADS: tuple[Lead, ...] = (("T", "N"), ("N", "T"), ("N",), ("NT",), ("TN",))
_SAME = frozenset(
    ["identity", "contiguous", "clone", "detach", "to", "float", "type", "dropout", "alias"]
)
_ZEROS = frozenset(["zeros", "zeros_like", "new_zeros", "zero"])
_POOLS = frozenset(("avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d"))


def read_steps(model: nn.Module, graph: SpikingGraph, x: Tensor) -> StepGraph:
    """One step of ``model``.

    Args:
        model: the traced model.
        graph: its trace on ``x``.
        x: the example, of the shape that the model takes.

    Raises:
        ExportError: for what is no network of layers, neurons, average pools and sums.
    """
    if graph.operations is None:
        raise ExportError("the model could not be traced; see spikenm_fx.trace(model, x).notes")
    written = [r.name for r in graph.neurons.values() if r.functional]
    if written:
        raise ExportError(
            f"spikes are computed by the model's own code ({some_of(written)}), whose update rule "
            "is not fully known: put it into a module over all steps and tell its rule with "
            "spikenm_fx.trace.register_neuron"
        )
    first: Unreadable | None = None
    plausible: Unreadable | None = None
    for lead in _LEADS:
        if x.dim() <= len(lead):
            continue
        try:
            return _Reader(model, graph, x, lead).read()
        except OtherLayout as error:
            first = first or error
        except Unreadable as error:
            plausible = plausible or error
    raise ExportError(str(plausible or first or f"an input of shape {tuple(x.shape)}"))


class _Reader:
    def __init__(self, model: nn.Module, graph: SpikingGraph, x: Tensor, lead: Lead) -> None:
        self.model, self.graph, self.lead = model, graph, lead
        self.sizes = dict(zip(lead, x.shape, strict=False))
        self.parts: dict[str, Part] = {}
        self.seen: dict[str, list[tuple[int | None, frozenset[tuple[str, int]]]]] = defaultdict(
            list
        )
        self.calls: dict[str, int] = defaultdict(int)
        self.names: dict[Any, str] = {}
        self.notes: list[str] = []
        self.values: dict[fx.Node, Any] = {}
        self.leads: dict[str, Lead] = {}

    def read(self) -> StepGraph:
        assert self.graph.operations is not None
        for node in self.graph.operations.nodes:
            self.values[node] = self._value(node)
        parts = [p for p in self.parts.values() if p.kind != "output"]
        order = {p.name: p for p in (*parts, self.parts["output"])}
        steps = max(self.calls.values(), default=1)
        if steps > 1:
            self.sizes.setdefault("T", steps)
        return StepGraph(order, self._edges(), self.lead, self.notes, self.leads, self.sizes)

    # -- values -----------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return _constant(node.meta.get("tensor"))
        args, kwargs = self._known(node.args), self._known(node.kwargs)
        if node.op == "output":
            return self._output(args[0])
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        return self._operation(node, op_name(node), list(args), kwargs)

    def _known(self, given: Any) -> Any:
        return fx.node.map_arg(given, lambda node: self.values[node])

    def _input(self, node: fx.Node) -> Flow:
        if "input" in self.parts:
            raise Unreadable(
                f"the model takes a second tensor, {node.name}; NIR graphs have one input. States "
                "belong into the neurons: leave them out of the example, so that they start at rest"
            )
        shape = _shape(node)[len(self.lead) :]
        self.parts["input"] = Part("input", "input", shape)
        return Flow((("input", None),), self.lead, shape)

    def _output(self, value: Any) -> None:
        given = list(value) if isinstance(value, tuple | list) else [value]
        flows = [v for v in given if isinstance(v, Flow)]
        states = sorted({v.neuron for v in given if isinstance(v, State)})
        different = {flow.terms for flow in flows}
        if len(different) != 1:
            what = "no spikes or values of a layer" if not flows else "several different tensors"
            held = f" but states of {', '.join(states)}" if states and not flows else ""
            raise Unreadable(
                f"the model returns {what}{held}; NIR graphs have one output, what a layer or "
                "neuron emits: export a model that returns that"
            )
        if states:
            self.notes.append(
                f"the model also returns the state of {', '.join(states)}, which is not in the "
                "graph: the reader keeps it"
            )
        flow = flows[0]
        if flow.over_time:
            self.notes.append(
                f"the model returns the {flow.over_time}, which is left to the caller: the graph "
                "gives every step"
            )
        steps = [step for _, step in flow.terms if step is not None]
        if steps and not flow.over_time and max(self.calls.values(), default=1) > 1:
            self.notes.append(
                f"the model returns step {max(steps)} alone, which is left to the caller: the "
                "graph gives every step"
            )
        self.parts["output"] = Part("output", "output", flow.shape)
        self._feed("output", flow)

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name, module = str(node.target), node.meta["module"]
        if name in self.graph.neurons:
            return self._neuron(node, name, module, args, kwargs)
        data = args[0] if args else None
        if is_weight_layer(module) or isinstance(module, NORMS):
            kind: Any = "layer" if is_weight_layer(module) else "norm"
            if isinstance(data, Zero) and kind == "layer":
                return Flow(((self._part(name, kind, (), module).name, -1),), ("N",), ())
            flow = flow_of(data, f"{name} ({type(module).__name__})")
            shape = _shape(node)[len(flow.lead) :]
            part = self._part(name, kind, shape, module)
            self.leads[name] = flow.lead
            step = self._feed(name, flow)
            return Flow(((part.name, step),), flow.lead, shape)
        return self._operation(node, module_family(module), [data, *args[1:]], kwargs, module)

    def _neuron(self, node: fx.Node, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        spec = self.graph.neurons[name].spec
        recurrence = own_recurrence(module, spec)
        if recurrence is not None:
            spec = recurrence.spec
        flow = flow_of(args[0] if args else None, f"{name} ({type(module).__name__})")
        self._check_lead(name, spec, flow)
        for state in flat((*args[1:], *kwargs.values())):
            own = isinstance(state, State) and state.neuron == name
            spikes = isinstance(state, Flow) and [p for p, _ in state.terms] == [name]
            if not (state is None or own or isinstance(state, Zero) or (recurrence and spikes)):
                raise Unreadable(
                    f"{name} ({type(module).__name__}) is given a state that is neither zero nor "
                    "its own of the step before, which NIR cannot say"
                )
        part = self._part(name, "neuron", flow.shape, module)
        part.spec = spec
        if spec.folded_time:
            self.sizes["T"] = self._steps_of(module, flow)
        whole = "T" in "".join(flow.lead)
        step = None if whole else self.calls[name]
        self.leads[name] = flow.lead
        self.calls[name] += 1
        self._feed(name, flow, step=step, neuron=True)
        if recurrence is not None:
            layer = recurrence.feedback
            assert isinstance(layer, nn.Module)
            self._part(recurrence.name(name), "layer", flow.shape, layer)
            self.seen[recurrence.name(name)].append((None, frozenset([(name, 0)])))
            self.seen[name][-1] = (step, self.seen[name][-1][1] | {(recurrence.name(name), 1)})
        out = Flow(((name, step),), flow.lead, flow.shape)
        returned = node.meta.get("value")
        several = returned is None or returned.shape is None
        return (out, State(name)) if several else out

    def _check_lead(self, name: str, spec: Any, flow: Flow) -> None:
        """Whether the neuron steps along the axis that is taken for time."""
        wanted = {
            (None, False): (("N",),),
            (0, False): (("T", "N"),),
            (1, False): (("N", "T"),),
            (0, True): (("TN",),),
            (1, True): (("NT",),),
        }[spec.time_axis, spec.folded_time]
        if flow.lead not in wanted:
            raise OtherLayout(
                f"{name} ({spec.class_name}) steps over axis {spec.time_axis} of its input, whose "
                f"axes were read as {flow.lead}: give the example as the model takes it, with a "
                "batch axis"
            )

    def _steps_of(self, module: Any, flow: Flow) -> int:
        """How many steps lie in an axis that batch and time share, by what the neuron knows."""
        whole = self.sizes["".join(flow.lead)]
        batch = getattr(module, "batch_size", None)
        steps = getattr(module, "num_timesteps", None) or getattr(module, "step", None)
        if isinstance(steps, int) and steps > 0:
            return steps
        return whole // batch if isinstance(batch, int) and batch > 0 else whole

    # -- operations -------------------------------------------------------------------------------

    def _operation(
        self, node: fx.Node, name: str, args: list[Any], kwargs: Any, module: Any = None
    ) -> Any:
        where = node.meta.get("scope") or ""
        label = f"{where + ': ' if where else ''}{name}"
        if name in _ZEROS:
            return Zero()
        if not any(isinstance(v, Flow | State | Zero) for v in flat((args, kwargs))):
            return None if not args else args[0]
        if name in _SAME:
            return args[0]
        if name in ("getitem", "select", "unbind") and args:
            return picked(name, args, kwargs, self.sizes, label)
        if name in ("stack", "cat"):
            return stacked(name, args, kwargs, self.sizes, label)
        if name in ("sum", "mean"):
            return over_time(name, args, kwargs, self.sizes, label)
        if name in ("add", "div", "mul"):
            return added(name, args, kwargs, label)
        flow = flow_of(args[0], label)
        if name in _POOLS:
            return self._pool(node, name, flow, args, kwargs, module, label)
        if name in RESHAPES or name in MOVES or name in ("expand", "repeat"):
            return self._reshape(node, name, flow, args, label)
        raise Unreadable(cannot(label, name))

    def _pool(
        self, node: fx.Node, name: str, flow: Flow, args: Any, kwargs: Any, module: Any, label: str
    ) -> Flow:
        options = pool_options(name, flow.shape, args, kwargs, module)
        if isinstance(options, str):
            raise Unreadable(f"{label}: {options}")
        shape = _shape(node)[len(flow.lead) :]
        if len(flow.lead) != 1:
            raise Unreadable(f"{label} of a tensor with axes {flow.lead} before the channels")
        return self._functional(node, flow, "pool", shape, options, str(sorted(options.items())))

    def _functional(
        self, node: fx.Node, flow: Flow, kind: Any, shape: Any, options: Any, key: str
    ) -> Flow:
        """A part that is no module of its own, named alike in every step."""
        sources = tuple(sorted(p for p, _ in flow.terms))
        known = (kind, sources, key)
        if known not in self.names:
            base = str(node.target) if node.op == "call_module" else f"{'+'.join(sources)}.{kind}"
            numbered = (f"{base}{i}" for i in itertools.count(2))
            free = (n for n in itertools.chain([base], numbered) if n not in self.parts)
            self.names[known] = next(free)
        name = self.names[known]
        self._part(name, kind, shape, None).options.update(options)
        step = self._feed(name, flow)
        return Flow(((name, step),), flow.lead, shape)

    def _reshape(self, node: fx.Node, name: str, flow: Flow, args: Any, label: str) -> Flow:
        before, after = whole_shape(flow, self.sizes), _shape(node)
        if name in MOVES:
            return moved(flow, len(before), name, args, label)
        tail = flow.shape
        if after[len(after) - len(tail) :] == tail and len(after) > len(tail):
            lead = new_lead(flow.lead, after[: len(after) - len(tail)], self.sizes, name)
            if lead is not None:
                return Flow(flow.terms, lead, tail, flow.over_time)
        count = len(flow.lead)
        if after[:count] == before[:count] and after[count:] == (math.prod(tail),):
            if len(tail) == 1:
                return flow
            return self._functional(node, flow, "flatten", after[count:], {}, "flatten")
        raise Unreadable(f"{label} from {before} to {after}, which is neither time nor channels")

    # -- connections ------------------------------------------------------------------------------

    def _part(self, name: str, kind: Any, shape: Any, module: nn.Module | None) -> Part:
        part = self.parts.get(name)
        if part is None:
            part = self.parts[name] = Part(name, kind, tuple(shape), module)
        elif not part.shape:
            part.shape = tuple(shape)
        return part

    def _feed(
        self, target: str, flow: Flow, *, step: int | None = None, neuron: bool = False
    ) -> int | None:
        known = [s for _, s in flow.terms if s is not None]
        if not neuron:
            step = max(known) if known else None
        sources = set()
        for source, at in flow.terms:
            delay = 0 if at is None or step is None else step - at
            if delay not in (0, 1):
                raise Unreadable(
                    f"{target} reads {source} of {delay} steps before; NIR knows this step and "
                    "the one before"
                )
            sources.add((source, delay))
        self.seen[target].append((step, frozenset(sources)))
        return step

    def _edges(self) -> list[tuple[str, str, int]]:
        edges = []
        for target, calls in self.seen.items():
            whole = max((sources for _, sources in calls), key=len)
            for step, sources in calls:
                first = step in (0, -1)
                missing = whole - sources
                if sources - whole or any(not (first and delay) for _, delay in missing):
                    raise Unreadable(
                        f"{target} is fed by {_names(sources)} in step {step} and by "
                        f"{_names(whole)} in another; NIR's connections are the same in each"
                    )
            edges += [(source, target, delay) for source, delay in sorted(whole)]
        return edges


def _names(sources: frozenset[tuple[str, int]]) -> str:
    return ", ".join(sorted(source for source, _ in sources)) or "nothing"


def _constant(tensor: Any) -> Any:
    if isinstance(tensor, Tensor) and (not tensor.numel() or not bool(tensor.any())):
        return Zero()
    return tensor


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("value")
    return tuple(value.shape) if value is not None and value.shape is not None else ()
