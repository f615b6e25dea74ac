# SPDX-License-Identifier: Apache-2.0
"""What the layout rules ask about one recorded operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from spikenm_fx.trace.analysis.ops import ELEMENTWISE, op_name
from spikenm_fx.trace.channels.spaces import Dim

ChannelRole = Literal["producer", "consumer", "attached"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """``tensor``'s ``axis`` runs over the channels of ``dim``."""

    tensor: str
    axis: int
    dim: Dim
    role: ChannelRole


class NotUnderstood(Exception):
    """This operation mixes channels in a way no rule describes."""


def name_of(node: fx.Node) -> str:
    """The operation's name; for modules, inputs and outputs the kind of node."""
    return op_name(node) if node.op in ("call_function", "call_method") else node.op


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of its value, () for containers."""
    info = node.meta.get("value")
    return info.shape if info is not None and info.shape is not None else ()


def is_container(node: fx.Node) -> bool:
    """Whether its value is a tuple, list or dict."""
    info = node.meta.get("value")
    return info is None or info.shape is None


def is_item(node: fx.Node) -> bool:
    """Whether it takes an item out of a container."""
    if node.op != "call_function" or op_name(node) != "getitem":
        return False
    return isinstance(node.args[0], fx.Node) and is_container(node.args[0])


def is_uniform(node: fx.Node, depth: int = 6) -> bool:
    """Made by zeros, ones or full, or computed from such: the same everywhere."""
    name = name_of(node)
    if name.removeprefix("new_").removesuffix("_like") in ("zeros", "ones", "full"):
        return True
    inputs = node.all_input_nodes
    return (
        name in ELEMENTWISE
        and bool(inputs)
        and depth > 0
        and all(is_uniform(source, depth - 1) for source in inputs)
    )


def starts_uniform(node: Any) -> bool:
    """A buffer made by zeros, perhaps written into before."""
    while name_of(node) == "setitem":
        node = node.args[0]
    return is_uniform(node) or name_of(node) in ("empty", "new_empty", "empty_like")


def parts_of(node: Any) -> list[fx.Node]:
    """The tensors that a stack or cat joins."""
    return list(node.args[0])


def axis_of(node: fx.Node, rank: int, position: int = 1) -> int:
    """Its ``dim`` argument, counted from the front."""
    given: Any = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    return int(given) % rank


def order_of(node: Any, rank: int) -> list[int]:
    """The source axis of each axis of a permuted tensor."""
    name, args = name_of(node), list(node.args[1:])
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


def owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each tensor, one for each module that holds it."""
    found: dict[int, list[str]] = {}
    for prefix, module in nn.Module.named_modules(model):
        for name, tensor in module._parameters.items():
            found.setdefault(id(tensor), []).append(f"{prefix}.{name}".lstrip("."))
    return found
