# SPDX-License-Identifier: Apache-2.0
"""Packed layers whose class has a forward of its own: packed is the product in it.

A convolution that a subclass calls once per time step, scales, or calls through a helper is one
call of ``F.conv2d`` on the layer's weight all the same.  Such a layer keeps its forward.  Its
weight is a tensor that knows its packed form: ``F.linear``, ``F.conv1d`` and ``F.conv2d`` on it,
called as the layer itself would call them, run packed; any other operation sees an ordinary tensor.
So a forward that changes the weight first computes what it did.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikenm_fx._torch import DisableTorchFunction
from spikenm_fx.pack.engine.layer import PackedLayer
from spikenm_fx.pack.engine.protocol import Choice
from spikenm_fx.pack.weights.format import unpack_weight

__all__ = ["PackedProducts", "ProductWeight"]

PRODUCTS = {F.linear: 0, F.conv1d: 1, F.conv2d: 2}
"""What runs packed, with the number of spatial dimensions."""

_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class ProductWeight(Tensor):
    """The dense weight, whose products run packed.

    Attributes:
        layer: the packed layer it belongs to.
    """

    layer: PackedProducts
    _is_param = True  # isinstance(weight, nn.Parameter), as it was

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a product packed, everything else on the plain tensor."""
        if func in PRODUCTS:
            call = dict(zip(_PARAMETERS, args, strict=False)) | (kwargs or {})
            weight = call.get("weight")
            if isinstance(weight, ProductWeight):
                product = weight.layer.product(PRODUCTS[func], call)
                if product is not None:
                    return product
        with DisableTorchFunction():
            return func(*args, **(kwargs or {}))


class PackedProducts(PackedLayer):
    """Mixed in before the class of a layer that has a forward of its own; see the module's head.

    Attributes:
        watched: where the inputs of its products are kept while somebody looks at them.
    """

    watched: list[Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight; a tensor whose products run packed, where they do."""
        own = cast(Tensor, self._buffers["_own"])
        idle = self.choice == "dense" and self.meter is None and self.watched is None
        if idle or torch.compiler.is_compiling():
            return own
        seen = own.as_subclass(ProductWeight)
        seen.layer = self
        return seen

    @classmethod
    def of(cls, packed: PackedLayer, layer: nn.Module) -> PackedProducts:
        """Turn ``layer`` into a packed one in place that keeps its forward.

        Args:
            packed: its packed form.
            layer: a Linear, Conv1d or Conv2d.

        Raises:
            TypeError: if the class of ``layer`` cannot be extended.
        """
        # Before the class changes, as its weight is read from here on.
        packed.register_buffer("_own", unpack_weight(packed.packed).float(), persistent=False)
        return cast(PackedProducts, packed.stand_for(layer, cls))

    def choose(self, choice: Choice) -> None:
        """Run the products as ``choice`` from now on; see :meth:`PackedLayer.choose`."""
        self._buffers["_own"] = unpack_weight(self.packed).float()
        super().choose(choice)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer's own class."""
        return super(PackedLayer, self).forward(*args, **kwargs)

    def product(self, spatial: int, call: dict[str, Any]) -> Tensor | None:
        """The packed product; None where it is another than the layer's own.

        Args:
            spatial: 0 for ``F.linear``, 1 and 2 for convolutions.
            call: arguments of the call, by name.
        """
        x, bias = call["input"], call.get("bias")
        own = spatial == self.geometry.spatial and bias is self._parameters["bias"]
        if not own or x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        if x.dim() < 2 or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if spatial and (x.dim() != spatial + 2 or not self._as_own(spatial, call)):
            return None
        if self.watched is not None:
            self.watched.append(x)
        return self.run(x)

    def _as_own(self, spatial: int, call: dict[str, Any]) -> bool:
        def per_dim(name: str, default: int) -> tuple[int, ...]:
            value = call.get(name, default)
            if isinstance(value, int):
                return (value,) * spatial
            return () if isinstance(value, str) else tuple(value) * (spatial // len(value))

        g, padding = self.geometry, call.get("padding", 0)
        named = isinstance(padding, str) and padding == self.__dict__.get("padding")
        return (g.stride, g.padding, g.dilation, g.groups) == (
            per_dim("stride", 1),
            g.padding if named else per_dim("padding", 0),
            per_dim("dilation", 1),
            call.get("groups", 1),
        )
