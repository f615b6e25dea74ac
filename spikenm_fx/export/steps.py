# SPDX-License-Identifier: Apache-2.0
"""Read one time step of a model from its trace, however the model steps through time.

Modules over ``[T, N, ...]``, one step a call and loops inside of ``forward`` become the same parts
and connections.  A loop is read step by step: what differs between two steps is refused.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikenm_fx.errors import ExportError
from spikenm_fx.export.parts import Flow, Lead, Part, StepGraph, Unreadable
from spikenm_fx.export.recurrent import own_recurrence
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace import SpikingGraph
from spikenm_fx.trace.analysis.ops import MOVES, RESHAPES, module_family, op_name
from spikenm_fx.trace.execution.leaves import NORMS

__all__ = ["read_steps"]

_LEADS: tuple[Lead, ...] = (("T", "N"), ("N", "T"), ("N",), ("NT",), ("TN",))
_SAME = frozenset("identity contiguous clone detach to float type dropout alias".split())
_ZEROS = frozenset("zeros zeros_like new_zeros zero".split())
_POOLS = frozenset(("avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d"))


class _Zero:
    """A tensor of zeros: a state before the first step."""


class _State:
    """A neuron's state, which only this neuron may read."""

    def __init__(self, neuron: str) -> None:
        self.neuron = neuron


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
    first: Unreadable | None = None
    plausible: Unreadable | None = None
    for lead in _LEADS:
        if x.dim() <= len(lead):
            continue
        try:
            return _Reader(model, graph, x, lead).read()
        except _OtherLayout as error:
            first = first or error
        except Unreadable as error:
            plausible = plausible or error
    raise ExportError(str(plausible or first or f"an input of shape {tuple(x.shape)}"))


class _OtherLayout(Unreadable):
    """The input's axes are not what was tried."""


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
        states = sorted({v.neuron for v in given if isinstance(v, _State)})
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
        self.parts["output"] = Part("output", "output", flow.shape)
        self._feed("output", flow)

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        name, module = str(node.target), node.meta["module"]
        if name in self.graph.neurons:
            return self._neuron(node, name, module, args, kwargs)
        data = args[0] if args else None
        if is_weight_layer(module) or isinstance(module, NORMS):
            kind: Any = "layer" if is_weight_layer(module) else "norm"
            if isinstance(data, _Zero) and kind == "layer":
                return Flow(((self._part(name, kind, (), module).name, -1),), ("N",), ())
            flow = self._flow(data, f"{name} ({type(module).__name__})")
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
        flow = self._flow(args[0] if args else None, f"{name} ({type(module).__name__})")
        self._check_lead(name, spec, flow)
        for state in _flat((*args[1:], *kwargs.values())):
            own = isinstance(state, _State) and state.neuron == name
            spikes = isinstance(state, Flow) and [p for p, _ in state.terms] == [name]
            if not (state is None or own or isinstance(state, _Zero) or (recurrence and spikes)):
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
            self._part(recurrence.name(name), "layer", flow.shape, recurrence.layer)
            self.seen[recurrence.name(name)].append((None, frozenset([(name, 0)])))
            self.seen[name][-1] = (step, self.seen[name][-1][1] | {(recurrence.name(name), 1)})
        out = Flow(((name, step),), flow.lead, flow.shape)
        returned = node.meta.get("value")
        several = returned is None or returned.shape is None
        return (out, _State(name)) if several else out

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
            raise _OtherLayout(
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
            return _Zero()
        if not any(isinstance(v, Flow | _State | _Zero) for v in _flat((args, kwargs))):
            return None if not args else args[0]
        if name in _SAME:
            return args[0]
        if name in ("getitem", "select", "unbind") and args:
            return self._pick(name, args, kwargs, label)
        if name in ("stack", "cat"):
            return self._stack(node, name, args, kwargs, label)
        if name in ("add", "sum", "mean", "div", "mul"):
            return self._sum(node, name, args, kwargs, label)
        flow = self._flow(args[0], label)
        if name in _POOLS:
            return self._pool(node, name, flow, args, kwargs, module, label)
        if name in RESHAPES or name in MOVES or name in ("expand", "repeat"):
            return self._reshape(node, name, flow, args, label)
        raise Unreadable(_cannot(label, name))

    def _pick(self, name: str, args: list[Any], kwargs: Any, label: str) -> Any:
        value = args[0]
        if isinstance(value, tuple | list):
            return value[args[1]]
        if isinstance(value, _State | _Zero):
            return value
        if name == "unbind":
            axis = int(kwargs.get("dim", args[1] if len(args) > 1 else 0))
            count = self.sizes.get(value.lead[axis] if axis < len(value.lead) else "", 0)
            return tuple(self._at(value, axis, step, label) for step in range(count))
        if name == "select":
            return self._at(value, int(args[1]), int(args[2]), label)
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        places = [i for i, part in enumerate(index) if isinstance(part, int)]
        rest = [p for p in index if not isinstance(p, int) and p != slice(None) and p is not ...]
        if len(places) != 1 or rest or (... in index and index[0] is ...):
            raise Unreadable(f"{label} with {args[1]}: only single time steps may be picked")
        return self._at(value, places[0], int(index[places[0]]), label)

    def _at(self, flow: Flow, axis: int, step: int, label: str) -> Flow:
        if axis >= len(flow.lead) or flow.lead[axis] != "T":
            raise _OtherLayout(f"{label} picks from axis {axis}, which is not time")
        step %= self.sizes["T"]
        lead = flow.lead[:axis] + flow.lead[axis + 1 :]
        return Flow(tuple((p, step) for p, _ in flow.terms), lead, flow.shape)

    def _stack(self, node: fx.Node, name: str, args: list[Any], kwargs: Any, label: str) -> Any:
        given = list(args[0])
        if given and all(isinstance(v, _State) for v in given):
            return given[0]
        flows = [self._flow(v, label) for v in given]
        axis = int(kwargs.get("dim", args[1] if len(args) > 1 else 0))
        steps = [(p, s) for flow in flows for p, s in flow.terms]
        parts = {p for p, _ in steps}
        if name == "cat" and axis == 0 and all(f.lead == ("T", "N") for f in flows):
            name = "stack"  # of pieces that were given a time axis of one before
        in_order = [s for _, s in steps] in ([None] * len(steps), list(range(len(steps))))
        if name != "stack" or len(parts) != 1 or not in_order or any(f.over_time for f in flows):
            raise Unreadable(_cannot(label, name))
        first = flows[0]
        lead = tuple(axis_ for axis_ in first.lead if axis_ != "T")
        self.sizes.setdefault("T", len(flows))
        return Flow(((steps[0][0], None),), (*lead[:axis], "T", *lead[axis:]), first.shape)

    def _sum(self, node: fx.Node, name: str, args: list[Any], kwargs: Any, label: str) -> Any:
        if name in ("sum", "mean"):
            flow = self._flow(args[0], label)
            dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dims = list(dims) if isinstance(dims, tuple | list) else [dims]
            if dims == [None] or any(
                d % len(_whole(flow, self.sizes)) >= len(flow.lead) or flow.lead[d] != "T"
                for d in dims
            ):
                raise Unreadable(_cannot(f"{label} over axes {dims}", name))
            lead = tuple(axis for axis in flow.lead if axis != "T")
            return Flow(flow.terms, lead, flow.shape, f"{name} over all steps")
        others = [a for a in args[:2] if not isinstance(a, Flow | _Zero)]
        flows = [a for a in args[:2] if isinstance(a, Flow)]
        if name in ("mul", "div"):
            if len(flows) == 1 and flows[0].over_time and isinstance(args[0], Flow):
                scaled = flows[0].over_time + ", scaled"
                return Flow(flows[0].terms, flows[0].lead, flows[0].shape, scaled)
            raise Unreadable(_cannot(label, name))
        if kwargs.get("alpha", 1) != 1:
            raise Unreadable(f"{label} with alpha={kwargs['alpha']}: NIR adds without factors")
        for other in others:
            if not (isinstance(other, int | float) and other == 0):
                raise Unreadable(
                    f"{label}: a constant ({_short(other)}) is added, which NIR cannot say and "
                    "its readers would lose; move it into the bias of a layer"
                )
        if not flows:
            return _Zero()
        if len(flows) == 1:
            return flows[0]
        return self._joined(flows, label)

    def _joined(self, flows: Sequence[Flow], label: str) -> Flow:
        terms = tuple(itertools.chain.from_iterable(flow.terms for flow in flows))
        parts = [p for p, _ in terms]
        lead = max((flow.lead for flow in flows), key=len)
        shape = max((flow.shape for flow in flows), key=len)
        over = [flow.over_time for flow in flows if flow.over_time]
        steps = [s for _, s in terms]
        if len(set(parts)) == 1 and (over or len(set(steps)) == len(steps)) and None not in steps:
            return Flow((terms[-1],), lead, shape, "sum over all steps")
        if over:
            raise Unreadable(f"{label}: sums over time are added to something else")
        if len(set(parts)) < len(parts):
            twice = next(p for p in parts if parts.count(p) > 1)
            raise Unreadable(
                f"{label}: the output of {twice} is added to itself, a doubled branch that NIR "
                "keeps once; double the weights of the layer behind it instead"
            )
        return Flow(terms, lead, shape)

    def _pool(
        self, node: fx.Node, name: str, flow: Flow, args: Any, kwargs: Any, module: Any, label: str
    ) -> Flow:
        options = _pool_options(name, flow.shape, args, kwargs, module)
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
        before, after = _whole(flow, self.sizes), _shape(node)
        if name in MOVES:
            return self._moved(flow, before, after, name, args, label)
        tail = flow.shape
        if after[len(after) - len(tail) :] == tail and len(after) > len(tail):
            lead = self._lead(flow.lead, after[: len(after) - len(tail)], name)
            if lead is not None:
                return Flow(flow.terms, lead, tail, flow.over_time)
        count = len(flow.lead)
        if after[:count] == before[:count] and after[count:] == (math.prod(tail),):
            if len(tail) == 1:
                return flow
            return self._functional(node, flow, "flatten", after[count:], {}, "flatten")
        raise Unreadable(f"{label} from {before} to {after}, which is neither time nor channels")

    def _lead(self, lead: Lead, sizes: tuple[int, ...], name: str) -> Lead | None:
        steps, batch = self.sizes.get("T"), self.sizes.get("N")
        if lead == ("N",) and name in ("unsqueeze", "repeat", "expand", "view", "reshape"):
            if batch is not None and len(sizes) == 2 and sizes[1] == batch:
                self.sizes["T"] = sizes[0]
                return ("T", "N")
        if lead == ("T", "N") and name in ("expand", "repeat") and len(sizes) == 2:
            self.sizes["T"] = sizes[0]
            return lead
        if lead in (("TN",), ("NT",)) and len(sizes) == 2:
            names = tuple(lead[0])
            self.sizes |= dict(zip(names, sizes, strict=True))
            return names
        if len(lead) == 2 and steps and batch and sizes == (steps * batch,):
            self.sizes["".join(lead)] = sizes[0]
            return ("".join(lead),)
        if tuple(self.sizes.get(axis, -1) for axis in lead) == sizes:
            return lead
        if lead == ("T", "N") and sizes == (batch,) and name == "squeeze":
            return ("N",)
        return None

    def _moved(self, flow: Flow, before: Any, after: Any, name: str, args: Any, label: str) -> Flow:
        flat = [a for a in _flat(args[1:]) if isinstance(a, int)]
        rank = len(before)
        if name == "transpose" and len(flat) == 2:
            order = list(range(rank))
            a, b = (axis % rank for axis in flat)
            order[a], order[b] = b, a
        elif name == "permute" and len(flat) == rank:
            order = [axis % rank for axis in flat]
        else:
            raise Unreadable(_cannot(label, name))
        count = len(flow.lead)
        if order[count:] != list(range(count, rank)):
            raise Unreadable(f"{label} moves the channels of {before}, which NIR cannot say")
        return Flow(flow.terms, tuple(flow.lead[i] for i in order[:count]), flow.shape)

    # -- connections ------------------------------------------------------------------------------

    def _flow(self, value: Any, label: str) -> Flow:
        if isinstance(value, Flow) and not value.over_time:
            return value
        if isinstance(value, Flow):
            raise Unreadable(f"{label} is given a {value.over_time}: later steps would change it")
        if isinstance(value, _State):
            raise Unreadable(
                f"{label} is given the membrane of {value.neuron}; NIR's neurons hand on spikes only"
            )
        raise Unreadable(f"{label} is given a value that was not computed from the input")

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


def _cannot(label: str, name: str) -> str:
    known = {
        "max_pool2d": "a maximum has no NIR node; train with average pooling",
        "cat": "NIR adds what meets and cannot concatenate",
        "mul": "NIR has no product of signals that its readers know; scale weights instead",
        "div": "NIR has no quotient that its readers know; scale weights instead",
        "relu": "NIR has no ReLU",
    }
    return f"{label}: " + known.get(name, f"NIR has no node for {name!r}")


def _short(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def _constant(tensor: Any) -> Any:
    if isinstance(tensor, Tensor) and (not tensor.numel() or not bool(tensor.any())):
        return _Zero()
    return tensor


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("value")
    return tuple(value.shape) if value is not None and value.shape is not None else ()


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return [v for value in values for v in _flat(value)]
    return [values]


def _whole(flow: Flow, sizes: dict[str, int]) -> tuple[int, ...]:
    return (*(sizes.get(axis, -1) for axis in flow.lead), *flow.shape)


def _pool_options(
    name: str, shape: tuple[int, ...], args: Sequence[Any], kwargs: Any, module: Any
) -> dict[str, Any] | str:
    """Kernel, stride and padding as pairs; a sentence where NIR cannot say them."""
    if len(shape) != 3:
        return f"pools a tensor {shape} of one sample; NIR pools (channels, height, width)"
    keys = (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    )
    if name == "lp_pool2d":
        keys = ("norm_type", "kernel_size", "stride", "ceil_mode")
    if name == "adaptive_avg_pool2d":
        size = getattr(module, "output_size", args[1] if len(args) > 1 else None)
        size = kwargs.get("output_size", size)
        out = _pair(size)
        if any(o is None or whole % o for o, whole in zip(out, shape[1:], strict=True)):
            return f"pools {shape[1:]} to {size}, whose windows differ in size"
        kernel = tuple(whole // o for o, whole in zip(out, shape[1:], strict=True))
        return {"op": "avg", "kernel_size": kernel, "stride": kernel, "padding": (0, 0)}
    given = {k: getattr(module, k) for k in keys if hasattr(module, k)}
    given |= dict(zip(keys, args[1:], strict=False)) | {
        k: v for k, v in kwargs.items() if k in keys
    }
    if given.get("ceil_mode") or given.get("divisor_override") is not None:
        return "ceil_mode and divisor_override have no place in NIR"
    padding = _pair(given.get("padding", 0))
    if any(padding) and not given.get("count_include_pad", True):
        return "count_include_pad=False has no place in NIR"
    if name == "lp_pool2d" and float(given["norm_type"]) != 1.0:
        return "a power average has no NIR node"
    kernel = _pair(given["kernel_size"])
    stride = given.get("stride")
    return {
        "op": "avg" if name == "avg_pool2d" else "sum",
        "kernel_size": kernel,
        "stride": kernel if stride is None or stride == () else _pair(stride),
        "padding": padding,
    }


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)  # type: ignore[return-value]
