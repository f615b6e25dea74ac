# SPDX-License-Identifier: Apache-2.0
"""Training as users write it: networks, optimizers, loops, and what can be read off a sparse model.

Everything here looks at a model through its public surface: ``layer.weight``, its state dict and
``spikenm_fx.progress``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from strategies import ALL_LAYERS, network
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx.bench.nets.handwritten import SequenceLIF
from spikenm_fx.errors import SpikeNMError, SpikeNMWarning
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

LAYERS = ("0", "2", "4")
"""Masked layers of :func:`sparse`."""


def sparse(nm: str = "2:4", *, seed: int = 0, **options: Any) -> nn.Module:
    """Three masked layers with threshold neurons between them, in training mode."""
    return spikenm_fx.sparsify(network(seed=seed), nm, rules=ALL_LAYERS, **options).train()


class OverTime(nn.Module):
    """A layer over folded time: ``[T, N, *]`` to ``[T, N, *]``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Triangle(torch.autograd.Function):
    """Step with a triangular slope: zero far from the threshold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.abs()).clamp(min=0)


class Soft(nn.Module):
    """A neuron over ``[T, ...]`` with second derivatives, for which every transform has rules."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Tensor | None = None

    def reset(self) -> None:
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        v, found = torch.zeros_like(x[0]), []
        for now in x:
            v = v + (now - v) / 2
            soft = torch.sigmoid(4 * (v - 0.6))
            found.append((v >= 0.6).to(x.dtype) + soft - soft.detach())
            v = v * (1 - found[-1].detach())
        return torch.stack(found)


def spiking_net(width: int = 16, inputs: int = 8, outputs: int = 4, *, seed: int = 0) -> nn.Module:
    """Hand-written neurons that nothing but their code describes, over ``[T, N, inputs]``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OverTime(nn.Linear(inputs, width)),
        SequenceLIF(),
        OverTime(nn.Linear(width, width)),
        SequenceLIF(),
        OverTime(nn.Linear(width, outputs)),
    )


def sparse_spiking(nm: str = "2:4", *, eid: EID | None = None, **options: Any) -> nn.Module:
    """:func:`spiking_net` with all layers masked and EID on, refreshed every third step."""
    method = options.pop("method", None) or SpikeNM(eid=eid or EID(every=3))
    return spikenm_fx.sparsify(
        spiking_net(), nm, method=method, rules=ALL_LAYERS, **options
    ).train()


def sequences(count: int, *, steps: int = 4, size: int = 6, seed: int = 1) -> list[Tensor]:
    """Inputs ``[T, N, 8]`` that make the neurons of :func:`spiking_net` fire."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.rand(steps, size, 8, generator=generator) for _ in range(count)]


def masked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with a masked weight, by name."""
    return {n: m for n, m in nn.Module.named_modules(model) if hasattr(m, "weight_nm")}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks in use in the model's present mode, read off its weights."""
    return {name: layer.weight.detach() != 0 for name, layer in masked_modules(model).items()}


def final_masks(model: nn.Module) -> dict[str, Tensor]:
    """Those of evaluation; the model's mode is as before."""
    modes = {module: module.training for module in model.modules()}
    found = masks(model.eval())
    for module, mode in modes.items():
        module.training = mode
    return found


def logits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the mask logits, as a checkpoint holds them."""
    state = model.state_dict()
    return {key: value.clone() for key, value in state.items() if key.endswith("_logits")}


def dense(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights behind the masks."""
    return {n: m.weight_dense.detach().clone() for n, m in masked_modules(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit by bit, key by key."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def any_moved(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether any of the tensors differ."""
    return any(not torch.equal(a[key], b[key]) for key in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    """Assert that all tensors agree."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], msg=lambda m, k=key: f"{k}: {m}", **tolerance)


def step_of(model: nn.Module) -> int:
    """Optimizer steps that the masks have seen."""
    return spikenm_fx.progress(model).step


def train_step(model: Callable[[Tensor], Tensor], optimizer: Any, x: Tensor) -> None:
    """The usual loop's body."""
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def train(model: Any, optimizer: Any, data: Iterable[Tensor]) -> None:
    """The usual loop."""
    for x in data:
        train_step(model, optimizer, x)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collects the texts of our warnings, which the test session would turn into errors."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, SpikeNMWarning)]


def refused(run: Callable[[], object], *others: type[Exception]) -> str | None:
    """The text of the error of ours (or of ``others``) that ``run`` ends in; None if in none."""
    with heard():
        try:
            run()
        except (SpikeNMError, *others) as error:
            return str(error)
    return None


class DataSGD(torch.optim.Optimizer):
    """An optimizer of the old school: it writes through ``.data`` and raises no version."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its usual implementation is built: an optimizer in another.

    ``first_step`` climbs, ``second_step`` returns and lets the base optimizer step; ``step`` with a
    closure does both.
    """

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["before"] = p.data.clone()
                    p.add_(p.grad, alpha=group["rho"] / float(p.grad.norm() + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "before" in self.state[p]:
                    p.data = self.state[p].pop("before")
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """k steps forward, one step back: writes slow weights into the fast ones every k steps."""

    def __init__(self, base: torch.optim.Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.base, self.k, self.alpha, self.count = base, k, alpha, 0
        super().__init__([p for g in base.param_groups for p in g["params"]], {})
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.count += 1
        if self.count % self.k == 0:
            fast = [p for g in self.param_groups for p in g["params"]]
            for slow, p in zip(self.slow, fast, strict=True):
                slow.add_(p.data - slow, alpha=self.alpha)
                p.data.copy_(slow)


Parameters = Iterable[nn.Parameter]

TORCH_OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
}
"""Those of torch.optim that take dense gradients and no closure."""

VARIANTS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=1e-2, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True),
    "Adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "through .data": DataSGD,
}
OPTIMIZERS = TORCH_OPTIMIZERS | VARIANTS


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """One of :data:`OPTIMIZERS` for all of the model's parameters."""
    return OPTIMIZERS[name](list(model.parameters()))


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(model)
