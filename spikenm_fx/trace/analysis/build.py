# SPDX-License-Identifier: Apache-2.0
"""From the recorded operations to the SpikingGraph: merge calls, name signals, pair up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import networkx as nx
from torch import fx, nn

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace.analysis.chains import find_chains
from spikenm_fx.trace.analysis.firing import Firing, find_firings
from spikenm_fx.trace.analysis.flow import Flow
from spikenm_fx.trace.analysis.grouping import grouped
from spikenm_fx.trace.analysis.infer import Inference
from spikenm_fx.trace.analysis.nodes import (
    kind_of_op,
    layer_kind,
    times,
    unique,
    with_layers,
)
from spikenm_fx.trace.analysis.ops import module_family, op_name
from spikenm_fx.trace.analysis.owned import weights_of_neurons
from spikenm_fx.trace.analysis.products import Product, ProductFinder, parameter_behind
from spikenm_fx.trace.analysis.rewrite import simplify
from spikenm_fx.trace.analysis.signal import ANALOG, Signal, join, of_kind
from spikenm_fx.trace.channels.reader import ChannelReader
from spikenm_fx.trace.channels.rules import read_channels
from spikenm_fx.trace.channels.rules_nodes import is_item, name_of
from spikenm_fx.trace.execution.leaves import ATOMIC
from spikenm_fx.trace.execution.record import Trace
from spikenm_fx.trace.execution.values import ValueInfo
from spikenm_fx.trace.graph import (
    LayerRecord,
    NeuronRecord,
    NodeKind,
    Note,
    SpikingGraph,
)
from spikenm_fx.trace.neurons.spec import NeuronSpec

__all__ = ["build"]


def build(trace: Trace) -> SpikingGraph:
    """From what was recorded to layers, neurons and the graph between them."""
    builder = _Builder(trace)
    if trace.graph is not None:
        builder.read()
    return builder.finish()


class _Builder:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes = list(trace.graph.nodes) if trace.graph is not None else []
        self.signals: dict[fx.Node, Signal] = {}
        self.ident: dict[fx.Node, str] = {}
        self.weights: dict[fx.Node, str] = {}
        self.finder = ProductFinder()
        self.products: dict[str, list[Product]] = {}
        self.multiplied: dict[str, list[fx.Node]] = {}
        self.specs: dict[str, NeuronSpec] = dict(trace.neurons)
        self.flow = Flow(self.ident, self.weights, self.specs)
        self.functional: set[str] = set()
        self.fused: dict[str, list[fx.Node]] = {}
        self.owned: dict[str, str] = {}  # weights that belong to neurons
        self.firings: list[Firing] = []
        self.emitted: dict[str, Signal] = {}
        self.notes = list(trace.notes)
        self.out = nx.DiGraph()
        self.reader: ChannelReader | None = None

    # -- reading the operations -------------------------------------------------------------------

    def read(self) -> None:
        for node in self.nodes:
            simplify(node)
            self._note_product(node)
        inference = Inference(self.specs, self._note)
        for node in self.nodes:
            inference.visit(node)
        self.signals = inference.known
        self.firings = find_firings(self.nodes, self.signals, self.flow)
        self._name_firings()
        for node in self.nodes:
            self.ident[node] = self.flow.identity(node)
        if self.trace.route != "symbolic":
            self.reader = read_channels(self.trace)
        self._connect()

    def _note_product(self, node: fx.Node) -> None:
        """Where ``node`` multiplies by something made of parameters alone: it is a layer."""
        for product in self.finder.of(node):
            self.weights.setdefault(node, product.parameter)
            self.products.setdefault(product.parameter, []).append(product)
            self.multiplied.setdefault(product.parameter, []).append(node)

    def _note(self, where: str, text: str) -> None:
        note = Note(where, text)
        if note not in self.notes:
            self.notes.append(note)

    # -- functional neurons -----------------------------------------------------------------------

    def _name_firings(self) -> None:
        """A name for each neuron that is code: where it fires."""
        for firing in self.firings:
            firing.node.meta["fires"] = True
        taken: set[str] = set()
        for group in grouped(self.firings, self.nodes, self.flow):
            first = group.members[0].node
            at, what = first.meta.get("at", ()), op_name(first)
            if group.function:
                what = getattr(group.function, "__name__", "Function")
            name = f"{group.scope}:{what}@{at[0] if at else '?'}".lstrip(":")
            while name in taken:
                name += "'"
            taken.add(name)
            self._add_functional(name, group.members)
        members = {name: self._firings_of(name) for name in self.functional}
        for node, name in weights_of_neurons(self.nodes, members, self.flow).items():
            self.owned.setdefault(self.flow.identity(node), name)
            self.flow.owned.add(node)

    def _firings_of(self, name: str) -> list[Firing]:
        return [firing for firing in self.firings if self.ident[firing.node] == name]

    def _add_functional(self, name: str, members: list[Firing]) -> None:
        function = getattr(members[0].node.target, "function", None)
        self.emitted[name] = join([signal for one in members for signal in one.emitted])
        self.specs[name] = NeuronSpec(
            framework="function",
            class_name=function.__name__ if function else op_name(members[0].node),
            output=self.emitted[name].kind,
            state=(),
            reset_call=None,
        )
        self.functional.add(name)
        for firing in members:
            self.ident[firing.node] = name

    # -- the networkx graph -----------------------------------------------------------------------

    def _connect(self) -> None:
        for node in self.nodes:
            if node.op == "get_attr" or is_item(node) or parameter_behind(node) is not None:
                continue
            name = self.ident[node]
            if name not in self.out:
                self.out.add_node(name, **self._attributes(node), calls=0)
            self.out.nodes[name]["calls"] += times(node)
            for source in node.all_input_nodes:
                self._edge(source, name)

    def _edge(self, source: fx.Node, target: str) -> None:
        origin = source
        while is_item(origin):
            origin = origin.args[0]  # type: ignore[assignment]
        name = self.ident[origin]
        if name not in self.out:
            return  # parameters and constants are no nodes
        info: ValueInfo | None = source.meta.get("value")
        signal = self.signals[source]
        measured = {info.measured} if info is not None and info.varied else set()
        if self.out.has_edge(name, target):
            known = self.out.edges[name, target]
            signal, measured = join([signal, known["signal"]]), measured | known["measured"]
        self.out.add_edge(
            name,
            target,
            signal=signal,
            measured=measured - {None},
            shape=info.shape if info else None,
            time_axis=self._time_axis(source),
        )

    def _time_axis(self, node: fx.Node) -> int | None:
        return None if self.reader is None else self.reader.time_axis(node)

    def _attributes(self, node: fx.Node) -> dict[str, object]:
        info: ValueInfo | None = node.meta.get("value")
        module = node.meta.get("module")
        op = type(module).__name__ if module is not None else name_of(node)
        return {"kind": self._kind(node), "op": op, "shape": info.shape if info else None}

    def _kind(self, node: fx.Node) -> NodeKind:
        if node.op in ("placeholder", "output"):
            return "input" if node.op == "placeholder" else "output"
        if self.flow.is_neuron(node):
            return "neuron"
        if self.flow.is_layer(node):
            return "layer"
        module = node.meta.get("module")
        name = module_family(module) if module is not None else op_name(node)
        return kind_of_op(name, len(node.all_input_nodes))

    # -- records ----------------------------------------------------------------------------------

    def finish(self) -> SpikingGraph:
        calls: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op != "get_attr":
                calls.setdefault(self.ident[node], []).append(node)
        self.fused = {
            name: nodes
            for name, nodes in calls.items()
            if isinstance(nodes[0].meta.get("module"), ATOMIC)
        }
        layers = {
            name: self._layer_record(name, module, calls.get(name, []))
            for name, module in nn.Module.named_modules(self.trace.model)
            if is_weight_layer(module)
        }
        for name in [self.ident[n] for n in self.nodes if self.flow.is_layer(n)]:
            if name not in layers:
                layers[name] = self._layer_record(
                    name, calls[name][0].meta.get("module"), calls[name]
                )
        for name, nodes in self.multiplied.items():
            if name not in layers:  # beside another parameter in the same product
                layers[name] = self._layer_record(name, None, nodes)
        layers |= self._fused_weights()
        layers |= self._weights_in_neurons(layers, calls)
        neurons = {name: self._neuron_record(name, calls.get(name, [])) for name in self.specs}
        neurons = with_layers(neurons, layers)
        self._note_unused(layers)
        reader = self.reader
        return SpikingGraph(
            self.out,
            self._with_heads(layers),
            neurons,
            find_chains(calls, self.ident, self._kind),
            self.trace.route,
            tuple(self.notes),
            self.trace.graph,
            None if reader is None else reader.spaces,
            () if reader is None else tuple(reader.attachments),
        )

    def _layer_record(
        self, name: str, module: nn.Module | None, calls: list[fx.Node]
    ) -> LayerRecord:
        kind = layer_kind(module)
        weight = getattr(module, "weight", None)
        shape = self._raw_shape(name) if module is None else tuple(getattr(weight, "shape", ()))
        if name in self.owned:
            inside = self.owned[name]
            why = f"belongs to the neuron {inside}, which stays as it is"
            count = sum(map(times, calls))
            return LayerRecord(name, kind, shape, count, inside=inside, undecided=why)
        if not calls:
            return self._inner_record(name, kind, shape)
        pre = unique(s for call in calls for s in self.flow.backward(call)[1])
        ahead = [self.flow.forward(call) for call in calls]
        post = unique(n for neurons, _, _ in ahead for n in neurons)
        sources = [s for call in calls for s in self.flow.data_inputs(call)[:1]]
        info: ValueInfo | None = sources[0].meta.get("value") if sources else None
        result: ValueInfo | None = calls[0].meta.get("value")
        spiking = [n for n in post if self.specs[n].kind != "integrator"]
        product = self._product(name)
        return LayerRecord(
            name=name,
            kind=kind,
            weight_shape=shape,
            calls=sum(map(times, calls)),
            pre=pre,
            post=post,
            feeds=unique(n for _, layers, _ in ahead for n in layers),
            input_signal=join([self.signals[s] for s in sources]) if sources else None,
            input_shape=info.shape if info else None,
            output_shape=result.shape if result else None,
            time_axis=self._time_axis(sources[0]) if sources else None,
            multiplies_input=self.flow.multiplies_input(calls[0]),
            is_readout=not spiking and any(left for _, _, left in ahead),
            axis=product.axis,
            groups=product.groups,
            undecided=product.undecided or self.trace.computed.get(name, ""),
        )

    def _product(self, name: str) -> Product:
        """What all products with a raw parameter agree on."""
        found = set(self.products.get(name, ()))
        if len(found) > 1:
            axes = sorted({str(product.axis) for product in found})
            why = next((p.undecided for p in found if p.undecided), "")
            return Product(name, None, undecided=why or f"summed along axes {', '.join(axes)}")
        return found.pop() if found else Product(name, None)

    def _inner_record(self, name: str, kind: str, shape: tuple[int, ...]) -> LayerRecord:
        """A layer nobody called from outside: inside a neuron, or unused."""
        seen = self.trace.inner.get(name)
        if seen is None:
            inside = next((n for n in self.specs if name.startswith(f"{n}.")), None)
            fused = next((n for n in self.fused if name.startswith(f"{n}.")), None)
            if fused is not None and inside is None:
                return self._fused_record(name, kind, shape, fused)
            return LayerRecord(name, kind, shape, inside=inside, undecided=self._hidden(name))
        spec = self.specs.get(seen.inside)
        pair = (seen.inside,) if spec is not None else ()
        self.out.add_node(name, kind="layer", op=kind, shape=seen.output_shape, calls=seen.calls)
        for edge in ((seen.inside, name), (name, seen.inside)) if spec is not None else ():
            signal = of_kind(spec.output) if spec and edge[1] == name else ANALOG
            self.out.add_edge(
                *edge, signal=signal, measured=set(), shape=seen.input_shape, time_axis=None
            )
        return LayerRecord(
            name=name,
            kind=kind,
            weight_shape=shape,
            calls=seen.calls,
            pre=pair,
            post=pair,
            input_signal=of_kind(spec.output) if spec is not None else ANALOG,
            input_shape=seen.input_shape,
            output_shape=seen.output_shape,
            inside=seen.inside,
        )

    def _fused_record(
        self, name: str, kind: str, shape: tuple[int, ...], fused: str, undecided: str = ""
    ) -> LayerRecord:
        """A weight that one of torch's own modules uses by itself (an attention's projections)."""
        calls = self.fused[fused]
        ahead = [self.flow.forward(call) for call in calls]
        post = unique(n for neurons, _, _ in ahead for n in neurons)
        return LayerRecord(
            name,
            kind,
            shape,
            calls=sum(map(times, calls)),
            pre=unique(s for call in calls for s in self.flow.backward(call)[1]),
            post=post,
            feeds=unique(n for _, layers, _ in ahead for n in layers),
            input_signal=ANALOG,
            is_readout=not post and any(left for _, _, left in ahead),
            undecided=undecided,
        )

    def _fused_weights(self) -> dict[str, LayerRecord]:
        """Matrices of torch's own modules that are no layers (in_proj_weight, weight_hh_l0)."""
        found: dict[str, LayerRecord] = {}
        for fused, calls in self.fused.items():
            module = calls[0].meta["module"]
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and min(parameter.shape[:2]) > 1:
                    name = f"{fused}.{key}".lstrip(".")
                    why = f"{type(module).__name__} computes with it in one fused call"
                    shape = tuple(parameter.shape)
                    found[name] = self._fused_record(name, "functional", shape, fused, why)
        return found

    def _hidden(self, name: str) -> str:
        """Why nothing is known of a layer's use, where that was not followed."""
        for note in self.trace.notes:
            if note.where and name.startswith(f"{note.where}.") and "not be followed" in note.text:
                return f"how {note.where} uses its weight could not be followed; see trace's notes"
        return ""

    def _raw_shape(self, name: str) -> tuple[int, ...]:
        tensor = dict(nn.Module.named_parameters(self.trace.model)).get(name)
        return () if tensor is None else tuple(tensor.shape)

    def _weights_in_neurons(
        self, layers: Mapping[str, LayerRecord], calls: Mapping[str, list[fx.Node]]
    ) -> dict[str, LayerRecord]:
        """Matrices that a neuron module multiplies by itself (Norse's recurrent cells)."""
        found: dict[str, LayerRecord] = {}
        modules = dict(nn.Module.named_modules(self.trace.model))
        for neuron in self.trace.neurons:
            for name, parameter in nn.Module.named_parameters(modules[neuron]):
                full = f"{neuron}.{name}".lstrip(".")
                owner = full.rpartition(".")[0]
                if parameter.dim() < 2 or min(parameter.shape[:2]) < 2 or owner in layers:
                    continue
                recurrent = "rec" in name
                driving = [] if recurrent else [c.args[0] for c in calls.get(neuron, []) if c.args]
                inputs = [source for source in driving if isinstance(source, fx.Node)]
                pre = (neuron,) if recurrent else unique(s for n in inputs for s in self.flow.at(n))
                found[full] = LayerRecord(
                    full,
                    "functional",
                    tuple(parameter.shape),
                    calls=1,
                    pre=pre,
                    post=(neuron,),
                    input_signal=join([self.signals[n] for n in inputs]) if inputs else None,
                    inside=neuron,
                    undecided=f"used inside the neuron {neuron}, which stays as it is",
                )
                self._note(full, f"a raw weight used inside the neuron {neuron}")
        return found

    def _neuron_record(self, name: str, calls: list[fx.Node]) -> NeuronRecord:
        signals, shape = [], None
        for call in calls:
            info: ValueInfo | None = call.meta.get("value")
            spikes = call
            if info is not None and info.shape is None:
                items = [u for u in call.users if is_item(u) and u.args[1] == 0]
                spikes = items[0] if items else call
            signals.append(self.signals[spikes])
            emitted: ValueInfo | None = spikes.meta.get("value")
            shape = shape or (emitted.shape if emitted else None)
        output = join(signals) if signals else of_kind(self.specs[name].output)
        return NeuronRecord(
            name=name,
            spec=self.specs[name],
            calls=sum(map(times, calls)),
            output=self.emitted.get(name, output),
            functional=name in self.functional,
            shape=shape,
        )

    def _note_unused(self, layers: Mapping[str, LayerRecord]) -> None:
        if self.trace.graph is None:
            return
        for record in layers.values():
            if not record.calls and f"{record.name}.weight".lstrip(".") not in layers:
                self._note(record.name, "no call of this layer was seen in the traced forward")
        named = {str(n.target) for n in self.nodes if n.op == "get_attr"}
        owners = {r.name for r in layers.values()}
        leaves = {str(n.target) for n in self.nodes if n.op == "call_module"}
        for name, parameter in nn.Module.named_parameters(self.trace.model):
            owner = name.rpartition(".")[0]
            inside = any(name.startswith(f"{leaf}.") for leaf in leaves)
            if parameter.dim() < 2 or owner in owners or name in named | owners or inside:
                continue
            self._note(name, f"parameter {tuple(parameter.shape)} was not seen in use")

    def _with_heads(self, layers: dict[str, LayerRecord]) -> dict[str, LayerRecord]:
        """Mark layers after which no other layer comes; loops over time are looked through."""
        heads: set[str] = set()
        loops = nx.condensation(self.out)
        before_others: dict[int, bool] = {}
        for loop in reversed(list(nx.topological_sort(loops))):
            inside_loop = [
                name
                for name in loops.nodes[loop]["members"]
                if name in layers and layers[name].inside is None
            ]
            later = any(before_others[after] for after in loops.successors(loop))
            before_others[loop] = later or bool(inside_loop)
            if len(inside_loop) == 1 and not later:
                heads.add(inside_loop[0])
        return {name: replace(record, is_head=name in heads) for name, record in layers.items()}
