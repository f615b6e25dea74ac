# SPDX-License-Identifier: Apache-2.0
"""A packed layer as a module: takes the place of a Linear, Conv1d or Conv2d for inference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikenm_fx import surgery
from spikenm_fx.errors import PackError
from spikenm_fx.native.library import KERNELS, Kernel, available_kernels, kernels
from spikenm_fx.pack.engine.deferred import Pending, plain, rows_layout
from spikenm_fx.pack.engine.lazy import LazyTensor
from spikenm_fx.pack.engine.meter import Meter, metered
from spikenm_fx.pack.engine.protocol import Choice
from spikenm_fx.pack.engine.spikes import WORD, SpikeBits
from spikenm_fx.pack.kernels.cpu import LayerShape, is_channels_last, run_layer, run_spikes
from spikenm_fx.pack.kernels.layouts import Layout, layout_for, supports
from spikenm_fx.pack.kernels.ops import SMALL, geometry_list, sparse_layer, sparse_layer_as_stored
from spikenm_fx.pack.kernels.reference import dense_layer, packed_layer
from spikenm_fx.pack.weights.counts import weight_for_counts
from spikenm_fx.pack.weights.format import PackedWeight, unpack_weight

__all__ = ["Choice", "PackedLayer"]

LAYOUT = ("_weights", "_codes", "_blocks", "_row_scale")
PARTS = (*LAYOUT, "_dense")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_hooks_with_kwargs", "_hooks_always_called")
"""Endings of nn.Module's attributes that hold what runs before and after a forward."""


class PackedLayer(nn.Module):
    """Linear, Conv1d or Conv2d on a packed weight.

    Accepts what the layer it replaces accepts, and time-first ``(T, N, C, *spatial)`` for
    convolutions.  Its ``state_dict`` holds the packed weight and the bias, nothing derived.

    Args:
        packed: the weight.
        bias: ``(O,)`` or None.
        name: qualified name, for messages.
        choice: how to run; change it with :meth:`choose`.
        small: keep nothing in memory but the packed weight, and run from that.
    """

    values: Tensor
    indices: Tensor
    scale: Tensor | None
    bias: Tensor | None
    _weights: Tensor | None
    _codes: Tensor | None
    _blocks: Tensor | None
    _row_scale: Tensor | None
    _dense: Tensor | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        name: str = "layer",
        choice: Choice = "dense",
        small: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.nm = packed.nm
        self.weight_shape = packed.shape
        self.geometry = packed.geometry
        self.small = small
        self.waits = False  # for a neuron that is fused with it
        self.meter: Meter | None = None  # while choices are measured
        # parameters, as forwards ask next(self.parameters()) for a device
        self.register_parameter("values", _frozen(packed.values))
        self.register_buffer("indices", packed.indices)
        self.register_buffer("scale", packed.scale)
        own_bias = None if bias is None else _frozen(bias.detach().float().clone())
        self.register_parameter("bias", own_bias)
        self._forget(*PARTS)  # no buffers: what is derived is in no state_dict, and in no export
        self.register_load_state_dict_post_hook(_prepare_again)  # type: ignore[no-untyped-call]
        self._kind = 0
        self._counting: dict[tuple[int, float], Layout] = {}  # by code of the counts
        self.choice: Choice = "dense"
        self.choose(self.candidates()[0] if small else choice)
        super().train(False)

    def stand_for(self, layer: nn.Module, mixin: type[PackedLayer] | None = None) -> PackedLayer:
        """Turn ``layer`` into this packed layer, in place, and an instance of its own class still.

        Whoever holds the layer (a list, a bound method, a hook) then holds the packed one; forwards
        that ask ``isinstance(layer, nn.Linear)`` or read ``layer.out_features`` run as they did.

        Args:
            layer: the one that becomes packed.
            mixin: a subclass of this class to make it of.

        Returns:
            ``layer``.

        Raises:
            TypeError: if the class of ``layer`` cannot be extended.
        """
        plain, own = layer.__dict__, dict(self.__dict__)
        made = surgery.extended_class(type(layer), mixin or PackedLayer, prefix="Packed")
        for holder in ("_parameters", "_buffers", "_modules"):
            extra = {k: v for k, v in plain[holder].items() if k not in own[holder]}
            own[holder] = own[holder] | {k: v for k, v in extra.items() if k != "weight"}
        own["_non_persistent_buffers_set"] |= plain["_non_persistent_buffers_set"]
        own |= {key: value for key, value in plain.items() if key.endswith(_HOOKS)}
        surgery.give_class(layer, made)
        object.__setattr__(layer, "__dict__", {**plain, **own})
        packed: Any = layer
        return packed  # type: ignore[no-any-return]

    @property
    def weight_nm(self) -> Tensor | None:
        """What a checkpoint says of an N:M weight: ``(version, keep, of)``; None of a dense one."""
        return (
            None
            if self.nm.keep == self.nm.of
            else torch.tensor([1, self.nm.keep, self.nm.of], device="cpu")
        )

    @property
    def packed(self) -> PackedWeight:
        """Kept values, indices and scale as one packed weight; shares this layer's memory."""
        return PackedWeight(
            self.nm, self.weight_shape, self.geometry, self.values, self.indices, self.scale
        )

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked now (fp32)."""
        return unpack_weight(self.packed).float()

    @property
    def resident_bytes(self) -> int:
        """Bytes of everything this layer keeps in memory."""
        counting = sum(layout.nbytes for layout in self._counting.values())
        derived: list[Tensor | None] = [vars(self)[part] for part in PARTS]
        every = (*self.parameters(), *self.buffers(), *(x for x in derived if x is not None))
        held = {t.data_ptr(): t.numel() * t.element_size() for t in every}
        return counting + sum(held.values())

    def candidates(self) -> list[Choice]:
        """Ways to run this layer here; the first one always is one."""
        if self.small:
            native_fma = kernels() is not None and supports("fma", self.packed)
            return ["fma"] if native_fma else ["reference"]
        native: list[Choice] = []
        if kernels() is not None:
            native = [k for k in available_kernels() if supports(k, self.packed)]
        return ["dense", *native]

    def choose(self, choice: Choice) -> None:
        """Run as ``choice`` from now on.

        Raises:
            PackError: if this layer cannot.
        """
        if choice not in get_args(Choice):
            raise PackError(
                f"{self.name}: backend {choice!r}; known are {', '.join(get_args(Choice))}"
            )
        anyway = () if self.small else ("dense", "reference")
        if choice not in anyway and choice not in self.candidates():
            raise PackError(
                f"{self.name} {self.weight_shape} at {self.nm} cannot run as {choice!r}; "
                f"possible here: {', '.join(self.candidates())}"
            )
        self.choice = choice
        self._forget(*PARTS)
        self._counting = {}
        if choice == "dense":
            self._dense = unpack_weight(self.packed).float()
            if self.waits:  # its output is wanted pixel by pixel
                self.prefer_channels_last()
        elif choice != "reference":
            self._lay_out()

    def prefer_channels_last(self) -> None:
        """Run as torch's dense layer in that memory format, whatever that of the input is."""
        dense = self._dense
        if dense is not None and dense.dim() == 4:
            self._dense = dense.clone(memory_format=torch.channels_last)

    def fixed_tensors(self) -> list[Tensor]:
        """Packed weight and what was derived of it: no forward writes into them."""
        buffers = (self._buffers.get(key) for key in ("indices", "scale", "_own"))
        held = [self.values, *buffers, *(vars(self)[part] for part in PARTS)]
        return [tensor for tensor in held if tensor is not None]

    def _lay_out(self) -> None:
        layout = layout_for(_kernel(self.choice), self.packed, small=self.small)
        self._weights, self._codes = layout.weights, layout.codes
        self._blocks, self._row_scale = layout.blocks, layout.scale
        self._kind = layout.kind

    def _forget(self, *parts: str) -> None:
        vars(self).update(dict.fromkeys(parts))

    def expect_counts(self) -> None:
        """Drop the layout for plain spikes where there is one for counts; it returns on demand."""
        if self._counting:
            self._forget(*LAYOUT)

    def adopt(self, prepared: PackedLayer) -> None:
        """Run as another layer of the same weight does; shares what that one has prepared."""
        self.choice, self._kind = prepared.choice, prepared._kind
        for part in PARTS:
            vars(self)[part] = vars(prepared)[part]
        self._counting = prepared._counting

    def layout(self, code: tuple[int, float] = (1, 1.0)) -> Layout:
        """The execution layout of the chosen kernel, for spikes or for counts of them.

        Args:
            code: of :class:`~spikenm_fx.pack.engine.spikes.SpikeBits`; a layout for counts is made
                when the first ones come.
        """
        if code != (1, 1.0):
            if code not in self._counting:
                weight = weight_for_counts(self.packed, *code)
                self._counting[code] = layout_for(_kernel(self.choice), weight)
            return self._counting[code]
        if self._weights is None:
            self._lay_out()
        assert self._weights is not None
        assert self._codes is not None
        assert self._blocks is not None
        kernel = _kernel(self.choice)
        return Layout(kernel, self._weights, self._codes, self._blocks, self._kind, self._row_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer; the result may be lazy (see :mod:`spikenm_fx.pack.engine.lazy`).

        Args:
            x: fp32 on the CPU: ``(*, C)`` of a linear layer; of a convolution ``(C, *spatial)``,
                ``(N, C, *spatial)`` or ``(T, N, C, *spatial)``.

        Raises:
            PackError: for any other input, or one that asks for gradients.
        """
        if torch.compiler.is_compiling():
            return self._compiled(x)
        y = self._directly(x)
        if y is not None:
            return y
        self._check(x)
        spatial = self.geometry.spatial
        lead: tuple[int, ...] | None = None
        if spatial and x.dim() != spatial + 2:
            lead = tuple(x.shape[: x.dim() - spatial - 1])
            if x.dim() not in (spatial + 1, spatial + 3):
                raise PackError(
                    f"{self.name}: input {tuple(x.shape)}; a {self.geometry.kind} takes "
                    f"{spatial + 1} to {spatial + 3} dimensions"
                )
            x = x.flatten(0, 1) if len(lead) == 2 else x.unsqueeze(0)
        y = self._lazily(x) if self.waits else self.run(x)
        if lead is None:
            return y
        return y.unflatten(0, lead) if len(lead) == 2 else y.squeeze(0)

    def _directly(self, x: Tensor) -> Tensor | None:
        """Torch's layer at once, where nothing but that is to be done: small layers notice."""
        own = self.__dict__
        dense = own["_dense"]
        if dense is None or own["waits"] or own["meter"] is not None or type(x) is not Tensor:
            return None
        if x.dtype is not torch.float32 or x.requires_grad or not x.is_cpu:
            return None
        bias = own["_parameters"]["bias"]
        if dense.dim() == 2:
            return F.linear(x, dense, bias)
        if x.dim() != dense.dim():
            return None
        g = own["geometry"]
        convolve = F.conv2d if dense.dim() == 4 else F.conv1d
        y = convolve(x, dense, bias, g.stride, g.padding, g.dilation, g.groups)
        return y if y.is_contiguous() or is_channels_last(x) else y.contiguous()

    def _compiled(self, x: Tensor) -> Tensor:
        spatial = self.geometry.spatial
        lead = tuple(x.shape[: x.dim() - spatial - 1]) if spatial else ()
        if spatial:
            x = x.reshape(-1, *x.shape[x.dim() - spatial - 1 :])
        y: Tensor
        if torch.compiler.is_exporting():
            # what is stored may meet other layouts when it is loaded: the operator makes its own
            y = sparse_layer_as_stored(
                x,
                self.values,
                self.indices,
                self.scale,
                self.bias,
                list(self.weight_shape),
                geometry_list(self.geometry),
                [self.nm.keep, self.nm.of],
                SMALL if self.small and self.choice == "fma" else self.choice,
            )
        elif self._weights is None:
            weight = self.weight if self._dense is None else self._dense
            y = dense_layer(x, weight, self.bias, self.geometry)
            y = y if is_channels_last(x) else y.contiguous()
        else:
            y = sparse_layer(
                x,
                self._weights,
                self._codes,
                self._blocks,
                self._row_scale,
                self.values,
                self.indices,
                self.scale,
                self.bias,
                list(self.weight_shape),
                geometry_list(self.geometry),
                [self.nm.keep, self.nm.of],
                KERNELS.index(_kernel(self.choice)),
                self._kind,
            )
        return y.reshape(*lead, *y.shape[1:]) if spatial else y

    @metered
    def run(self, x: Tensor, *, rows: bool = False) -> Tensor:
        """The layer's output for a batch; spikes that are bits already are read as such.

        Args:
            x: the batch, fp32: ``(*, C)`` of a linear layer, ``(N, C, *spatial)`` of a convolution.
            rows: any memory format will do.  Else that of ``x``, as in the layer that this one
                replaces; lazy values count as contiguous.
        """
        rows = rows or self.geometry.kind == "linear"
        dense = self._dense
        if dense is not None and type(x) is Tensor:
            plainly = dense_layer(x, dense, self._parameters["bias"], self.geometry)
            return plainly if rows or is_channels_last(x) else plainly.contiguous()
        bits = None if self.choice in ("dense", "reference", "fma") else self.bits_of(x)
        if bits is not None:
            shape = self.shape_of(x.shape)
            layout = rows_layout(shape, x.shape)
            memory: Any = {"dtype": torch.float32, "device": "cpu"}
            if rows:
                out = torch.empty_strided(*layout, **memory)
            else:
                out = torch.empty(layout[0], **memory)
            self.call(bits, shape, out=out, channels_first=not rows)
            return out
        y = None
        if self.choice not in ("dense", "reference"):
            y = run_layer(plain(x), self.layout(), self.weight_shape, self.geometry, self.bias)
        if y is None:
            y = self._torch(plain(x))
        as_given = not isinstance(x, LazyTensor) and is_channels_last(x)
        return y if rows or as_given else y.contiguous()

    def _torch(self, x: Tensor) -> Tensor:
        if self._dense is not None:
            return dense_layer(x, self._dense, self.bias, self.geometry)
        return packed_layer(x, self.packed, self.bias)

    def shape_of(self, shape: torch.Size | tuple[int, ...]) -> LayerShape:
        """Sizes of a call on an input of ``shape``.

        Raises:
            PackError: for a shape that the layer does not take.
        """
        try:
            return LayerShape.of_call(shape, self.weight_shape, self.geometry)
        except PackError as error:
            raise PackError(f"{self.name}: {error}") from error

    def bits_of(self, x: Tensor) -> SpikeBits | None:
        """The bits of a lazy input, if this layer can read their rows as they lie.

        Args:
            x: ``(*, C)`` of a linear layer, ``(N, C, *spatial)`` of a convolution.
        """
        if not isinstance(x, LazyTensor) or not isinstance(x.source, SpikeBits) or not x.fusable:
            return None
        source, axis = x.source, 1 if self.geometry.spatial else -1
        if self.geometry.groups > 1 or not x.rows(axis, source.channels):
            return None
        if not source.binary and WORD % self.nm.of:
            return None
        return source

    def call(self, source: SpikeBits | Tensor, shape: LayerShape, **wanted: object) -> bool:
        """Run the chosen kernel; False where it cannot.

        Args:
            source: bits, or for FMA fp32 ``(rows, channels)``, one row per pixel.
            shape: sizes of the call.
            wanted: outputs and neuron, as :func:`~spikenm_fx.pack.kernels.cpu.run_spikes` takes.
        """
        native = kernels()
        assert native is not None
        layout = self.layout()
        if isinstance(source, SpikeBits):
            if not source.binary:
                layout = self.layout(source.code)
                shape = replace(shape, channels=source.planes * source.words * WORD)
            source = source.bits
        return run_spikes(source, layout, shape, native, bias=self.bias, **wanted)  # type: ignore[arg-type]

    def _lazily(self, x: Tensor) -> Tensor:
        shape = self.shape_of(x.shape)
        if kernels() is None or shape.tokens == 0:
            return self.run(x)
        lazy = LazyTensor(Pending(self, x, shape))
        if self.geometry.kind == "linear" and x.dim() != 2:
            return lazy.view(shape.result(x.shape))
        return lazy

    def _check(self, x: Tensor) -> None:
        if x.device.type != "cpu":
            raise PackError(f"{self.name}: the input is on {x.device}; this engine runs on the CPU")
        if x.dtype != torch.float32:
            raise PackError(f"{self.name}: the input is {x.dtype}; this engine runs in float32")
        if x.requires_grad and torch.is_grad_enabled():
            raise PackError(
                f"{self.name}: a packed engine has no gradients; wrap the call in "
                "torch.inference_mode() or detach its input"
            )

    def train(self, mode: bool = True) -> PackedLayer:
        """Packed layers only run.

        Raises:
            PackError: for ``train(True)``.
        """
        if mode:
            raise PackError(f"{self.name}: a packed engine cannot train; train the original model")
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.geometry.kind} {self.weight_shape} at {self.nm}, runs as {self.choice}"


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _prepare_again(layer: PackedLayer, _incompatible: Any) -> None:
    """Execution layouts follow the weight that was loaded, if it is a valid one."""
    layer.packed.check(layer.name)
    layer.choose(layer.choice)


def _kernel(choice: Choice) -> Kernel:
    assert choice != "dense"
    assert choice != "reference"
    return choice
