# SPDX-License-Identifier: Apache-2.0
"""Networks of every kind that have a program, each against its model on the same spikes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from program_strategies import RuleNeuron
from test_program import LIF, program, reset
from torch import Tensor, nn

from spikenm_fx.bench.zoo import BRAINCOG_NEVER_USES
from spikenm_fx.errors import PackError
from spikenm_fx.pack import native_status, packing
from spikenm_fx.recipe.stand_in import stand_in

pytestmark = pytest.mark.skipif(not native_status().available, reason="no compiled kernels")

T, B = 3, 2


def lively(model: nn.Module) -> nn.Module:
    """Weights that make neurons fire, and norms that are none of the identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            module.weight.data.mul_(2)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight.data.uniform_(0.7, 1.5)
            module.bias.data.normal_(0.2, 0.2)
    return model.eval()


class Block(nn.Module):
    """Convolutions of one tap over tokens, with a norm and neurons: ``[T, B, C, N]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(inputs, outputs, 1, bias=False), nn.BatchNorm1d(outputs)
        self.fire = RuleNeuron(LIF)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        spikes: Tensor = self.fire(y)
        return spikes


class Attention(nn.Module):
    """An image embedded, one block of attention, and a head; ``kind`` says whose attention."""

    def __init__(self, kind: str, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.stem, self.fire = nn.Conv2d(2, width, 3, padding=1), RuleNeuron(LIF)
        self.q, self.k, self.v = (Block(width, width) for _ in range(3))
        self.qkv, self.project = Block(width, 3 * width), Block(width, width)
        self.attend, self.head = RuleNeuron(LIF), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire(self.stem(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        x = x.flatten(3)
        y = x + self.project(getattr(self, self.kind)(x))
        out: Tensor = self.head(y.mean(-1)).mean(0)
        return out

    def per_head(self, x: Tensor) -> Tensor:
        t, b, c, n = x.shape
        return x.transpose(-1, -2).reshape(t, b, n, self.heads, c // self.heads).transpose(2, 3)

    def merged(self, y: Tensor, like: Tensor) -> Tensor:
        fired: Tensor = self.attend(y)
        return fired.transpose(3, 4).reshape(like.shape)

    def spikformer(self, x: Tensor) -> Tensor:
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        return self.merged((q @ k.transpose(-2, -1)) @ v * 0.125, x)

    def keys_first(self, x: Tensor) -> Tensor:
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        return self.merged(q @ (k.transpose(-2, -1) @ v) * 0.25, x)

    def by_channels(self, x: Tensor) -> Tensor:
        t, b, c, n = x.shape
        y = self.qkv(x).reshape(t, b, 3, self.heads, c // self.heads, n).flatten(2, 3)
        q, k, v = y.chunk(3, dim=2)
        fired: Tensor = self.attend(q @ k.transpose(-2, -1) @ v * 0.125).reshape(t, b, c, n)
        return fired

    def driven(self, x: Tensor) -> Tensor:
        """Of the Spike-driven Transformer: a sum of products of spikes, and a mask."""
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        mask: Tensor = self.attend((k * v).sum(dim=-2, keepdim=True) * 0.3)
        masked: Tensor = q * mask
        return masked.transpose(3, 4).reshape(x.shape)

    def token_mask(self, x: Tensor) -> Tensor:
        """Of QKFormer: which tokens matter, by a sum over the channels of a head."""
        t, b, c, n = x.shape
        q, k = (f(x).reshape(t, b, self.heads, c // self.heads, n) for f in (self.q, self.k))
        mask: Tensor = self.attend(q.sum(dim=3, keepdim=True))
        masked: Tensor = mask * k
        return masked.flatten(2, 3)

    def softmax(self, x: Tensor) -> Tensor:
        """As attention is elsewhere."""
        q, k, v = (self.per_head(f(x)) for f in (self.q, self.k, self.v))
        return self.merged((q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v, x)


KINDS = ["softmax", "spikformer", "keys_first", "by_channels", "driven", "token_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_attention_runs_natively(kind: str) -> None:
    """Products of spikes, heads and all; other batches and lengths run, too."""
    model, x = lively(Attention(kind)), 2 * torch.rand(T, B, 2, 4, 5)
    engine = program(model, x)
    assert packing(engine).proof is not None
    assert any(op.startswith("strided") for op in engine.operations)
    with torch.no_grad():
        reset(model)
        torch.testing.assert_close(engine(x), model(x))
        assert model(x).abs().max() > 0
        engine.reset()
        assert engine(torch.rand(T + 2, 1, 2, 4, 5)).shape == (1, 5)


class Made(nn.Module):
    """A stem with spikes, an operation, and a layer behind it."""

    def __init__(self, operation: Callable[[Tensor], Tensor] | None, width: int) -> None:
        super().__init__()
        self.stem, self.fire = nn.Conv2d(2, 8, 3, padding=1), RuleNeuron(LIF)
        self.norm = nn.LayerNorm(8)
        self.norm.weight.data.uniform_(0.5, 2)
        self.norm.bias.data.uniform_(-1, 1)
        self.operation = operation or (lambda y: self.norm(y.movedim(2, -1)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fire(self.stem(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        out: Tensor = self.head(self.operation(y).flatten(2))
        return out


class Repeated(nn.Module):
    """The same image in every step, as networks for images take it; each says so otherwise."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body = how, Made(lambda y: y, 128)
        self.steps = 1 if how == "once" else T

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("repeat", "once"):
            steps = x.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)
        elif self.how == "expand":
            steps = x[None].expand(T, *x.shape)
        else:
            steps = torch.stack([x] * T)
        out: Tensor = self.body(steps).mean(0)
        return out


@pytest.mark.parametrize("how", ["repeat", "expand", "stack", "once"])
def test_an_image_repeated_over_time_is_not_copied(how: str) -> None:
    """Its first layer runs once; the engine takes images, of any batch."""
    model, x = lively(Repeated(how)), 2 * torch.rand(B, 2, 4, 4)
    engine = program(model, x)
    with torch.no_grad():
        for y in (x, torch.cat([x, x])):
            engine.reset()
            reset(model)
            torch.testing.assert_close(engine(y), model(y), rtol=1e-4, atol=1e-4)


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor] | None, int]] = {
    "voting": (lambda y: nn.functional.avg_pool1d(y.flatten(3).sum(-1), 4), 2),
    "enlarged": (
        lambda y: nn.functional.interpolate(y.flatten(0, 1), scale_factor=2).unflatten(
            0, y.shape[:2]
        ),
        8 * 64,
    ),
    "mean of all pixels": (lambda y: y.mean((-2, -1)), 8),
    "mean of rows": (lambda y: y.mean(-1), 32),
    "one channel": (lambda y: y[:, :, 3], 16),
    "half of the channels": (lambda y: y[:, :, 4:], 64),
    "split": (lambda y: torch.cat(y.split(2, dim=2)[::-1], dim=2), 128),
    "gate": (lambda y: y * y.sum(2, keepdim=True), 128),
    "mask of channels": (lambda y: y * y.mean((3, 4), keepdim=True), 128),
    "pixels first": (lambda y: y.movedim(2, -1), 128),
    "other order": (lambda y: y.transpose(-1, -2), 128),
    "layer norm": (None, 128),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_along_any_axis_run_natively(name: str) -> None:
    """Each in a network, of another batch as well."""
    operation, width = OPERATIONS[name]
    model, x = lively(Made(operation, width)), 2 * torch.rand(T, B, 2, 4, 4)
    engine = program(model, x)
    with torch.no_grad():
        for y in (x, x[:, :1], torch.cat([x, x])):
            engine.reset()
            reset(model)
            torch.testing.assert_close(engine(y), model(y), rtol=1e-4, atol=1e-4)


class Raw(nn.Module):
    """Layers by function, with parameters of the model; gains, shifts and places of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 2, 3, 3)), nn.Parameter(torch.rand(8))
        self.places, self.gain = nn.Parameter(torch.rand(1, 8, 4, 5)), nn.Parameter(torch.rand(8))
        self.fire, self.head = RuleNeuron(LIF), nn.Parameter(torch.randn(5, 160))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x.flatten(0, 1), self.weight, self.bias, padding=1) + self.places
        y = (1 - self.places[:, :1]) * y / (0.5 + self.gain[:, None, None])
        y = self.fire(y.unflatten(0, x.shape[:2])).movedim(2, -1) * self.gain - self.bias
        return nn.functional.linear(y.flatten(2), self.head)


def test_raw_parameters_run_natively() -> None:
    """By their names; what is the same for every token is one operation."""
    torch.manual_seed(0)
    model, x = Raw().eval(), 2 * torch.rand(T, B, 2, 4, 5)
    engine = program(model, x)
    assert engine.operations[0] == "layer weight"
    with torch.no_grad():
        reset(model)
        torch.testing.assert_close(engine(x), model(x))


def test_norse_models_that_return_their_state() -> None:
    """The engine keeps the states, and gives None in their place."""
    norse = pytest.importorskip("norse.torch")
    torch.manual_seed(0)
    for cells, x in ((norse.LIFCell, torch.rand(B, 10)), (norse.LIF, torch.rand(T, B, 10))):
        body = (nn.Linear(10, 16), cells(), nn.Linear(16, 4), cells())
        model = norse.SequentialState(*body).eval()
        model[0].weight.data.mul_(20)
        engine = program(model, x)
        out, state = engine(x)
        with torch.no_grad():
            torch.testing.assert_close(out, model(x)[0])
        assert state is None


SMALL = {"T": 2, "num_classes": 5, "mlp_ratio": 2.0}
JELLY: dict[str, dict[str, Any]] = {
    "spikformer:Spikformer": {
        **SMALL, "img_size_h": 32, "img_size_w": 32, "patch_size": 4, "embed_dims": 16,
        "num_heads": 2, "depths": 1,
    },
    "qkformer:QKFormer": {**SMALL, "embed_dims": 32, "num_heads": (1, 2, 2), "depths": (1, 1, 1)},
    "spike_driven_transformer:SpikeDrivenTransformer": {
        **SMALL, "embed_dims": 32, "num_heads": 2, "depths": 1,
    },
    "maxformer:MaxFormer": {**SMALL, "embed_dims": 32, "depths": (1, 1, 1), "cifar": True},
}  # fmt: skip


@pytest.mark.parametrize("name", JELLY)
def test_transformers_of_spikingjelly(name: str) -> None:
    """As it builds them: images repeated over time, q, k and v from one layer, voting."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    file, _, cls = name.partition(":")
    module = importlib.import_module(f"spikingjelly.activation_based.model.{file}")
    model, x = lively(getattr(module, cls)(**JELLY[name])), 2 * torch.rand(1, 3, 32, 32)
    engine = program(model, x)
    with torch.no_grad():
        functional.reset_net(model)
        torch.testing.assert_close(engine(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("known", ["batch_size", "num_timesteps"])
def test_samples_and_steps_on_one_axis(known: str) -> None:
    """Sinabs' Squeeze layers: what they know of both stays, the other one is free."""
    layers = pytest.importorskip("sinabs.layers")
    torch.manual_seed(0)
    size = {known: B if known == "batch_size" else T}
    body = (nn.Conv2d(2, 4, 3), layers.IAFSqueeze(**size), nn.AvgPool2d(2), nn.Flatten())
    model, x = nn.Sequential(*body, nn.Linear(16, 3)).eval(), torch.rand(B * T, 2, 6, 6)
    fire: Any = model[1]
    engine = program(model, x)
    assert engine.example_shape == (B * T, 2, 6, 6)
    more = torch.cat([x, x])
    with torch.no_grad():
        fire.reset_states()
        torch.testing.assert_close(engine(more), model(more))
        engine.reset()
        fire.reset_states()
        frames = x.unflatten(0, (B, T) if known == "batch_size" else (-1, T))
        steps = torch.stack([engine.step(frame) for frame in frames.unbind(1)], 1)
        torch.testing.assert_close(steps.flatten(0, 1), model(x))
    with pytest.raises(PackError, match="must be a multiple"):
        engine(x[1:])


class LayerByLayer(nn.Module):
    """As BrainCog's networks do it: the image T times, and time in the batch's axis."""

    def __init__(self, node: Any, *, resets: bool) -> None:
        super().__init__()
        self.resets = resets
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(64, 5)
        self.fire = node.LIFNode(step=T, layer_by_layer=True, threshold=0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.resets:
            self.fire.n_reset()
        y = x[None].expand(T, *x.shape).flatten(0, 1)
        y = self.head(self.fire(self.conv(y)).flatten(1))
        out: Tensor = y.unflatten(0, (T, -1)).mean(0)
        return out


@pytest.mark.parametrize("resets", [False, True])
def test_braincog_folds_time_into_the_batch(resets: bool) -> None:
    """Its nodes see both axes as one, time first; its networks may reset themselves."""
    stand_in(*BRAINCOG_NEVER_USES)
    node = pytest.importorskip("braincog.base.node.node")
    torch.manual_seed(0)
    model, x = lively(LayerByLayer(node, resets=resets)), 3 * torch.rand(B, 2, 6, 6)
    engine = program(model, x)
    with torch.no_grad():
        for y in (x, torch.cat([x, x])):
            engine.reset()
            model.fire.n_reset()  # type: ignore[operator, union-attr]
            for _ in range(2):
                torch.testing.assert_close(engine(y), model(y), rtol=1e-4, atol=1e-4)
