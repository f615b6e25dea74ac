# SPDX-License-Identifier: Apache-2.0
"""How each recorded operation carries channel spaces from its inputs to its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace.ops import ELEMENTWISE, module_family, op_name
from spikenm_fx.trace.record import Trace
from spikenm_fx.trace.spaces import Atom, Dim, Layout, Spaces, plain, size_of
from spikenm_fx.trace.values import is_matrix

__all__ = ["Attachment", "Reader", "Role"]


Role = Literal["producer", "consumer", "attached"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """``tensor``'s ``axis`` runs over the channels of ``dim``."""

    tensor: str
    axis: int
    dim: Dim
    role: Role


class NotUnderstood(Exception):
    """This operation mixes channels in a way no rule describes."""


_SURPRISES = (IndexError, ValueError, TypeError, KeyError, AttributeError, AssertionError)
"""What an operation called in an unforeseen way makes a rule raise."""


class Reader:
    """Walk the recorded operations once; afterwards ``attachments`` tells who holds what."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.spaces = Spaces()
        self.attachments: list[Attachment] = []
        self.layouts: dict[fx.Node, Layout] = {}
        self._items: dict[fx.Node, dict[Any, Layout]] = {}
        self._neurons: dict[fx.Node, Layout] = {}
        self._times: list[Dim] = []
        self._time_spaces: frozenset[int] | None = None
        self._outputs: dict[str, Dim] = {}
        self._inputs: dict[str, Dim] = {}
        self._names = {
            id(p): n
            for n, p in (
                *nn.Module.named_parameters(trace.model),
                *nn.Module.named_buffers(trace.model),
            )
        }
        self._names_of_matrices = {
            n: is_matrix(p) for n, p in nn.Module.named_parameters(trace.model)
        }
        self._uses = _owners(trace.model)

    def read(self) -> None:
        """Visit every operation; what no rule covers freezes its inputs."""
        assert self.trace.graph is not None
        for node in self.trace.graph.nodes:
            try:
                self.layouts[node] = self._visit(node)
            except (NotUnderstood, *_SURPRISES) as error:
                label = str(node.target) if node.op == "call_module" else _name(node)
                reason = f"{node.name}: {error if isinstance(error, NotUnderstood) else label}"
                for source in node.all_input_nodes:
                    self._freeze(source, reason)
                self.layouts[node] = plain(_shape(node))
        for space, reason in self._shared_weights():
            self.spaces.freeze(space, reason)

    def _shared_weights(self) -> list[tuple[Dim, str]]:
        """Weights that several modules hold are permuted for all of them or not at all."""
        shared = {n for names in self._uses.values() if len(names) > 1 for n in names}
        return [
            (a.dim, f"{a.tensor}: several modules share this tensor")
            for a in self.attachments
            if a.tensor in shared
        ]

    # -- dispatch ----------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Layout:
        if node.op == "placeholder":
            return self._input(_shape(node), "input of the model")
        if node.op == "get_attr":
            return self._parameter(node)
        if node.op == "output":
            for source in node.all_input_nodes:
                self._freeze(source, "output of the model")
            return ()
        if node.op == "call_module":
            return self._module(node)
        name = _name(node)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, node)
        if name in ELEMENTWISE or name in ("surrogate", "softmax", "log_softmax"):
            return self._elementwise(node, node.all_input_nodes)
        if "pool" in name or name in ("interpolate", "upsample") or "upsample" in name:
            return self._resized(node)
        if not node.all_input_nodes:
            return plain(_shape(node))  # a factory
        raise NotUnderstood(f"no rule for {name}")

    def _input(self, shape: tuple[int, ...], reason: str) -> Layout:
        """Axes that may be followed (is it time?) but never permuted."""
        layout = []
        for size in shape:
            space = self.spaces.new(size) if size > 1 else None
            if space is not None:
                self.spaces.freeze_space(space, reason)
            layout.append(((Atom(size, space),),))
        return tuple(layout)

    def time_axis(self, node: fx.Node) -> int | None:
        """The axis of ``node``'s tensor along which time runs, alone or folded with the batch."""
        if self._time_spaces is None:  # asked for each edge, once everything is read
            labelled = self.spaces.labelled
            self._time_spaces = frozenset(s for axis in self._times for s in labelled(axis))
        if not self._time_spaces:
            return None
        for index, dim in enumerate(self.layouts.get(node, ())):
            if not self._time_spaces.isdisjoint(self.spaces.labelled(dim)):
                return index
        return None

    def _parameter(self, node: fx.Node) -> Layout:
        """A tensor of the model used in its own code: it goes along with whatever it meets."""
        tensor = node.meta.get("tensor")
        if not isinstance(tensor, Tensor) or id(tensor) not in self._names:
            return plain(_shape(node))
        layout = []
        for axis, size in enumerate(tensor.shape):
            dim: Dim = ((Atom(size, self.spaces.new(size) if size > 1 else None),),)
            if size > 1:
                self._attach(tensor, axis, dim)
            layout.append(dim)
        return tuple(layout)

    def _freeze(self, node: fx.Node, reason: str) -> None:
        for layout in (self.layouts.get(node, ()), *self._items.get(node, {}).values()):
            for dim in layout:
                self.spaces.freeze(dim, reason)

    def _attach(self, tensor: Tensor, axis: int, dim: Dim, role: Role = "attached") -> None:
        name = self._names.get(id(tensor))
        if name is None:
            raise NotUnderstood("a tensor that is no parameter or buffer of the model")
        self.attachments.append(Attachment(name, axis, dim, role))

    # -- modules -----------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> Layout:
        module: nn.Module = node.meta["module"]
        if is_weight_layer(module):
            return self._layer(node, module)
        if str(node.target) in self.trace.neurons:
            return self._neuron(node, module)
        family = module_family(module)
        if family == "norm":
            return self._norm(node, module)
        if any(True for _ in nn.Module.parameters(module)):
            raise NotUnderstood(f"{type(module).__name__} holds parameters of its own")
        if "flatten" in family:
            return self.spaces.reshape(self._source(node), _shape(node), node.name)
        if family in ("identity", "relu") or family in _ELEMENTWISE_MODULES:
            return self._elementwise(node, node.all_input_nodes)
        if "pool" in family or family in ("pad", "Upsample"):
            return self._resized(node)
        raise NotUnderstood(f"no rule for {type(module).__name__}")

    def _layer(self, node: fx.Node, module: Any) -> Layout:
        weight: Tensor = module.weight
        bias: Tensor | None = getattr(module, "bias", None)
        spatial = weight.dim() - 2
        groups = int(getattr(module, "groups", 1))
        transposed = isinstance(module, _ConvTransposeNd)
        return self._weighted(node, weight, bias, spatial, groups, transposed)

    def _weighted(
        self,
        node: fx.Node,
        weight: Tensor,
        bias: Tensor | None,
        spatial: int,
        groups: int,
        transposed: bool,
    ) -> Layout:
        """A linear or convolution: reads the input's channel axis and opens a space of its own."""
        layout, shape = self._source(node), _shape(node)
        channel = len(layout) - 1 - spatial
        for dim in layout[channel + 1 :]:
            self.spaces.freeze(dim, f"{node.name}: convolves along these channels")
        name = self._names[id(weight)]
        out_axis, in_axis = (1, 0) if transposed else (0, 1)
        source: Any = node.args[0] if node.args else node.all_input_nodes[0]
        seen, read = self._inputs.get(name), layout[channel]
        if seen is not None and not _is_uniform(source):
            read = self.spaces.unite(seen, read, node.name)
        if not _is_uniform(source):
            self._inputs[name] = read
        made = self._outputs.get(name)
        if made is None:
            size = shape[len(shape) - 1 - spatial]
            made = self._outputs[name] = ((Atom(size, self.spaces.new(size)),),)
            if groups > 1 and transposed:
                self.spaces.freeze(made, f"{node.name}: grouped transposed convolution")
                self.spaces.freeze(read, f"{node.name}: grouped transposed convolution")
            else:
                self._attach(weight, out_axis, made, "producer")
            if bias is not None:
                self._attach(bias, 0, made)
        if seen is None and not _is_uniform(source) and not (groups > 1 and transposed):
            if groups > 1:
                read = self._grouped(read, made, groups, node.name)
            self._attach(weight, in_axis, read, "consumer")
        return (*layout[:channel], made, *plain(shape[len(shape) - spatial :] if spatial else ()))

    def _grouped(self, read: Dim, made: Dim, groups: int, where: str) -> Dim:
        """Channels of a group stay in it: groups move as a whole, channels inside all alike."""
        inside, outside = size_of(read) // groups, size_of(made) // groups
        outer, inner = self.spaces.reshape((read,), (groups, inside), where)
        made_outer, _ = self.spaces.reshape((made,), (groups, outside), where)
        self.spaces.unite(outer, made_outer, where)
        return inner

    def _norm(self, node: fx.Node, module: Any) -> Layout:
        layout, shape = self._source(node), _shape(node)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            first = len(layout) - len(module.normalized_shape)
            pair: tuple[Any, ...] = (module.weight, getattr(module, "bias", None))
            for tensor in pair:
                for axis in range(len(module.normalized_shape)) if tensor is not None else ():
                    self._attach(tensor, axis, layout[first + axis])
            return layout
        features = int(getattr(module, "num_features", getattr(module, "num_channels", 0)))
        axis = 2 if getattr(module, "step_mode", "s") == "m" else 1
        if shape[axis] != features:
            fitting = [i for i, size in enumerate(shape) if size == features]
            axis = fitting[0]
        if isinstance(module, nn.GroupNorm):
            inside = features // module.num_groups
            self.spaces.reshape((layout[axis],), (module.num_groups, inside), node.name)
        own = (*nn.Module.parameters(module), *nn.Module.buffers(module))
        for tensor in own:
            if tensor.numel() == features and tensor.dim() == 1 and features > 1:
                self._attach(tensor, 0, layout[axis])
            elif tensor.numel() > 1:
                raise NotUnderstood(f"{type(module).__name__} holds a {tuple(tensor.shape)} tensor")
        return layout

    def _neuron(self, node: fx.Node, module: nn.Module) -> Layout:
        """Element-wise: spikes and states have the input's channels; own tensors go along."""
        spec = self.trace.neurons[str(node.target)]
        tensors = [n for n in node.all_input_nodes if _shape(n) == _shape(node.all_input_nodes[0])]
        layout = self.layouts[tensors[0]]
        for other in tensors[1:]:
            layout = self._unite_with(layout, other, node.name)
        recurrent = self._recurrent(node, layout) if spec.framework != "unknown" else set()
        for name, tensor in (
            *nn.Module.named_parameters(module),
            *nn.Module.named_buffers(module),
        ):
            if tensor.numel() > 1 and name not in spec.state and id(tensor) not in recurrent:
                self._attach_broadcast(tensor, layout, node.name)
        self._neurons[node] = layout
        for dim in layout if str(node.target) in self.trace.shown_states else ():
            self.spaces.freeze(dim, f"{node.name}: its state is an output of the model")
        if spec.time_axis is not None and not spec.folded_time:
            self._times.append(layout[spec.time_axis])
        shape = _shape(node)
        if not _is_container(node) and [size_of(d) for d in layout] != list(shape):
            return self._fitted(layout, shape, node.name)
        return layout

    def _recurrent(self, node: fx.Node, layout: Layout) -> set[int]:
        """Layers that a framework's neuron calls on its own spikes: both axes are its channels.

        Returns:
            The tensors that are accounted for.
        """
        done: set[int] = set()
        for name, call in self.trace.inner.items():
            if call.inside != str(node.target) or call.input_shape != call.output_shape:
                continue
            layer: Any = self.trace.model.get_submodule(name)
            channels = layout[len(layout) - 1 - (layer.weight.dim() - 2)]
            if int(getattr(layer, "groups", 1)) > 1:
                raise NotUnderstood(f"{name}: a grouped layer inside a neuron")
            self._attach(layer.weight, 0, channels)
            self._attach(layer.weight, 1, channels)
            if layer.bias is not None:
                self._attach(layer.bias, 0, channels)
            done |= {id(layer.weight), id(layer.bias)}
        return done

    def _fitted(self, layout: Layout, shape: tuple[int, ...], where: str) -> Layout:
        if len(layout) != len(shape):
            raise NotUnderstood("a neuron that changes the number of axes")
        for dim, size in zip(layout, shape, strict=True):
            if size_of(dim) != size:
                self.spaces.freeze(dim, f"{where}: changes the number of channels")
        return tuple(
            d if size_of(d) == s else plain((s,))[0] for d, s in zip(layout, shape, strict=True)
        )

    def _attach_broadcast(self, tensor: Tensor, layout: Layout, where: str) -> None:
        """A per-channel tensor, aligned from the right; or of one axis, by its length."""
        axes = [a for a, size in enumerate(tensor.shape) if size > 1]
        for axis in axes:
            place = len(layout) - tensor.dim() + axis
            if place < 0 or size_of(layout[place]) != tensor.shape[axis]:
                fitting = [
                    i
                    for i, dim in enumerate(layout)
                    if size_of(dim) == tensor.shape[axis] and self.spaces.labelled(dim)
                ]
                if len(axes) != 1 or len(fitting) != 1:
                    raise NotUnderstood(f"a tensor of shape {tuple(tensor.shape)} in {where}")
                place = fitting[0]
            self._attach(tensor, axis, layout[place])

    # -- functions ---------------------------------------------------------------------------------

    def _source(self, node: fx.Node) -> Layout:
        source = node.args[0] if node.args else node.all_input_nodes[0]
        if not isinstance(source, fx.Node):
            raise NotUnderstood("no tensor as first argument")
        return self.layouts[source]

    def _elementwise(self, node: fx.Node, operands: list[fx.Node]) -> Layout:
        shape = _shape(node)
        result: Layout = plain(shape)
        known = False
        for operand in sorted(operands, key=lambda n: not self._is_labelled(n)):
            if not known:
                result, known = self._broadcast(operand, len(shape)), True
            else:
                result = self._unite_with(result, operand, node.name)
        return tuple(
            dim if size_of(dim) == size else plain((size,))[0]
            for dim, size in zip(result, shape, strict=True)
        )

    def _is_labelled(self, node: fx.Node) -> bool:
        return any(self.spaces.labelled(dim) for dim in self.layouts[node])

    def _broadcast(self, node: fx.Node, rank: int) -> Layout:
        """The operand with as many axes as the result; its axes of length 1 stay so for now."""
        layout = self.layouts[node]
        return (*plain((1,) * (rank - len(layout))), *layout)

    def _unite_with(self, layout: Layout, other: fx.Node, where: str) -> Layout:
        """``layout`` after an element-wise operation with ``other``."""
        theirs, shift = self.layouts[other], len(layout) - len(self.layouts[other])
        out = list(layout)
        for i, dim in enumerate(theirs):
            place = i + shift
            if size_of(dim) == 1 and size_of(out[place]) != 1:
                continue
            if size_of(out[place]) == 1:
                out[place] = dim
            elif self.spaces.labelled(dim) or self.spaces.labelled(out[place]):
                if not self.spaces.labelled(dim) and self._harmless(other, i):
                    continue
                out[place] = self.spaces.unite(out[place], dim, where)
        return tuple(out)

    def _harmless(self, node: fx.Node, axis: int) -> bool:
        """Whether an operand is the same for all channels."""
        tensor = node.meta.get("tensor")
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            return bool((tensor == tensor.select(axis, 0).unsqueeze(axis)).all())
        return node.op == "call_function" and _is_uniform(node)

    def _resized(self, node: fx.Node) -> Layout:
        """Pooling and the like: axes of unchanged length keep their channels."""
        layout, shape = self._source(node), _shape(node)
        if len(layout) != len(shape):
            raise NotUnderstood("changes the number of axes")
        return self._fitted(layout, shape, node.name)

    def _reshaped(self, node: fx.Node) -> Layout:
        return self.spaces.reshape(self._source(node), _shape(node), node.name)

    def _permuted(self, node: fx.Node) -> Layout:
        layout = self._source(node)
        return tuple(layout[i] for i in _order(node, len(layout)))

    def _reduced(self, node: fx.Node) -> Layout:
        """Sums and means do not care in which order they run over an axis."""
        layout, shape = self._source(node), _shape(node)
        dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if dims is None or not shape:
            return plain(shape)
        gone = {int(d) % len(layout) for d in (dims if isinstance(dims, tuple) else (dims,))}
        if len(shape) == len(layout):
            return tuple(plain((1,))[0] if i in gone else d for i, d in enumerate(layout))
        return tuple(d for i, d in enumerate(layout) if i not in gone)

    def _matmul(self, node: fx.Node) -> Layout:
        first, second = node.args[0], node.args[1]
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        parameter = second.meta.get("tensor")
        if isinstance(parameter, nn.Parameter) and parameter.dim() == 2:
            return self._weighted(node, parameter, None, 0, 1, True)
        a, b = self.layouts[first], self.layouts[second]
        if len(a) < 2 or len(b) < 2:
            raise NotUnderstood("a product with a vector")
        self._contract(a[-1], b[-2], node.name)
        batch = list(a[:-2] if len(a) >= len(b) else b[:-2])
        shorter = b[:-2] if len(a) >= len(b) else a[:-2]
        for i, dim in enumerate(shorter):
            place = len(batch) - len(shorter) + i
            if size_of(dim) == size_of(batch[place]):
                batch[place] = self.spaces.unite(batch[place], dim, node.name)
            elif size_of(batch[place]) == 1:
                batch[place] = dim
        return (*batch, a[-2], b[-1])

    def _contract(self, a: Dim, b: Dim, where: str) -> None:
        self.spaces.unite(a, b, where)

    def _linear(self, node: fx.Node) -> Layout:
        return self._functional(node, spatial=0, groups=1, transposed=False)

    def _conv(self, node: fx.Node) -> Layout:
        name = _name(node)
        weight = node.args[1]
        spatial = len(_shape(weight)) - 2 if isinstance(weight, fx.Node) else 0
        groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
        if name == "conv":  # aten.convolution(x, w, b, stride, padding, dilation, transposed, ...)
            groups = node.args[8] if len(node.args) > 8 else 1
        return self._functional(
            node,
            spatial,
            int(groups),
            transposed="transpose" in name,
        )

    def _functional(self, node: fx.Node, spatial: int, groups: int, transposed: bool) -> Layout:
        weight = node.args[1]
        bias = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
        tensor = weight.meta.get("tensor") if isinstance(weight, fx.Node) else None
        if not isinstance(tensor, nn.Parameter):
            return self._computed(node, weight, bias, spatial, groups, transposed)
        bias_tensor = bias.meta.get("tensor") if isinstance(bias, fx.Node) else None
        return self._weighted(node, tensor, bias_tensor, spatial, groups, transposed)

    def _computed(
        self,
        node: fx.Node,
        weight: Any,
        bias: Any,
        spatial: int,
        groups: int,
        transposed: bool,
    ) -> Layout:
        """A weight made from parameters (``w * gain``): its axes are followed like any tensor's."""
        if not isinstance(weight, fx.Node) or groups > 1 or transposed:
            raise NotUnderstood("a functional weight that is computed")
        layout, axes = self._source(node), self.layouts[weight]
        channel = len(layout) - 1 - spatial
        for dim in (*layout[channel + 1 :], *axes[2:]):
            self.spaces.freeze(dim, f"{node.name}: convolves along these channels")
        self.spaces.unite(layout[channel], axes[1], node.name)
        made = axes[0]
        if isinstance(bias, fx.Node):
            made = self.spaces.unite(made, self.layouts[bias][-1], node.name)
        self._relabel(axes[0], "producer")
        self._relabel(axes[1], "consumer")
        after = _shape(node)[len(layout) - spatial :] if spatial else ()
        return (*layout[:channel], made, *plain(after))

    def _relabel(self, dim: Dim, role: Role) -> None:
        """The matrices that hold ``dim`` make or read its channels."""
        own = set(self.spaces.labelled(dim))
        for index, a in enumerate(self.attachments):
            matrix = self._names_of_matrices.get(a.tensor, False)
            if matrix and a.role == "attached" and own & set(self.spaces.labelled(a.dim)):
                self.attachments[index] = replace(a, role=role)

    def _getitem(self, node: fx.Node) -> Layout:
        source, key = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        if source in self._items and key in self._items[source]:
            return self._items[source][key]
        if _is_container(source):
            return self._result(source, _shape(node))
        return self._indexed(self.layouts[source], key, _shape(node), node.name)

    def _result(self, source: fx.Node, shape: tuple[int, ...]) -> Layout:
        """A tensor in the tuple that a neuron returned: spikes, or state of the same channels."""
        while _is_item(source):
            (source, *_) = source.all_input_nodes
        layout = self._neurons.get(source)
        if layout is None or [size_of(d) for d in layout] != list(shape):
            if layout is not None and shape:
                return self._state_of_one_step(layout, shape, source.name)
            return plain(shape)
        return layout

    def _state_of_one_step(self, layout: Layout, shape: tuple[int, ...], where: str) -> Layout:
        """State of a neuron that steps through time itself has no time axis, its first."""
        if [size_of(d) for d in layout[1:]] == list(shape):
            return layout[1:]
        for dim in layout:
            self.spaces.freeze(dim, f"{where}: returns its state in another shape")
        return plain(shape)

    def _write_view(self, node: fx.Node) -> Layout:
        """After an in-place change through a view: the change has united the channels already."""
        base, update = node.all_input_nodes[0], node.all_input_nodes[-1]
        known = {s for dim in self.layouts[base] for s in self.spaces.labelled(dim)}
        new = {s for dim in self.layouts[update] for s in self.spaces.labelled(dim)}
        if not new <= known:
            raise NotUnderstood("written into a part of another tensor")
        return self.layouts[base]

    def _selected(self, node: fx.Node) -> Layout:
        layout = self._source(node)
        axis = _axis(node, len(layout))
        self.spaces.freeze(layout[axis], f"{node.name}: one channel is picked")
        return (*layout[:axis], *layout[axis + 1 :])

    def _indexed(self, layout: Layout, key: Any, shape: tuple[int, ...], where: str) -> Layout:
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, fx.Node | tuple | list) for k in keys):
            raise NotUnderstood("indexed by a tensor")
        if ... not in keys:
            keys = (*keys, ...)
        taken = sum(k is not None and k is not ... for k in keys)
        out: list[Dim] = []
        axis = 0
        for k in keys:
            if k is None:
                out.append(plain((1,))[0])
            elif k is ...:
                rest = len(layout) - taken
                out.extend(layout[axis : axis + rest])
                axis += rest
            elif isinstance(k, slice):
                out.append(self._sliced(layout[axis], k, shape[len(out)], where))
                axis += 1
            else:
                self.spaces.freeze(layout[axis], f"{where}: one channel is picked")
                axis += 1
        return tuple(out)

    def _sliced(self, dim: Dim, key: slice, length: int, where: str) -> Dim:
        """A slice of an axis; one of several equal parts keeps its channels' order inside."""
        size = size_of(dim)
        if length == size and key.step in (None, 1):
            return dim
        start = key.indices(size)[0] if not isinstance(key.start, fx.Node) else 1
        equal = length > 0 and size % length == 0 and start % length == 0
        if equal and key.step in (None, 1) and len(dim) == 1 and self.spaces.labelled(dim):
            outer, inner = self.spaces.reshape((dim,), (size // length, length), where)
            self.spaces.freeze(outer, f"{where}: parts are told apart by their order")
            return inner
        self.spaces.freeze(dim, f"{where}: a part of the channels is taken")
        return plain((length,))[0]

    def _setitem(self, node: fx.Node) -> Layout:
        target, key, value = node.args[:3]
        assert isinstance(target, fx.Node)
        layout = self.layouts[target]
        if not isinstance(value, fx.Node):
            if isinstance(key, fx.Node):
                return self._elementwise(node, [target, key])
            return layout
        if isinstance(key, fx.Node) and _shape(key) == _shape(target):
            return self._elementwise(node, [target, key, value])
        shape = _shape(target)
        index: Any = key
        probe = torch.empty(shape, device="meta")[index]
        part = self._indexed(layout, key, tuple(probe.shape), node.name)
        united = self._unite_with(part, value, node.name) if self._carries(part) else None
        if united is not None or not self._carries(self.layouts[value]):
            return layout
        if not _starts_uniform(target):
            raise NotUnderstood("written into a part of another tensor")
        return self._adopt(layout, key, value, node.name)

    def _carries(self, layout: Layout) -> bool:
        return any(self.spaces.labelled(dim) for dim in layout)

    def _adopt(self, layout: Layout, key: Any, value: fx.Node, where: str) -> Layout:
        """A buffer of zeros takes over the channels that are written into it."""
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, slice) and k != slice(None) for k in keys) or ... in keys:
            raise NotUnderstood("written in parts")
        whole = [i for i in range(len(layout)) if i >= len(keys) or isinstance(keys[i], slice)]
        out = list(layout)
        for axis, dim in zip(whole, self.layouts[value], strict=True):
            if size_of(dim) == size_of(out[axis]):
                out[axis] = dim
        return tuple(out)

    def _stack(self, node: fx.Node) -> Layout:
        parts = _parts(node)
        axis = _axis(node, len(_shape(node)))
        layout = self.layouts[parts[0]]
        for part in parts[1:]:
            layout = self._unite_with(layout, part, node.name)
        return (*layout[:axis], plain((len(parts),))[0], *layout[axis:])

    def _cat(self, node: fx.Node) -> Layout:
        parts = _parts(node)
        axis = _axis(node, len(_shape(node)))
        layouts = [self.layouts[part] for part in parts]
        out = list(layouts[0])
        for layout in layouts[1:]:
            for i, dim in enumerate(layout):
                if i == axis:
                    out[i] = (*out[i], *dim)
                else:
                    out[i] = self.spaces.unite(out[i], dim, node.name)
        return tuple(out)

    def _chunk(self, node: fx.Node) -> Layout:
        """Equal parts of an axis: the parts keep their order, the channels inside go together."""
        layout = self._source(node)
        items = [u for u in node.users if _is_item(u)]
        sizes = {_shape(u) for u in items}
        axis = _axis(node, len(layout), position=2)
        if len(sizes) != 1 or len(layout[axis]) != 1:
            raise NotUnderstood("split into unequal parts")
        part = next(iter(sizes))[axis]
        count = size_of(layout[axis]) // part
        outer, inner = self.spaces.reshape((layout[axis],), (count, part), node.name)
        self.spaces.freeze(outer, f"{node.name}: parts are told apart by their order")
        for item in items:
            new = (*layout[:axis], inner, *layout[axis + 1 :])
            self._items.setdefault(node, {})[item.args[1]] = new
        return plain(_shape(node))

    def _unbind(self, node: fx.Node) -> Layout:
        layout = self._source(node)
        axis = _axis(node, len(layout))
        self.spaces.freeze(layout[axis], f"{node.name}: channels are taken apart")
        for item in node.users:
            if _is_item(item):
                new = (*layout[:axis], *layout[axis + 1 :])
                self._items.setdefault(node, {})[item.args[1]] = new
        return plain(_shape(node))

    def _expanded(self, node: fx.Node) -> Layout:
        layout, shape = self._source(node), _shape(node)
        full = (*plain(shape[: len(shape) - len(layout)]), *layout)
        for dim, size in zip(full, shape, strict=True):
            if size_of(dim) not in (1, size):
                self.spaces.freeze(dim, f"{node.name}: channels are repeated")
        return tuple(
            d if size_of(d) == s else self._input((s,), f"{node.name}: repeats")[0]
            for d, s in zip(full, shape, strict=True)
        )

    def _made_like(self, node: fx.Node) -> Layout:
        """``zeros_like(x)``: the same for all channels, whatever x is."""
        return plain(_shape(node))


_ELEMENTWISE_MODULES = frozenset(
    ("Sigmoid", "Tanh", "GELU", "SiLU", "LeakyReLU", "Hardtanh", "ELU", "Softplus", "Threshold")
)

Rule = Callable[[Reader, fx.Node], Layout]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel", "view_as"),
        Reader._reshaped,
    ),
    **dict.fromkeys(
        ("permute", "transpose", "t", "T", "mT", "movedim", "moveaxis"), Reader._permuted
    ),
    **dict.fromkeys(("sum", "mean", "var", "std", "amax", "amin"), Reader._reduced),
    **dict.fromkeys(("matmul", "bmm", "mm"), Reader._matmul),
    **dict.fromkeys(
        (
            *("conv", "conv1d", "conv2d", "conv3d"),
            *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ),
        Reader._conv,
    ),
    **dict.fromkeys(("expand", "repeat", "expand_as", "broadcast_to"), Reader._expanded),
    **dict.fromkeys(("chunk", "split", "tensor_split"), Reader._chunk),
    **dict.fromkeys(
        ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones"),
        Reader._made_like,
    ),
    "linear": Reader._linear,
    "getitem": Reader._getitem,
    "setitem": Reader._setitem,
    "stack": Reader._stack,
    "cat": Reader._cat,
    "unbind": Reader._unbind,
    "write_view": Reader._write_view,
    "select": Reader._selected,
    "slice": Reader._resized,
    "narrow": Reader._resized,
    "pad": Reader._resized,
    "constant_pad_nd": Reader._resized,
}


def _name(node: fx.Node) -> str:
    return op_name(node) if node.op in ("call_function", "call_method") else node.op


def _shape(node: fx.Node) -> tuple[int, ...]:
    info = node.meta.get("value")
    return info.shape if info is not None and info.shape is not None else ()


def _is_container(node: fx.Node) -> bool:
    info = node.meta.get("value")
    return info is None or info.shape is None


def _is_item(node: fx.Node) -> bool:
    if node.op != "call_function" or op_name(node) != "getitem":
        return False
    return isinstance(node.args[0], fx.Node) and _is_container(node.args[0])


def _is_uniform(node: fx.Node, depth: int = 6) -> bool:
    """Made by zeros, ones or full, or computed from such: the same everywhere."""
    name = _name(node)
    if name.removeprefix("new_").removesuffix("_like") in ("zeros", "ones", "full"):
        return True
    inputs = node.all_input_nodes
    return (
        name in ELEMENTWISE
        and bool(inputs)
        and depth > 0
        and all(_is_uniform(source, depth - 1) for source in inputs)
    )


def _starts_uniform(node: Any) -> bool:
    """A buffer made by zeros, perhaps written into before."""
    while _name(node) == "setitem":
        node = node.args[0]
    return _is_uniform(node) or _name(node) in ("empty", "new_empty", "empty_like")


def _parts(node: Any) -> list[fx.Node]:
    """The tensors that a stack or cat joins."""
    return list(node.args[0])


def _axis(node: fx.Node, rank: int, position: int = 1) -> int:
    given: Any = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    return int(given) % rank


def _order(node: Any, rank: int) -> list[int]:
    """The source axis of each axis of a permuted tensor."""
    name, args = _name(node), list(node.args[1:])
    order = list(range(rank))
    if name in ("T", "t"):
        return order[::-1]
    if name == "mT":
        return [*order[:-2], rank - 1, rank - 2]
    if name == "permute":
        dims = args[0] if args and isinstance(args[0], tuple) else (args or node.kwargs["dims"])
        return [int(d) % rank for d in dims]
    if name == "transpose":
        given = args or [node.kwargs[k] for k in ("dim0", "dim1")]
        i, j = (int(d) % rank for d in given)
        order[i], order[j] = order[j], order[i]
        return order
    shape = tuple(range(2, rank + 2))  # distinct lengths tell where each axis went
    return [n - 2 for n in torch.empty(shape, device="meta").movedim(*args).shape]


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each tensor, one for each module that holds it."""
    found: dict[int, list[str]] = {}
    for prefix, module in nn.Module.named_modules(model):
        for name, tensor in module._parameters.items():
            found.setdefault(id(tensor), []).append(f"{prefix}.{name}".lstrip("."))
    return found
