# SPDX-License-Identifier: Apache-2.0
"""The result of a trace: typed records of layers and neurons, and a networkx graph over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import fx

from spikenm_fx.trace.analysis.signal import Signal, SignalKind
from spikenm_fx.trace.channels.rules_nodes import Attachment
from spikenm_fx.trace.channels.spaces import Spaces
from spikenm_fx.trace.neurons.spec import NeuronSpec

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "Chain",
    "LayerRecord",
    "NeuronRecord",
    "NodeKind",
    "Note",
    "Route",
    "SpikingGraph",
    "with_prefix",
]

Route = Literal["fx", "fx+execution", "execution", "symbolic", "modules"]
NodeKind = Literal[
    "input", "output", "layer", "norm", "neuron", "join", "reshape", "pool", "matmul", "op", "value"
]


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One weight: a Linear or Conv module, or a parameter used functionally.

    Attributes:
        name: qualified name of the module, or of the parameter where there is no module.
        kind: the module's class by inheritance (``"linear"``, ``"conv2d"``, ``"convtranspose1d"``),
            or ``"functional"`` for a raw parameter.
        weight_shape: shape of the weight.
        calls: how often one forward uses it (T for a Python loop over time); 0 if never.
        pre: what its input comes from, nearest first: names of neurons, of other layers where no
            neuron lies between, or ``"input_0"`` and so on.
        post: neurons that its output drives, nearest first, through norms, reshapes and joins.
        feeds: other layers that its output reaches without passing a neuron.
        input_signal: what its input carries in eval mode.
        input_shape: of the example's first call; None if unknown.
        output_shape: of the example's first call; None if unknown.
        time_axis: the axis of its input that is time, or None (folded into the batch, or looped).
        inside: the neuron that holds it (a recurrent weight), or None.
        is_readout: it drives no spiking neuron: what it computes leaves the model.
        is_head: no other layer comes after it.
        multiplies_input: it multiplies what the model was given, behind no other layer.
        axis: of a raw parameter: its axis that is summed over, the input channels; None for
            modules, and where the calls do not tell.
        groups: of a raw parameter: the groups that share this axis (transposed convolutions).
        undecided: of a raw parameter: why ``axis`` is None.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    calls: int = 0
    pre: tuple[str, ...] = ()
    post: tuple[str, ...] = ()
    feeds: tuple[str, ...] = ()
    input_signal: Signal | None = None
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    time_axis: int | None = None
    inside: str | None = None
    is_readout: bool = False
    is_head: bool = False
    multiplies_input: bool = False
    axis: int | None = None
    groups: int = 1
    undecided: str = ""

    @property
    def sees_input(self) -> bool:
        """Whether the model's own input reaches it without passing a neuron."""
        return any(name.startswith("input_") for name in self.pre)


@dataclass(frozen=True, slots=True)
class NeuronRecord:
    """One neuron layer: a module, or a surrogate function called by the model's own code.

    Attributes:
        name: qualified name of the module; ``"path:Function@line"`` for a function.
        spec: its update rule; :func:`~spikenm_fx.trace.neuron_spec` reads learned values anew.
        layers: the layers that drive it, nearest first.
        calls: how often one forward calls it.
        output: what it emits.
        functional: True where there is no neuron module.
        shape: of its spikes in the example's first call; None if unknown.
    """

    name: str
    spec: NeuronSpec
    layers: tuple[str, ...] = ()
    calls: int = 0
    output: Signal | None = None
    functional: bool = False
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """A layer whose output goes to one neuron and nowhere else: what a kernel may fuse.

    Attributes:
        layer: the layer.
        norm: the norm between them, or None.
        neuron: the neuron.
        between: other nodes on the way (reshapes that fold time, identities).
        state_read: True where the model also reads the neuron's returned state.
    """

    layer: str
    norm: str | None
    neuron: str
    between: tuple[str, ...] = ()
    state_read: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """Something the trace wants known, about ``where`` (a qualified name, or "").

    Attributes:
        where: the part of the model.
        text: what was seen and what was done about it.
    """

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SpikingGraph:
    """Layers, norms, neurons, joins, reshapes and poolings of a model, and what flows between.

    Attributes:
        nx: a networkx ``DiGraph`` over qualified names.  Node attributes: ``kind``
            (:data:`NodeKind`), ``op`` (operation or class name), ``calls``, ``shape``.  Edge
            attributes: ``signal`` (:class:`~spikenm_fx.trace.analysis.signal.Signal`),
            ``measured`` (kinds seen in the example, see ``trace(measure=True)``), ``shape``,
            ``time_axis``.  A module is one node however often it is called, so loops over time
            make cycles.
        layers: every weight, by name: all modules of the tree, and functional weights.
        neurons: every neuron, by name.
        chains: one-to-one layer -> (norm) -> neuron chains.
        route: how the model was read.  ``"fx"`` by value-carrying tracing; ``"fx+execution"`` with
            some submodules recorded from their execution; ``"execution"`` wholly so; without
            example inputs ``"symbolic"``, or ``"modules"`` (the module tree alone, no edges).
        notes: what did not go by the book: fallbacks with their lines, weights that were not seen.
        operations: what was recorded, to read and never to run; None without a trace.
        spaces: the channel spaces; None where no forward was traced.
        attachments: which axis of which tensor runs over which channels.
    """

    nx: nx.DiGraph
    layers: Mapping[str, LayerRecord]
    neurons: Mapping[str, NeuronRecord]
    chains: tuple[Chain, ...] = ()
    route: Route = "modules"
    notes: tuple[Note, ...] = ()
    operations: fx.Graph | None = None
    spaces: Spaces | None = None
    attachments: tuple[Attachment, ...] = ()

    def __repr__(self) -> str:
        return (
            f"SpikingGraph({len(self.layers)} layers, {len(self.neurons)} neurons, "
            f"{len(self.chains)} chains, read by {self.route})"
        )

    def chain(self, layer: str) -> Chain | None:
        """The chain that starts at ``layer``, or None where it is not one-to-one."""
        return next((c for c in self.chains if c.layer == layer), None)

    @property
    def ran(self) -> bool:
        """Whether a forward ran, so that what it did not use is known."""
        return self.route not in ("modules", "symbolic")

    def record(self, layer: str) -> LayerRecord | None:
        """What is known of a layer: where it is never called, of its weight used by itself.

        ``F.linear(x, self.fc.weight)`` uses ``fc`` without calling it.
        """
        called, weight = self.layers.get(layer), self.layers.get(f"{layer}.weight".lstrip("."))
        by_itself = weight is not None and (called is None or not called.calls)
        return weight if by_itself else called

    def of_kind(self, *kinds: NodeKind) -> list[str]:
        """Names of the nodes of these kinds, in the order of the first call."""
        return [name for name, data in self.nx.nodes(data=True) if data.get("kind") in kinds]

    def why(self, layer: str) -> str:
        """One phrase about a layer for a plan's reasons, e.g. ``"feeds no neuron: readout"``.

        Raises:
            KeyError: if there is no such layer.
        """
        record = self.record(layer)
        if record is None:
            raise KeyError(layer)
        if not record.calls and self.ran:
            return "not used in the traced forward"
        if record.multiplies_input and record.input_signal is not None:
            kind = record.input_signal.kind
            return f"input is {kind}" + (" image" if kind == "analog" and _image(record) else "")
        if record.is_readout and not record.feeds:
            return "feeds no neuron: readout"
        signal = record.input_signal.kind if record.input_signal else "unknown"
        return f"{signal} from {_listed(record.pre)}, drives {_listed(record.post)}"

    def summary(self) -> dict[str, Any]:
        """Plain counts, for tables and JSON."""
        kinds = [r.input_signal.kind for r in self.layers.values() if r.input_signal]
        return {
            "route": self.route,
            "layers": len(self.layers),
            "unused": sum(not r.calls for r in self.layers.values()),
            "neurons": len(self.neurons),
            "chains": len(self.chains),
            "inputs": {kind: kinds.count(kind) for kind in get_args(SignalKind)},
            "notes": [str(note) for note in self.notes],
        }


def _image(record: LayerRecord) -> bool:
    return record.kind == "conv2d"


def _listed(names: tuple[str, ...]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def with_prefix(graph: SpikingGraph, prefix: str) -> SpikingGraph:
    """The same graph, named as in a module that holds the traced one as ``prefix``."""
    import networkx as nx

    def new(name: str) -> str:
        return name if name not in named else prefix + name

    def all_new(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new(name) for name in names)

    nodes = graph.nx.nodes(data=True)
    modules = {name for name, data in nodes if data["kind"] not in ("input", "output")}
    named = modules | set(graph.layers) | set(graph.neurons)
    layers = {
        new(name): replace(
            r,
            name=new(name),
            pre=all_new(r.pre),
            post=all_new(r.post),
            feeds=all_new(r.feeds),
            inside=new(r.inside) if r.inside is not None else None,
        )
        for name, r in graph.layers.items()
    }
    neurons = {
        new(name): replace(r, name=new(name), layers=all_new(r.layers))
        for name, r in graph.neurons.items()
    }
    chains = tuple(
        replace(
            c,
            layer=new(c.layer),
            norm=new(c.norm) if c.norm is not None else None,
            neuron=new(c.neuron),
            between=all_new(c.between),
        )
        for c in graph.chains
    )
    return replace(
        graph,
        nx=nx.relabel_nodes(graph.nx, {name: new(name) for name in graph.nx.nodes}),
        layers=layers,
        neurons=neurons,
        chains=chains,
        attachments=tuple(replace(a, tensor=prefix + a.tensor) for a in graph.attachments),
    )
