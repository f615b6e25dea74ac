# SPDX-License-Identifier: Apache-2.0
"""The zoo's models as tests want them: ResNets and VGGs by their own code, a quarter as wide."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
from torch import nn

from spikenm_fx.bench.zoo import ZOO, Case

WIDE = {"spikingjelly": ("resnet", "vgg"), "braincog": ("cifar-convnet", "sew-resnet18", "vgg")}
"""Their widths are written into their code; what is tested of them does not depend on width."""

LEAST, SHARE = 64, 4
LAYERS = {"spikingjelly": "spikingjelly.activation_based.layer", "braincog": "torch.nn"}


SIZES = ("in_channels", "out_channels", "num_features", "in_features", "out_features")


def _narrower(init: Callable[..., None], count: int) -> Callable[..., None]:
    def less(size: object) -> object:
        return size // SHARE if isinstance(size, int) and size >= LEAST else size

    def narrow(self: nn.Module, *args: object, **kwargs: object) -> None:
        named = {key: less(value) if key in SIZES else value for key, value in kwargs.items()}
        init(self, *map(less, args[:count]), *args[count:], **named)

    return narrow


TRANSFORMERS = {
    "spikformer": ("spikformer", "Spikformer"),
    "sdt": ("spike_driven_transformer", "SpikeDrivenTransformer"),
    "qkformer": ("qkformer", "QKFormer"),
    "maxformer": ("maxformer", "MaxFormer"),
}
"""File and class of SpikingJelly's, whose makers set the width of 384 themselves."""


@contextlib.contextmanager
def narrow_transformer(name: str) -> Iterator[None]:
    """What a maker of SpikingJelly builds is a quarter as wide, where its name is one of these."""
    found = next((where for known, where in TRANSFORMERS.items() if f"jelly-{known}" in name), None)
    if found is None:
        yield
        return
    module = importlib.import_module(f"spikingjelly.activation_based.model.{found[0]}")
    whole = getattr(module, found[1])

    def narrow(*, embed_dims: int, **others: object) -> nn.Module:
        return whole(embed_dims=embed_dims // SHARE, **others)

    with mock.patch.object(module, found[1], narrow):
        yield


@contextlib.contextmanager
def quarter_width(name: str) -> Iterator[None]:
    """Layers of 64 and more channels are made with a quarter of them, where the code sets 64.

    Args:
        name: of a framework and model: what is built by arguments keeps its width.
    """
    framework = next((known for known in LAYERS if known in name), None)
    if framework is None or not any(word in name for word in WIDE[framework]):
        yield
        return
    layer = importlib.import_module(LAYERS[framework])
    with contextlib.ExitStack() as stack:
        for kind, count in (("Conv2d", 2), ("BatchNorm2d", 1), ("Linear", 2)):
            cls = getattr(layer, kind)
            stack.enter_context(mock.patch.object(cls, "__init__", _narrower(cls.__init__, count)))
        yield


def build(name: str, *, whole: bool = False) -> Case:
    """A new case of the zoo, ``whole``: in its full width; skips where its framework is missing."""
    entry = ZOO[name]
    if not entry.available:
        pytest.skip(f"{entry.framework} is not installed")
    with contextlib.nullcontext() if whole else quarter_width(name):
        return entry.build()
