# SPDX-License-Identifier: Apache-2.0
"""Take channels out: by torch-pruning where it couples what we do, else by our groups."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx._torch import ConvNd, ConvTransposeNd, NormBase
from spikenm_fx.channels.left_alone import named_tensors
from spikenm_fx.trace import CoupledGroup, Member
from spikenm_fx.trace.channels.groups import permute_members

__all__ = ["Dependencies", "cut", "match_sizes", "parameters_and_bytes", "undoable"]

Slices = frozenset[tuple[str, int, frozenset[int]]]
"""What is taken away: name of a tensor, its axis, indices."""


@contextlib.contextmanager
def undoable(model: nn.Module) -> Iterator[None]:
    """Put every module back as it was if the block raises: tensors, their values, sizes."""
    modules = list(nn.Module.modules(model))
    plain = [(m, {k: v for k, v in vars(m).items() if isinstance(v, int | tuple)}) for m in modules]
    held = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    tensors = [t for _, p, b in held for t in (*p.values(), *b.values()) if t is not None]
    values = [(t, t.data, t.detach().clone()) for t in dict.fromkeys(tensors)]
    try:
        yield
    except BaseException:
        for module, attributes in plain:
            vars(module).update(attributes)
        for module, parameters, buffers in held:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for tensor, data, copied in values:
            tensor.data = data
            tensor.data.copy_(copied)
        raise


def cut(
    model: nn.Module, group: CoupledGroup, stay: Tensor, dependencies: Dependencies | None = None
) -> str:
    """Keep the channels ``stay`` of ``group``, in that order, and take out the others, in place.

    Args:
        model: what ``group`` was found in.
        group: of coupled channels.
        stay: int64 ``[C]``, the numbers of the channels to keep.
        dependencies: torch-pruning's; they cut where they agree with the group.

    Returns:
        who did it, ``"torch-pruning"`` or ``"groups"``.
    """
    gone = torch.ones(group.size, dtype=torch.bool, device="cpu")
    gone[stay] = False
    order = torch.cat([stay, gone.nonzero().flatten()])
    if not torch.equal(order, torch.arange(group.size, device="cpu")):
        permute_members(model, group, group.members, order)
    removed = range(len(stay), group.size)
    ours = _slices(group, removed)
    if dependencies is not None and dependencies.agree(group, list(removed), ours):
        dependencies.prune(model, group, list(removed))
        return "torch-pruning"
    for member in group.members:
        _shorten(model, member, group.size, len(stay))
    for name in dict.fromkeys(member.tensor.rpartition(".")[0] for member in group.members):
        _resize(model.get_submodule(name), group)
    return "groups"


def _slices(group: CoupledGroup, removed: range) -> Slices:
    return frozenset(
        (m.tensor, m.axis, frozenset(_indices(m, group.size, removed))) for m in group.members
    )


def _indices(member: Member, size: int, channels: range) -> Iterator[int]:
    for outer in range(member.outer):
        for channel in channels:
            first = member.offset + (outer * size + channel) * member.inner
            yield from range(first, first + member.inner)


def _shorten(model: nn.Module, member: Member, size: int, stay: int) -> None:
    """Leave the first ``stay`` channels of one tensor, which keeps its identity."""
    owner, _, key = member.tensor.rpartition(".")
    module = model.get_submodule(owner)
    tensor = named_tensors(module)[key]
    length = member.outer * size * member.inner
    parts = tensor.data.movedim(member.axis, 0).split(
        [member.offset, length, tensor.shape[member.axis] - member.offset - length]
    )
    inside = parts[1].unflatten(0, (member.outer, size, member.inner))[:, :stay].flatten(0, 2)
    tensor.data = torch.cat([parts[0], inside, parts[2]]).movedim(0, member.axis).contiguous()


def _resize(module: nn.Module, group: CoupledGroup) -> None:
    """Bring a module's own numbers in line with its tensors, from which channels have gone."""
    if isinstance(module, ConvNd) and module.groups > 1 and group.size == module.groups:
        first = isinstance(module, ConvTransposeNd)  # its weight is [in, out / groups, ...]
        rows = module.in_channels if first else module.out_channels
        module.groups = module.weight.shape[0] // (rows // module.groups)  # whole ones have gone
    match_sizes(module)


def match_sizes(module: Any) -> None:
    """Set what a layer or norm says of its sizes to those of its tensors and its groups."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, ConvNd):
        sizes = module.weight.shape[0], module.weight.shape[1] * module.groups
        if isinstance(module, ConvTransposeNd):
            module.in_channels, module.out_channels = sizes
        else:
            module.out_channels, module.in_channels = sizes
    elif isinstance(module, NormBase) and module.weight is not None:
        module.num_features = len(module.weight)
    elif isinstance(module, NormBase) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


# -- torch-pruning ---------------------------------------------------------------------------------


class Dependencies:
    """torch-pruning's dependency graph of a copy of the model that runs one time step.

    On multi-step models it folds time into the channels (seen: 3 channels cut where 1 was asked),
    so the copy of a model with a ``step_mode`` is set to single steps, and gets one step of input.
    """

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Trace the copy.

        Raises:
            Exception: whatever torch-pruning or the model raises on it.
        """
        import torch_pruning  # it brings all of timm where that is installed

        self.copy = copy.deepcopy(model).eval()
        stepped = [m for m in self.copy.modules() if getattr(m, "step_mode", None) == "m"]
        for module in stepped:
            module.step_mode = "s"  # type: ignore[assignment]
        inputs = tuple(x[0] if stepped and isinstance(x, Tensor) else x for x in arguments)
        self.names = {module: name for name, module in self.copy.named_modules()}
        self.graph = torch_pruning.DependencyGraph().build_dependency(
            self.copy, inputs, verbose=False
        )

    def _pruned(self, group: CoupledGroup, removed: list[int]) -> Any:
        root = next(m for m in group.producers if m.tensor.endswith("weight"))
        module = self.copy.get_submodule(root.tensor.rpartition(".")[0])
        own = list(_indices(root, group.size, range(removed[0], removed[-1] + 1)))
        pruner = self.graph.get_pruner_of_module(module)
        return self.graph.get_pruning_group(module, pruner.prune_out_channels, own)

    def agree(self, group: CoupledGroup, removed: list[int], ours: Slices) -> bool:
        """Whether torch-pruning would take away exactly what our group says."""
        try:
            found = self._pruned(group, removed)
            return self._slices(found) == ours
        except Exception:  # it raises bare Exceptions, AssertionErrors, KeyErrors
            return False

    def _slices(self, found: Any) -> Slices:
        taken: dict[tuple[str, int], set[int]] = {}
        for dependency, indices in found:
            module, pruning = dependency.target.module, dependency.handler
            name = self.names.get(module)
            if name is None:
                continue  # reshapes, joins: they hold nothing
            inside = self.graph.is_in_channel_pruning_fn(pruning) and module.weight.dim() > 1
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or tensor.dim() == 0 or (inside and key != "weight"):
                    continue
                transposed = isinstance(module, ConvTransposeNd)
                axis = int(inside != transposed) if tensor.dim() > 1 else 0
                taken.setdefault((f"{name}.{key}".lstrip("."), axis), set()).update(indices)
        return frozenset((name, axis, frozenset(i)) for (name, axis), i in taken.items())

    def prune(self, model: nn.Module, group: CoupledGroup, removed: list[int]) -> None:
        """Let torch-pruning's functions cut the modules of the model itself, and the copy's."""
        for dependency, indices in self._pruned(group, removed):
            name = self.names.get(dependency.target.module)
            if name is not None:
                before = named_tensors(model.get_submodule(name))
                dependency.handler(model.get_submodule(name), indices)
                _keep_identity(model.get_submodule(name), before)
        self._pruned(group, removed).prune()


def _keep_identity(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Parameters that torch-pruning replaced become the old objects again, with the new values."""
    for key, parameter in list(module._parameters.items()):
        old = before.get(key)
        if parameter is not None and isinstance(old, nn.Parameter) and old is not parameter:
            old.data = parameter.data
            module._parameters[key] = old


def parameters_and_bytes(model: nn.Module) -> tuple[int, int]:
    """How many numbers the model's parameters hold, and in how many bytes."""
    sizes = [(math.prod(p.shape), p.element_size()) for p in nn.Module.parameters(model)]
    return sum(n for n, _ in sizes), sum(n * b for n, b in sizes)
