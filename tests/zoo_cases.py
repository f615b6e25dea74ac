# SPDX-License-Identifier: Apache-2.0
"""The zoo's models as tests want them: ResNets and VGGs by their own code, a quarter as wide."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from spikenm_fx.bench import zoo
from spikenm_fx.bench.zoo import ZOO, Case

WIDE = {"spikingjelly": ("resnet", "vgg"), "braincog": ("cifar-convnet", "resnet", "vgg")}
"""Their widths are written into their code; what is tested of them does not depend on width."""

LEAST, SHARE = 64, 4
LAYERS = {"spikingjelly": "spikingjelly.activation_based.layer", "braincog": "torch.nn"}
NORMS = {"spikingjelly": "BatchNorm2d", "braincog": "modules.batchnorm._BatchNorm"}
"""Where their layers come from, and what their norms are made by."""


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
        for kind, count in (("Conv2d", 2), (NORMS[framework], 1), ("Linear", 2)):
            cls = attrgetter(kind)(layer)
            stack.enter_context(mock.patch.object(cls, "__init__", _narrower(cls.__init__, count)))
        yield


@contextlib.contextmanager
def woken_once(name: str) -> Iterator[None]:
    """The first to make a case calibrates and wakes it; all others take what that one has found."""
    file = Path(os.environ["SPIKENM_FX_TEST_RUN"]) / f"{name.replace('/', '-')}.pt"
    wake = zoo.liven

    def woken(model: nn.Module, *given: object) -> nn.Module:
        held = [*nn.Module.parameters(model), *nn.Module.buffers(model)]
        if not file.exists():
            wake(model, *given)
            partial = file.with_suffix(f".{os.getpid()}")
            torch.save([tensor.detach() for tensor in held], partial)
            partial.replace(file)
            return model
        found: list[Tensor] = torch.load(file)
        for tensor, value in zip(held, found, strict=True):
            tensor.data.copy_(value)
        return model.eval()

    with mock.patch.object(zoo, "liven", woken):
        yield


def build(name: str, *, whole: bool = False) -> Case:
    """A new case of the zoo, ``whole``: in its full width; skips where its framework is missing."""
    entry = ZOO[name]
    if not entry.available:
        pytest.skip(f"{entry.framework} is not installed")
    if whole:
        return entry.build()
    with quarter_width(name), woken_once(name):
        return entry.build()
