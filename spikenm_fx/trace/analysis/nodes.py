# SPDX-License-Identifier: Apache-2.0
"""What the graph's builder asks about recorded operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import fx, nn

from spikenm_fx._torch import ConvNd
from spikenm_fx.trace.analysis.ops import MATMULS, MOVES, POOLS, RESHAPES, module_family, op_name
from spikenm_fx.trace.graph import LayerRecord, NeuronRecord, NodeKind


def walk(
    starts: Iterable[fx.Node],
    ahead: Callable[[fx.Node], Iterable[fx.Node]],
    stop: Callable[[fx.Node], bool],
) -> None:
    """Breadth first, so that what ``stop`` collects comes nearest first."""
    queue, seen = list(starts), set(starts)
    for node in queue:
        if not stop(node):
            for following in ahead(node):
                if following not in seen:
                    seen.add(following)
                    queue.append(following)


def reads_shape_alone(node: fx.Node) -> bool:
    """Whether ``node`` takes the shape of what it is given, and none of its values."""
    name = op_name_or_none(node) or ""
    return name.endswith("_like") or name.startswith(("new_", "zero", "ones"))


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """What ``node``'s values are made of; asked often, and read once."""
    if "value_inputs" not in node.meta:
        inputs = [] if reads_shape_alone(node) else list(node.all_input_nodes)
        like = getattr(node.target, "__name__", "") == "to"  # a.to(b); copy_(a, b) is called so too
        like |= (op_name_or_none(node) or "").endswith("_as")  # type_as(a, b), view_as(a, b)
        node.meta["value_inputs"] = inputs[: 1 if like else None]
    found: list[fx.Node] = node.meta["value_inputs"]
    return found


def value_users(node: fx.Node) -> list[fx.Node]:
    """Whose values are made of ``node``'s."""
    return [user for user in node.users if node in value_inputs(user)]


def readers(node: fx.Node) -> list[fx.Node]:
    """Who uses ``node``, looking through tuples that are taken apart."""
    return [
        reader
        for user in node.users
        for reader in (readers(user) if op_name_or_none(user) == "getitem" else [user])
    ]


def op_name_or_none(node: fx.Node) -> str | None:
    """The operation's name, or None for modules, inputs and the output."""
    return op_name(node) if node.op in ("call_function", "call_method") else None


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in order."""
    return tuple(dict.fromkeys(names))


def kind_of_op(name: str, inputs: int) -> NodeKind:
    """The kind of graph node an operation is."""
    if name == "norm" or name in ("batch_norm", "layer_norm", "group_norm", "native_batch_norm"):
        return "norm"
    if name in RESHAPES or name in MOVES:
        return "reshape"
    if name in POOLS or "pool" in name:
        return "pool"
    if name in MATMULS:
        return "matmul"
    joins = ("add", "sub", "mul", "cat", "stack", "maximum", "minimum", "where", "and", "or")
    return "join" if name in joins and inputs > 1 else "op"


def is_step(node: fx.Node) -> bool:
    """Whether it fires (:func:`~spikenm_fx.trace.analysis.firing.find_firings`)."""
    return bool(node.meta.get("fires"))


def times(node: fx.Node) -> int:
    """How many calls ``node`` stands for: later steps of a loop repeat one that was recorded."""
    return 1 + int(node.meta.get("repeats", 0))


def is_identity(node: fx.Node) -> bool:
    """Whether it hands its input on unchanged in eval mode."""
    module = node.meta.get("module")
    name = module_family(module) if module is not None else op_name(node)
    return name in ("identity", "contiguous", "dropout", "detach", "clone")


def layer_kind(module: nn.Module | None) -> str:
    """The torch class behind a weight layer, in lower case."""
    if module is None:
        return "functional"
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules") and cls not in (nn.Module, ConvNd):
            return cls.__name__.lower()
    return type(module).__name__.lower()


def with_layers(
    neurons: Mapping[str, NeuronRecord], layers: Mapping[str, LayerRecord]
) -> dict[str, NeuronRecord]:
    """Give each neuron the layers that drive it, those with it nearest first."""
    paired = {}
    for name, record in neurons.items():
        driving = sorted(
            (layer for layer in layers.values() if name in layer.post),
            key=lambda layer: layer.post.index(name),
        )
        paired[name] = replace(record, layers=tuple(r.name for r in driving))
    return paired
