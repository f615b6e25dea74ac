# SPDX-License-Identifier: Apache-2.0
"""What must be left alone: models that are being trained, tensors that share their memory."""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from spikenm_fx.errors import PlanError, no_module
from spikenm_fx.trace import CoupledGroup

__all__ = ["Sharing", "named_tensors", "refuse_unfinished"]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their qualified names."""
    return dict(nn.Module.named_parameters(model)) | dict(nn.Module.named_buffers(model))


def refuse_unfinished(model: object, call: str) -> None:
    """Refuse what is no model, and models in the middle of training.

    Args:
        model: what was given.
        call: name of the function it was given to.

    Raises:
        PlanError: if it is no module, still masked, or holds gradients.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(no_module(call, model))
    for name, module in nn.Module.named_modules(model):
        for key in module._parameters:
            # a property in front of a parameter hands it out masked
            if isinstance(inspect.getattr_static(type(module), key, None), property):
                raise PlanError(
                    f"{name or type(module).__name__} is still masked: its mask belongs to the "
                    f"channels as they lie; {call} before sparsify, or fold(model) first"
                )
    for name, parameter in nn.Module.named_parameters(model):
        if parameter.grad is not None:
            raise PlanError(
                f"{name} {tuple(parameter.shape)} holds a gradient, so the model is being trained: "
                "its optimizer's running averages would then belong to other channels. "
                f"Call {call} before training, or after it: "
                "optimizer.zero_grad(set_to_none=True), and a new optimizer afterwards"
            )


class Sharing:
    """Which tensors of a model cannot be rewritten by themselves, and why."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.reasons: dict[str, str] = {}
        places: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for name, tensor in tensors.items():
            if tensor.is_meta:
                self.reasons[name] = "is on the meta device and has no values"
            elif any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
                self.reasons[name] = "is expanded: several elements are one number in memory"
            elif tensor.numel():
                start = tensor.data_ptr()
                steps = zip(tensor.shape, tensor.stride(), strict=True)
                length = 1 + sum((n - 1) * s for n, s in steps)
                span = (start, start + length * tensor.element_size(), name)
                places[tensor.untyped_storage().data_ptr()].append(span)
        for spans in places.values():
            self._overlaps(sorted(spans))

    def _overlaps(self, spans: list[tuple[int, int, str]]) -> None:
        for (_, end, name), (start, _, other) in itertools.pairwise(spans):
            if start < end:
                self.reasons.setdefault(name, f"shares its memory with {other}")
                self.reasons.setdefault(other, f"shares its memory with {name}")

    def why_not(self, group: CoupledGroup) -> str:
        """Why the group's tensors cannot be rewritten; "" if they can."""
        for member in group.members:
            if member.tensor in self.reasons:
                return f"{member.tensor} {self.reasons[member.tensor]}"
        return ""
