# SPDX-License-Identifier: Apache-2.0
"""From the trace of a model to a program, or to the reason why there is none.

Each recorded operation is looked at once, in order.  Weight layers, neurons, pools and joins become
operations on values; reshapes only rename axes; a loop over time in the model's own code is rolled
up again (:mod:`spikenm_fx.program.draft`).  Which axis of the input is time and which is batch
follows from who uses it: layers say what is a channel, neurons and loops what is time, and what is
left is batch, of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from spikenm_fx._torch import tree_flatten
from spikenm_fx.pack.eligible import hooked
from spikenm_fx.pack.weights.format import PackedWeight
from spikenm_fx.pattern import NM, is_weight_layer
from spikenm_fx.program.axes import Atom, Layout, fresh
from spikenm_fx.program.calls import Call
from spikenm_fx.program.code import RANK, Axis, Code, Port, Program, Role, ValueType
from spikenm_fx.program.draft import REST, Draft, First, NotLowered, Partial, Ref, State
from spikenm_fx.program.functions import FUNCTIONS
from spikenm_fx.program.layers import Layers
from spikenm_fx.program.neurons import Neurons, Returned
from spikenm_fx.program.norms import batch_norm, runs_elsewhere
from spikenm_fx.program.order import needed, ordered
from spikenm_fx.program.rolled import Rolled
from spikenm_fx.program.written import OTHER_WRITES, stacked_writes
from spikenm_fx.trace import NeuronSpec, SpikingGraph
from spikenm_fx.trace.analysis.nodes import op_name_or_none, readers
from spikenm_fx.trace.analysis.ops import module_family, op_name
from spikenm_fx.trace.neurons.recurrent import Recurrence, linear_of

__all__ = ["Lowered", "Probe", "lower"]

_PLAIN = (Tensor, int, float, str, slice, torch.dtype, torch.device)
_LAYERS = ("linear", "conv1d", "conv2d")
_ONES = ("ones_like", "new_ones")
_PRODUCTS = ("matmul", "mm")
_ZEROS = ("zeros_like", "zeros", "new_zeros")
_CREATED = ("ones", "full", "eye", "arange", "linspace")
"""Operations that make a constant of numbers alone."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How a neuron's tensors in the model's forward become the tokens of its operation.

    Attributes:
        name: of the module.
        spec: its rule.
        sizes: of the parts of all axes, on the examples.
        order: of these parts: time if any, batch, height, width, channels.
        timed: one call has all time steps.
        batch: the part that is the first axis of the batch, or None.
        recurrence: what it adds to its input itself.
    """

    name: str
    spec: NeuronSpec
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    timed: bool
    batch: int | None
    recurrence: Recurrence | None = None

    def tokens(self, x: Tensor, numbers: int, steps: int, batch: int | None) -> Tensor:
        """``(steps, batch, numbers)`` of one call's tensor.

        Args:
            x: of the shape that it has there.
            numbers: of a token.
            steps: time steps of the whole forward.
            batch: size of the first axis of the batch.
        """
        sizes = list(self.sizes)
        if self.timed:
            sizes[self.order[0]] = steps
        if self.batch is not None and batch is not None:
            sizes[self.batch] = batch
        return x.reshape(sizes).permute(self.order).reshape(steps if self.timed else 1, -1, numbers)


class Lowered:
    """A program with its tensors.

    Attributes:
        program: the operations.
        packed: the weights, by layer.
        tensors: biases, scales and neuron parameters, by name.
        probes: what each neuron is given, by the number of its operation.
        folded: what of samples and steps, which share the input's first axis, is how many.
        taken: of the tensors that the model is given, in order, those that the program reads.
        names: of these tensors in the model's forward.
        returns: of each thing that the model returns whether it is an output; the others are
            states, which a program keeps itself.
    """

    def __init__(
        self,
        program: Program,
        packed: dict[str, PackedWeight],
        tensors: dict[str, Tensor],
        probes: dict[int, Probe],
        returns: tuple[bool, ...],
        folded: tuple[str, int] | None,
        taken: tuple[int, ...] = (0,),
    ) -> None:
        self.program, self.packed, self.tensors, self.probes = program, packed, tensors, probes
        self.returns, self.folded, self.taken = returns, folded, taken
        self.names: tuple[str, ...] = ("x",)


def lower(
    model: nn.Module,
    graph: SpikingGraph,
    *,
    dtype: torch.dtype | None = None,
    nm: NM | None = None,
) -> Lowered:
    """The program of a model.

    Args:
        model: in eval mode, folded, at rest.
        graph: its trace on examples; the program runs on other batch sizes and numbers of steps.
        dtype: of the stored weights; None keeps fp32.
        nm: what each layer must be that is not entirely dense; None for whatever it is.

    Raises:
        NotLowered: naming the part that has no operation, and why.
        PackError: for a weight that cannot be packed.
    """
    try:
        return _lowered(model, graph, dtype, nm, rolled=False)
    except NotLowered as plain:
        try:
            return _lowered(model, graph, dtype, nm, rolled=True)
        except NotLowered as error:
            error.carries = plain.carries
            raise error if plain.carries else plain from None


def _lowered(
    model: nn.Module, graph: SpikingGraph, dtype: Any, nm: NM | None, *, rolled: bool
) -> Lowered:
    """The program, once it is known which axes of the inputs are axes of each token.

    An axis that no layer reads as channels or pixels seems to be the batch's, until an operation
    mixes what lies along it: then all is read again with that axis as one of each token.
    """
    tokens: frozenset[tuple[int, int]] = frozenset()
    while True:
        lowering = _Lowering(model, graph, dtype, nm, rolled=rolled, tokens=tokens)
        try:
            return lowering.run()
        except NotLowered as error:
            more = lowering.places_of(error.inside)
            if more <= tokens:
                raise
            tokens |= more


class _Lowering:
    def __init__(
        self,
        model: nn.Module,
        graph: SpikingGraph,
        dtype: Any,
        nm: NM | None,
        *,
        rolled: bool,
        tokens: frozenset[tuple[int, int]],
    ) -> None:
        if graph.operations is None:
            raise NotLowered("", "it was not traced: give example inputs")
        self.model, self.graph = model, graph
        self.nodes: list[fx.Node] = list(stacked_writes(graph.operations).nodes)
        calls: dict[str, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        specs = {n: record.spec for n, record in graph.neurons.items() if not record.functional}
        self.draft = Draft(model)
        self.layers = Layers(self.draft, dtype, nm)
        self.neurons = Neurons(self.draft, self.layers, specs, calls)
        self.rolled = Rolled(self.draft, self.nodes) if rolled else None
        self.tokens = tokens
        self.read: dict[tuple[int, int], Atom] = {}  # axes of the inputs
        self.env: dict[fx.Node, Any] = {}
        self.inputs: list[Ref] = []
        self.given: int = 0
        self.taken: list[int] = []  # of the placeholders, those that are inputs
        self.outputs: list[Ref] = []
        self.returns: list[bool] = []

    def run(self) -> Lowered:
        if hooked(self.model):
            raise NotLowered("", "hooks on the model see what it takes or gives; remove them")
        for node in self.nodes:
            self.env[node] = self._visit(node)
        if not self.inputs:
            raise NotLowered("", "its forward reads no tensor that was given")
        if self.rolled is not None:
            self.rolled.finish()
        self._check_time()
        self.layers.store()
        program = self._program()
        places = {id(op): number for number, op in enumerate(program.ops)}
        probes = {places[id(op)]: self._probe(*seen) for op, seen in self.neurons.inputs}
        tensors, returns = self.draft.tensors, tuple(self.returns)
        folded, taken = self.draft.folded, tuple(self.taken)
        if folded is not None and len(taken) > 1:
            raise NotLowered("", "samples and steps share an axis of one of its several inputs")
        return Lowered(program, self.layers.packed, tensors, probes, returns, folded, taken)

    def places_of(self, atoms: tuple[Atom, ...]) -> frozenset[tuple[int, int]]:
        """Which axes of the inputs some axes are.

        Args:
            atoms: of any value.
        """
        wanted = {(atom,) for atom in atoms}
        return frozenset(place for place, atom in self.read.items() if fresh((atom,)) in wanted)

    def _probe(self, name: str, ref: Ref) -> Probe:
        layout, time = ref.value.layout, self.draft.time
        atoms = ref.renewed().atoms
        first = [time] if time in atoms else []
        pixels = [a for a in (layout.height, layout.width) if a in atoms]
        order = [*first, *self._batch(), *pixels, *(layout.channels or ())]
        sizes = tuple(atom.size for atom in atoms)
        places = tuple(atoms.index(atom) for atom in order if atom is not None)
        batch = next((atoms.index(atom) for atom in self._batch() if atom in atoms), None)
        recurrence = self.neurons.recurrences.get(name)
        spec = self.neurons.specs[name]
        return Probe(name, spec, sizes, places, bool(first), batch, recurrence)

    # -- operations -------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "output":
            return self._output(self._values(node.args[0]))
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_module":
            return self._module(node, str(node.target))
        name = op_name(node)
        where = f"{name} in {node.meta.get('scope') or 'the forward'}"
        if node.meta.get("fires") and self.rolled is None:
            raise NotLowered(where, "a neuron is code in a forward there", carries=True)
        if name == "setitem" and node.users:
            raise NotLowered(where, OTHER_WRITES, carries=True)
        if name in _ONES and node.meta["value"].shape is not None:
            return self._known(node, torch.ones(node.meta["value"].shape))
        if self.rolled is not None:
            if name in _ZEROS and node.meta["value"].shape is not None:
                return torch.zeros(node.meta["value"].shape)
            leaves = tree_flatten((self._values(node.args), self._values(node.kwargs)))[0]
            if self.rolled.is_first(leaves):
                return self.rolled.first(node)
        elif name in _ZEROS:
            return REST
        constant = self._constant(node)
        if constant is not None:
            return self._known(node, constant)
        if name in _LAYERS or (name in _PRODUCTS and self._by_a_constant(node)):
            return self._functional(self._call(node, where), name)
        if name not in FUNCTIONS:
            if not node.users:
                return None
            raise NotLowered(where, "this operation has none in a program")
        return FUNCTIONS[name](self._call(node, where))

    def _known(self, node: fx.Node, constant: Any) -> Any:
        """A constant, of which a loop's states may start."""
        if self.rolled is not None:
            self.rolled.constants[node] = constant
        return constant

    def _constant(self, node: fx.Node) -> Any:
        """What comes of tensors of the model alone, such as a view of a parameter; else None."""
        args, kwargs = self._values(node.args), self._values(node.kwargs)
        leaves = tree_flatten((args, kwargs))[0]
        known = all(x is None or x is Ellipsis or isinstance(x, _PLAIN) for x in leaves)
        created = op_name(node) in _CREATED
        if not known or not (created or any(isinstance(leaf, Tensor) for leaf in leaves)):
            return None
        if not callable(node.target) or "rand" in op_name(node):
            return None
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def _by_a_constant(self, node: fx.Node) -> bool:
        """Whether a product's second factor is a matrix of the model."""
        factor = self._values(node.args[1]) if len(node.args) > 1 else None
        return isinstance(factor, Tensor) and factor.dim() == 2

    def _functional(self, call: Call, kind: str) -> Ref:
        """``F.linear``, ``F.conv`` or a product with a parameter, or what comes of one alone."""
        weight, bias = call.get(1, "weight"), call.get(2, "bias")
        names = {id(p): n for n, p in self.model.named_parameters(remove_duplicate=False)}
        if not isinstance(weight, Tensor):
            raise call.refuse("its weight is computed from the input")
        if kind in _PRODUCTS:
            weight, bias = weight.t(), None
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None and not isinstance(bias, Tensor):
            raise call.refuse("its bias is computed in the forward")
        layer: Any
        if kind == "linear" or kind in _PRODUCTS:
            layer = linear_of(weight, bias)
        else:
            make = nn.Conv1d if kind == "conv1d" else nn.Conv2d
            options = ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)
            given = {n: call.get(i, n, d) for i, (n, d) in enumerate(options, 3)}
            out, inner, *kernel = weight.shape
            size: Any = tuple(kernel)
            layer = make(inner * given["groups"], out, size, bias=bias is not None, **given)
            layer.weight = weight
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        assert call.shape is not None
        name = names.get(id(call.get(1, "weight")), call.node.name)
        return self.layers.layer(name, layer.eval(), call.ref(), call.shape)

    def _call(self, node: fx.Node, where: str) -> Call:
        info = node.meta.get("value")
        shape = None if info is None else info.shape
        args = tuple(self._values(arg) for arg in node.args)
        kwargs = self._values(node.kwargs)
        if self.rolled is not None and op_name_or_none(node) == "stack":
            args = (self.rolled.stacked(args[0]), *args[1:])
        elif (
            self.rolled is not None
            and str(node.target) not in self.neurons.specs
            and op_name_or_none(node) != "getitem"  # of steps that were taken apart
        ):
            args, kwargs = self.rolled.settled(node, args, kwargs)
        return Call(self.draft, node, where, args, kwargs, shape)

    def _values(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return _renewed(self.env[arg])
        if isinstance(arg, dict):
            return {key: self._values(value) for key, value in arg.items()}
        if isinstance(arg, tuple | list):
            items = [self._values(a) for a in arg]
            return items if isinstance(arg, list) else tuple(items)
        return arg

    def _placeholder(self, node: fx.Node) -> Any:
        info, place = node.meta.get("value"), self.given
        self.given += 1
        if info is None or info.shape is None or not node.users:
            return None
        if info.dtype != torch.float32:
            raise NotLowered(node.name, f"the model's input is {info.dtype}; float32 is required")
        if len(info.shape) > RANK:
            raise NotLowered(node.name, f"an input of more than {RANK} axes")
        atoms = tuple(Atom(size, f"axis {i} of the input") for i, size in enumerate(info.shape))
        self.read |= {(place, axis): atom for axis, atom in enumerate(atoms)}
        pixels = [atom for axis, atom in enumerate(atoms) if (place, axis) in self.tokens]
        if len(pixels) > 2:
            raise NotLowered(node.name, "more than two axes of it are axes of each token")
        layout = Layout(atoms)
        layout.set_pixels(pixels)
        value = self.draft.value(layout)
        self.inputs.append(Ref(value, tuple((atom,) for atom in atoms)))
        self.taken.append(place)
        return self.inputs[-1]

    def _attribute(self, node: fx.Node) -> Any:
        """A parameter, buffer or constant; what is empty or zero may be a state at rest."""
        found: Any = self.model
        for part in str(node.target).split("."):
            found = getattr(found, part, None)
        if found is None:
            found = node.meta.get("tensor")
        is_state = isinstance(found, Tensor) and not isinstance(found, nn.Parameter)
        if self.rolled is None and is_state and not bool(found.any()):
            return REST
        return found

    def _module(self, node: fx.Node, name: str) -> Any:
        module = node.meta["module"]
        if self.rolled is not None:
            leaves = tree_flatten((self._values(node.args), self._values(node.kwargs)))[0]
            if self.rolled.is_first(leaves):
                if name in self.neurons.specs:
                    self.neurons.pass_first(name)
                return self.rolled.first(node)
            if name not in self.neurons.specs and all(isinstance(x, Tensor) for x in leaves):
                with torch.no_grad():  # of what the first step starts with
                    made: Tensor = module(*self._values(node.args))
                self.rolled.constants[node] = made
                return made
        call = self._call(node, name or type(module).__name__)
        if name in self.neurons.specs:
            given = (*call.args[1:], *call.kwargs.values())
            return self.neurons.call(name, module, call.ref(), given)
        if is_weight_layer(module):
            assert call.shape is not None
            return self.layers.layer(name, module, call.ref(), call.shape)
        family = module_family(module)
        if family == "norm" and runs_elsewhere(module, call.ref()):
            return batch_norm(name, module, call)
        if family == "norm" and not isinstance(module, nn.LayerNorm):
            alone = len(readers(node.all_input_nodes[0])) == 1
            return self.layers.norm(name, module, call.ref(), alone=alone)
        if hooked(module):
            raise NotLowered(name, "hooks see what it takes or gives; remove them")
        if isinstance(module, nn.LayerNorm):
            family = "layer_norm"
        family = _BY_CLASS.get(family, family)
        if family not in FUNCTIONS or not type(module).__module__.startswith("torch.nn."):
            raise NotLowered(name, f"a {type(module).__name__} has no operation")
        call.kwargs |= {key: getattr(module, key) for key in _SETTINGS if hasattr(module, key)}
        return FUNCTIONS[family](call)

    # -- outputs ----------------------------------------------------------------------------------

    def _output(self, given: Any) -> None:
        while isinstance(given, tuple | list) and len(given) == 1:
            given = given[0]
        if isinstance(given, Returned):
            given = (given.spikes, given.state)
        many = isinstance(given, tuple | list)
        for each in given if many else (given,):
            self.returns.append(not (many and _is_state(each)))
            if self.returns[-1]:
                self.outputs.append(self._port(each))
        if not self.outputs:
            raise NotLowered("", "the model returns nothing but states")

    def _port(self, given: Any) -> Ref:
        if isinstance(given, State):
            raise NotLowered(
                given.neuron,
                "the model returns its state; let the forward return spikes or membranes alone, a "
                "program keeps states itself",
            )
        if isinstance(given, First):
            raise NotLowered("", "the model returns what its first time step made")
        if isinstance(given, Partial):
            raise NotLowered("", "the model returns a sum over some of the time steps")
        if not isinstance(given, Ref):
            raise NotLowered("", f"the model returns {type(given).__name__}, which is no value")
        if given.step is None:
            return given
        time = self.draft.time
        assert time is not None
        if given.step != time.size - 1:
            raise NotLowered("", "the model returns a step in the middle of its input")
        layout = given.value.layout
        atoms = tuple(atom for atom in layout.atoms if atom is not time)
        new = Layout(atoms, layout.channels, layout.height, layout.width)
        last = Ref(given.value, given.axes)
        return Ref(self.draft.apply(Code.REDUCE, new, last, settings=(2,)), given.axes)

    # -- the program ------------------------------------------------------------------------------

    def _check_time(self) -> None:
        time = self.draft.time
        for layout, name in self.draft.whole:
            if time is not None and time in layout.lead:
                raise NotLowered(
                    name, "it takes all time steps of a layer as one step", inside=(time,)
                )
        for name, count in self.draft.steps.items():
            if time is not None and count != time.size:
                why = f"a loop calls it {count} times for {time.size} time steps"
                raise NotLowered(name, why, inside=(time,))

    def _batch(self) -> list[Atom]:
        for ref in self.inputs:
            if ref.value.layout.channels is None:
                raise NotLowered("", "no layer reads its input, so that its axes are not known")
        leads = [
            [atom for atom in ref.value.layout.lead if atom is not self.draft.time]
            for ref in self.inputs
        ]
        for other in leads[1:]:
            if other != leads[0] and not self.draft.same(tuple(other), tuple(leads[0])):
                raise NotLowered("", "its inputs differ in the axes of the batch")
        return leads[0]

    def _program(self) -> Program:
        batch, time = self._batch(), self.draft.time
        types = []
        for value in self.draft.values:
            lead = [atom for atom in value.layout.lead if atom is not time]
            if lead != batch:
                raise NotLowered("", "a value inside it has not the batch axes of its input")
            timed = time is not None and time in value.layout.lead
            types.append(ValueType(value.bits, timed, *value.layout.size))
        outputs = tuple(self._axes(ref.renewed(), batch, output=True) for ref in self.outputs)
        ports = tuple(self._axes(ref, batch, output=False) for ref in self._unfolded())
        used = {number for op in self.draft.ops for number in op.inputs}
        used |= {port.value for port in outputs}
        for op in self.draft.ops:
            if op.code is Code.NEURON and op.outputs[1] not in used:
                op.outputs = op.outputs[:1]
        ops = ordered(needed(self.draft.ops, {port.value for port in outputs}))
        return Program(types, ops, ports, outputs, self.draft.constant_steps)

    def _unfolded(self) -> list[Ref]:
        """The inputs with an axis of its own for each of their parts."""
        refs = [ref.renewed() for ref in self.inputs]
        return [replace(ref, axes=tuple((atom,) for atom in ref.atoms)) for ref in refs]

    def _axes(self, ref: Ref, batch: list[Atom], *, output: bool) -> Port:
        axes: list[Axis] = []
        layout = ref.value.layout
        for group in ref.axes:
            if not group:
                axes.append(Axis(Role.CHANNEL, 1))
            for place, atom in enumerate(group):
                axes.append(self._axis(atom, layout, batch, joined=place > 0, output=output))
        seen = [atom for atom in ref.atoms if atom in (layout.channels or ())]
        if len(axes) > RANK or seen != list(layout.channels or ()):
            raise NotLowered("", "an output has too many axes, or its channels in another order")
        return Port(ref.value.number, tuple(axes))

    def _axis(
        self, atom: Atom, layout: Layout, batch: list[Atom], *, joined: bool, output: bool
    ) -> Axis:
        if atom is self.draft.time:
            return Axis(Role.TIME, atom.size, joined)
        if atom in batch:
            return Axis(Role.BATCH, batch.index(atom) if output else atom.size, joined)
        role = (
            Role.HEIGHT
            if atom is layout.height
            else Role.WIDTH
            if atom is layout.width
            else Role.CHANNEL
        )
        return Axis(role, atom.size, joined)


def _is_state(given: Any) -> bool:
    """States, lists of them, and places where there is none."""
    if isinstance(given, tuple | list):
        return all(map(_is_state, given))
    return given is None or isinstance(given, State)


def _renewed(found: Any) -> Any:
    """What an operation gave, in the atoms that axes were split into since."""
    if isinstance(found, Ref):
        return found.renewed()
    if isinstance(found, Returned):
        state = found.state.renewed() if isinstance(found.state, Ref) else found.state
        return Returned(found.spikes.renewed(), state)
    if isinstance(found, list | tuple):
        return type(found)(map(_renewed, found))
    return found


_BY_CLASS = {
    **{"Sigmoid": "sigmoid", "Tanh": "tanh", "GELU": "gelu", "SiLU": "silu"},
    **{"Softmax": "softmax", "LogSoftmax": "log_softmax"},
}
"""Operations that torch also has as modules."""

_SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "return_indices", "output_size"),
    *("start_dim", "end_dim", "count_include_pad", "divisor_override"),
    *("scale_factor", "size", "mode", "normalized_shape", "weight", "bias", "eps"),
    *("approximate", "dim"),
)
