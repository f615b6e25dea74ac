# SPDX-License-Identifier: Apache-2.0
"""Layout rules of modules and products: weight layers, norms, neurons, matmuls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from spikenm_fx._torch import ConvTransposeNd
from spikenm_fx.pattern import is_weight_layer
from spikenm_fx.trace.analysis.ops import module_family
from spikenm_fx.trace.channels.reader import ChannelReader, rule
from spikenm_fx.trace.channels.rules_axes import (
    elementwise,
    fitted,
    resized,
    unite_with,
)
from spikenm_fx.trace.channels.rules_nodes import (
    ChannelRole,
    NotUnderstood,
    is_container,
    is_uniform,
    name_of,
    shape_of,
)
from spikenm_fx.trace.channels.spaces import Atom, Dim, Layout, plain, size_of

_ELEMENTWISE_MODULES = frozenset(
    ("Sigmoid", "Tanh", "GELU", "SiLU", "LeakyReLU", "Hardtanh", "ELU", "Softplus", "Threshold")
)


@rule("call_module")
def module_layout(reader: ChannelReader, node: fx.Node) -> Layout:
    """A leaf module.

    Raises:
        NotUnderstood: if no rule describes its class.
    """
    module: nn.Module = node.meta["module"]
    if is_weight_layer(module):
        return layer_layout(reader, node, module)
    if str(node.target) in reader.trace.neurons:
        return neuron_layout(reader, node, module)
    family = module_family(module)
    if family == "norm":
        return norm_layout(reader, node, module)
    if any(True for _ in nn.Module.parameters(module)):
        raise NotUnderstood(f"{type(module).__name__} holds parameters of its own")
    if "flatten" in family:
        return reader.spaces.reshape(reader.source(node), shape_of(node), node.name)
    if family in ("identity", "relu") or family in _ELEMENTWISE_MODULES:
        return elementwise(reader, node, node.all_input_nodes)
    if "pool" in family or family in ("pad", "Upsample"):
        return resized(reader, node)
    raise NotUnderstood(f"no rule for {type(module).__name__}")


def layer_layout(reader: ChannelReader, node: fx.Node, module: Any) -> Layout:
    """A Linear or convolution module."""
    weight: Tensor = module.weight
    bias: Tensor | None = getattr(module, "bias", None)
    spatial = weight.dim() - 2
    groups = int(getattr(module, "groups", 1))
    transposed = isinstance(module, ConvTransposeNd)
    return weighted(reader, node, weight, bias, spatial, groups, transposed)


def weighted(
    reader: ChannelReader,
    node: fx.Node,
    weight: Tensor,
    bias: Tensor | None,
    spatial: int,
    groups: int,
    transposed: bool,
) -> Layout:
    """A linear or convolution: reads the input's channel axis and opens a space of its own.

    Args:
        reader: holds what is known so far.
        node: the call.
        weight: shape ``(out, in, *kernel)``, or ``(in, out, *kernel)`` where ``transposed``.
        bias: shape ``(out,)``, or None.
        spatial: axes of the kernel.
        groups: groups of channels.
        transposed: whether it is a transposed convolution.

    Raises:
        NotUnderstood: for a layer whose output has another number of channels than its weight.
    """
    layout, shape = reader.source(node), shape_of(node)
    channel = len(layout) - 1 - spatial
    for dim in layout[channel + 1 :]:
        reader.spaces.freeze(dim, f"{node.name}: convolves along these channels")
    name = reader.names[id(weight)]
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    source: Any = node.args[0] if node.args else node.all_input_nodes[0]
    seen, read = reader.inputs.get(name), layout[channel]
    if seen is not None and not is_uniform(source):
        read = reader.spaces.unite(seen, read, node.name)
    if not is_uniform(source):
        reader.inputs[name] = read
    made = reader.outputs.get(name)
    if made is None:
        size = shape[len(shape) - 1 - spatial]
        if size != weight.shape[out_axis] * (groups if transposed else 1):
            raise NotUnderstood("a layer that folds its input's axes by a rule of its own")
        made = reader.outputs[name] = ((Atom(size, reader.spaces.new(size)),),)
        if groups > 1 and transposed:
            reader.spaces.freeze(made, f"{node.name}: grouped transposed convolution")
            reader.spaces.freeze(read, f"{node.name}: grouped transposed convolution")
        else:
            reader.attach(weight, out_axis, made, "producer")
        if bias is not None:
            reader.attach(bias, 0, made)
    if seen is None and not is_uniform(source) and not (groups > 1 and transposed):
        if groups > 1:
            read = grouped(reader, read, made, groups, node.name)
        reader.attach(weight, in_axis, read, "consumer")
    return (*layout[:channel], made, *plain(shape[len(shape) - spatial :] if spatial else ()))


def grouped(reader: ChannelReader, read: Dim, made: Dim, groups: int, where: str) -> Dim:
    """Channels of a group stay in it: groups move as a whole, channels inside all alike."""
    inside, outside = size_of(read) // groups, size_of(made) // groups
    outer, inner = reader.spaces.reshape((read,), (groups, inside), where)
    made_outer, _ = reader.spaces.reshape((made,), (groups, outside), where)
    reader.spaces.unite(outer, made_outer, where)
    return inner


def norm_layout(reader: ChannelReader, node: fx.Node, module: Any) -> Layout:
    """A normalisation: its per-channel tensors go along.

    Raises:
        NotUnderstood: if it holds a tensor that is not per channel.
    """
    layout, shape = reader.source(node), shape_of(node)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        first = len(layout) - len(module.normalized_shape)
        for dim in layout[first:]:
            reader.spaces.mix(dim, f"{node.name}: normalises over these channels")
        pair: tuple[Any, ...] = (module.weight, getattr(module, "bias", None))
        for tensor in pair:
            for axis in range(len(module.normalized_shape)) if tensor is not None else ():
                reader.attach(tensor, axis, layout[first + axis])
        return layout
    features = int(getattr(module, "num_features", getattr(module, "num_channels", 0)))
    axis = 2 if getattr(module, "step_mode", "s") == "m" else 1
    if shape[axis] != features:
        fitting = [i for i, size in enumerate(shape) if size == features]
        axis = fitting[0]
    if isinstance(module, nn.GroupNorm):
        inside = features // module.num_groups
        reader.spaces.mix(layout[axis], f"{node.name}: normalises over these channels")
        reader.spaces.reshape((layout[axis],), (module.num_groups, inside), node.name)
    tensors = (*nn.Module.parameters(module), *nn.Module.buffers(module))
    for tensor in tensors:
        if tensor.numel() == features and tensor.dim() == 1 and features > 1:
            reader.attach(tensor, 0, layout[axis])
        elif tensor.numel() > 1:
            raise NotUnderstood(f"{type(module).__name__} holds a {tuple(tensor.shape)} tensor")
    return layout


def neuron_layout(reader: ChannelReader, node: fx.Node, module: nn.Module) -> Layout:
    """Element-wise: spikes and states have the input's channels; own tensors go along."""
    spec = reader.trace.neurons[str(node.target)]
    tensors = [n for n in node.all_input_nodes if shape_of(n) == shape_of(node.all_input_nodes[0])]
    layout = reader.layouts[tensors[0]]
    for other in tensors[1:]:
        layout = unite_with(reader, layout, other, node.name)
    accounted = recurrent(reader, node, layout) if spec.framework != "unknown" else set()
    for name, tensor in (
        *nn.Module.named_parameters(module),
        *nn.Module.named_buffers(module),
    ):
        if tensor.numel() > 1 and name not in spec.state and id(tensor) not in accounted:
            attach_broadcast(reader, tensor, layout, node.name)
    reader.neurons[node] = layout
    for dim in layout if str(node.target) in reader.trace.shown_states else ():
        reader.spaces.freeze(dim, f"{node.name}: its state is an output of the model")
    if spec.time_axis is not None and not spec.folded_time:
        reader.times.append(layout[spec.time_axis])
    shape = shape_of(node)
    if not is_container(node) and [size_of(d) for d in layout] != list(shape):
        return fitted(reader, layout, shape, node.name)
    return layout


def recurrent(reader: ChannelReader, node: fx.Node, layout: Layout) -> set[int]:
    """Layers that a framework's neuron calls on its own spikes: both axes are its channels.

    Returns:
        The tensors that are accounted for.

    Raises:
        NotUnderstood: for a grouped layer.
    """
    done: set[int] = set()
    for name, call in reader.trace.inner.items():
        if call.inside != str(node.target) or call.input_shape != call.output_shape:
            continue
        layer: Any = reader.trace.model.get_submodule(name)
        channels = layout[len(layout) - 1 - (layer.weight.dim() - 2)]
        if int(getattr(layer, "groups", 1)) > 1:
            raise NotUnderstood(f"{name}: a grouped layer inside a neuron")
        reader.attach(layer.weight, 0, channels)
        reader.attach(layer.weight, 1, channels)
        if layer.bias is not None:
            reader.attach(layer.bias, 0, channels)
        done |= {id(layer.weight), id(layer.bias)}
    return done


def attach_broadcast(reader: ChannelReader, tensor: Tensor, layout: Layout, where: str) -> None:
    """A per-channel tensor, aligned from the right; or of one axis, by its length.

    Args:
        reader: holds what is known so far.
        tensor: of any shape that broadcasts with the neuron's input.
        layout: of the neuron's input.
        where: the neuron.

    Raises:
        NotUnderstood: if its axes fit no axes of the input, or several.
    """
    axes = [a for a, size in enumerate(tensor.shape) if size > 1]
    for axis in axes:
        place = len(layout) - tensor.dim() + axis
        if place < 0 or size_of(layout[place]) != tensor.shape[axis]:
            fitting = [
                i
                for i, dim in enumerate(layout)
                if size_of(dim) == tensor.shape[axis] and reader.spaces.labelled(dim)
            ]
            if len(axes) != 1 or len(fitting) != 1:
                raise NotUnderstood(
                    f"{where} holds a tensor of shape {tuple(tensor.shape)} whose axes "
                    "fit no channels of its input, or several"
                )
            place = fitting[0]
        reader.attach(tensor, axis, layout[place])


@rule("linear")
def linear(reader: ChannelReader, node: fx.Node) -> Layout:
    """The last axis is read by a weight: ``F.linear``."""
    return functional(reader, node, spatial=0, groups=1, transposed=False)


@rule(
    "conv", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
)
def conv(reader: ChannelReader, node: fx.Node) -> Layout:
    """``F.conv*d``, its transposed kin, and ``aten.convolution``."""
    name = name_of(node)
    weight = node.args[1]
    spatial = len(shape_of(weight)) - 2 if isinstance(weight, fx.Node) else 0
    groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    if name == "conv":  # aten.convolution(x, w, b, stride, padding, dilation, transposed, ...)
        groups = node.args[8] if len(node.args) > 8 else 1
    return functional(
        reader,
        node,
        spatial,
        int(groups),
        transposed="transpose" in name,
    )


def functional(
    reader: ChannelReader, node: fx.Node, spatial: int, groups: int, transposed: bool
) -> Layout:
    """A weight that is an argument: a parameter, or made of parameters."""
    weight = node.args[1]
    bias = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
    tensor = weight.meta.get("tensor") if isinstance(weight, fx.Node) else None
    if not isinstance(tensor, nn.Parameter):
        return computed(reader, node, weight, bias, spatial, groups, transposed)
    bias_tensor = bias.meta.get("tensor") if isinstance(bias, fx.Node) else None
    return weighted(reader, node, tensor, bias_tensor, spatial, groups, transposed)


def computed(
    reader: ChannelReader,
    node: fx.Node,
    weight: Any,
    bias: Any,
    spatial: int,
    groups: int,
    transposed: bool,
) -> Layout:
    """A weight made from parameters (``w * gain``): its axes are followed like any tensor's.

    Raises:
        NotUnderstood: where it is grouped or transposed.
    """
    if not isinstance(weight, fx.Node) or groups > 1 or transposed:
        raise NotUnderstood("a functional weight that is computed")
    layout, axes = reader.source(node), reader.layouts[weight]
    channel = len(layout) - 1 - spatial
    for dim in (*layout[channel + 1 :], *axes[2:]):
        reader.spaces.freeze(dim, f"{node.name}: convolves along these channels")
    reader.spaces.unite(layout[channel], axes[1], node.name)
    made = axes[0]
    if isinstance(bias, fx.Node):
        made = reader.spaces.unite(made, reader.layouts[bias][-1], node.name)
    relabel(reader, axes[0], "producer")
    relabel(reader, axes[1], "consumer")
    after = shape_of(node)[len(layout) - spatial :] if spatial else ()
    return (*layout[:channel], made, *plain(after))


def relabel(reader: ChannelReader, dim: Dim, role: ChannelRole) -> None:
    """The matrices that hold ``dim`` make or read its channels."""
    channels = set(reader.spaces.labelled(dim))
    for index, a in enumerate(reader.attachments):
        matrix = reader.matrices.get(a.tensor, False)
        if matrix and a.role == "attached" and channels & set(reader.spaces.labelled(a.dim)):
            reader.attachments[index] = replace(a, role=role)


@rule("matmul", "bmm", "mm")
def matmul(reader: ChannelReader, node: fx.Node) -> Layout:
    """A product: with a parameter it is a layer, else the inner axes meet.

    Raises:
        NotUnderstood: for products with vectors.
    """
    first, second = node.args[0], node.args[1]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    parameter = second.meta.get("tensor")
    if isinstance(parameter, nn.Parameter) and parameter.dim() == 2:
        return weighted(reader, node, parameter, None, 0, 1, True)
    a, b = reader.layouts[first], reader.layouts[second]
    if len(a) < 2 or len(b) < 2:
        raise NotUnderstood("a product with a vector")
    reader.spaces.mix(reader.spaces.unite(a[-1], b[-2], node.name), f"{node.name}: sums over them")
    batch = list(a[:-2] if len(a) >= len(b) else b[:-2])
    shorter = b[:-2] if len(a) >= len(b) else a[:-2]
    for i, dim in enumerate(shorter):
        place = len(batch) - len(shorter) + i
        if size_of(dim) == size_of(batch[place]):
            batch[place] = reader.spaces.unite(batch[place], dim, node.name)
        elif size_of(batch[place]) == 1:
            batch[place] = dim
    return (*batch, a[-2], b[-1])
