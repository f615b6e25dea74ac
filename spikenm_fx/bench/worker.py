# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, asked line by line: the half of the benches that meets two versions.

``python -P worker.py`` reads one JSON object a line and answers each with one.  It uses the public
surface alone, and networks that are here, so that it measures any checkout on ``PYTHONPATH``;
:mod:`spikenm_fx.bench.versions` runs it for two of them in turn.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikenm_fx
from spikenm_fx import Rule
from spikenm_fx.bench.nets.cifar import build
from spikenm_fx.masks import EID
from spikenm_fx.masks.methods.spikenm import SpikeNM

try:
    from spikenm_fx._torch import TorchDispatchMode
    from spikenm_fx.demo.networks import LIF, OverTime, direct_code
except ModuleNotFoundError:  # a checkout from before these modules were there
    _networks: Any = import_module("spikenm_fx.bench.networks")
    LIF, OverTime, direct_code = _networks.LIF, _networks.OverTime, _networks.direct_code  # type: ignore[misc]
    TorchDispatchMode = import_module("spikenm_fx.trace.guard").TorchDispatchMode  # type: ignore[misc]

__all__ = [
    "Launches",
    "answer",
    "deep",
    "fully_connected",
    "launches",
    "living",
    "serve",
    "stepper",
]

DEPTH = 54
_LENGTH = 10**6  # of the run: nothing freezes while it is measured
_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_FREE = _ALLOCATIONS | frozenset(
    {"detach", "lift_fresh", "alias", "_reshape_alias", "resize_"}
    | {"_record_function_enter_new", "_record_function_exit"}
)
_SYNCS = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "equal", "allclose"}
    | {"masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
)


class Launches(TorchDispatchMode):
    """Counts what would start a kernel on a device, and what would wait for one.

    Views and bare allocations start none, an operation over a list of tensors starts one.

    Attributes:
        kernels: launches by name.
        syncs: operations that hand a value to Python, by name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then compute."""
        name = func.overloadpacket.__name__
        indexed = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if name in _SYNCS or indexed:
            self.syncs[name] += 1
        if not (func.is_view or name in _FREE):
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def launches(run: Callable[[], object]) -> Launches:
    """What ``run()`` starts and waits for."""
    counted = Launches()
    with counted:
        run()
    return counted


def living() -> dict[int, int]:
    """Bytes of every storage that a tensor known to the garbage collector holds, by address."""
    gc.collect()
    usual = Tensor.__torch_dispatch__  # fake tensors have another, and no storage
    kinds = {kind for kind in map(type, gc.get_objects()) if issubclass(kind, Tensor)}
    kinds = {kind for kind in kinds if kind.__torch_dispatch__ is usual}
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    storages = [t.untyped_storage() for t in found if t.layout is torch.strided]
    alive: dict[int, int] = {}
    for storage in storages:
        with contextlib.suppress(RuntimeError):  # of a compiler's: it holds no memory
            alive[storage.data_ptr()] = storage.nbytes()
    return alive


def fully_connected(width: int, inputs: int = 784, classes: int = 10) -> nn.Module:
    """784-width-width-width-10 with LIF neurons over ``[T, B, 784]``."""
    sizes = [inputs, width, width, width]
    hidden = [layer for a, b in pairwise(sizes) for layer in (OverTime(nn.Linear(a, b)), LIF())]
    return nn.Sequential(*hidden, OverTime(nn.Linear(width, classes)))


def deep(depth: int = DEPTH, *, neurons: bool = True) -> nn.Module:
    """Convolutions of eight shapes over ``[T, B, 16, H, W]``, some equal, and a linear layer."""
    widths = (16, 32, 48, 64)
    body: list[nn.Module] = []
    inputs = 16
    for index in range(depth - 1):
        outputs = widths[index * len(widths) // depth]
        kernel = 1 if index % 3 == 0 else 3
        body.append(OverTime(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)))
        body.append(LIF(threshold=0.1) if neurons else nn.Tanh())
        inputs = outputs
    return nn.Sequential(*body, nn.Flatten(2), OverTime(nn.Linear(inputs * 4, 10)))


def _task(network: str, batch: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if network.startswith("fc"):
        width = int(network[2:])
        return fully_connected(width), direct_code(2 * torch.rand(batch, 784), 4)
    if network == "deep":
        return deep(), direct_code(2 * torch.rand(batch, 16, 2, 2), 2)
    images = direct_code(2 * torch.rand(batch, 3, 32, 32), 4)
    return build(network, images[0], 0), images


def _method(name: str) -> Any:
    return {
        "spikenm": SpikeNM(),
        "spikenm, refreshing": SpikeNM(eid=EID(every=1)),
        "spikenm, no EID": SpikeNM(eid=None),
    }.get(name, name)


def stepper(
    network: str,
    method: str | None,
    nm: str = "2:4",
    *,
    batch: int = 32,
    optimizer: str = "Adam",
    everywhere: bool = False,
    device: str = "cpu",
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None], Callable[[], None]]:
    """A network in training: itself, its optimizer, both passes, and the whole step.

    Args:
        network: ``"fcWIDTH"``, ``"deep"``, or one of the accuracy bench's.
        method: None for dense.
        nm: the pattern.
        batch: of random inputs.
        optimizer: a class of ``torch.optim``.
        everywhere: mask first layer and readout, too.
        device: where to train.
    """
    model, inputs = _task(network, batch)
    model, inputs = model.to(device).train(), inputs.to(device)
    labels = torch.randint(0, 10, (batch,)).to(device)
    if method is not None:
        rules = [Rule("re:.*")] if everywhere else []
        options: dict[str, Any] = {"method": _method(method), "total_steps": _LENGTH}
        spikenm_fx.sparsify(model, nm, rules=rules, **options)
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)

    def passes() -> None:
        made.zero_grad()
        scores = model(inputs)
        F.cross_entropy(scores.mean(0) if scores.dim() == 3 else scores, labels).backward()

    def step() -> None:
        passes()
        made.step()

    return model, made, passes, step


_steppers: dict[tuple[Any, ...], Callable[[], None]] = {}


def _time(network: str, method: str | None, nm: str, batch: int) -> dict[str, Any]:
    """Seconds of one step; the network is kept until :func:`_forget`."""
    key = (network, method, nm, batch)
    if key not in _steppers:
        _steppers[key] = stepper(network, method, nm, batch=batch)[3]
        for _ in range(2):
            _steppers[key]()
    start = time.perf_counter()
    _steppers[key]()
    return {"seconds": time.perf_counter() - start}


def _forget() -> dict[str, Any]:
    _steppers.clear()
    gc.collect()
    return {}


def _memory(network: str, method: str | None, nm: str, batch: int) -> dict[str, Any]:
    """Bytes alive after steps, with gradients and optimizer state, over those of the weights."""
    gc.collect()
    before = living()
    model, optimizer, passes, step = stepper(network, method, nm, batch=batch, everywhere=True)
    weights = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("weight"))
    alive = []
    for _ in range(3):
        step()
        now = living()
        alive.append(sum(size for where, size in now.items() if where not in before))
    passes()
    del optimizer
    return {"weights": weights, "alive": alive, "over_weights": alive[-1] / weights}


def _count(method: str | None, nm: str) -> dict[str, Any]:
    """Launches and syncs of a step and of an evaluation forward, and those of the dense network."""
    found: dict[str, Any] = {}
    for name, chosen in (("sparse", method), ("dense", None)):
        model, optimizer, passes, step = stepper(
            "deep", chosen, nm, batch=2, optimizer="SGD", everywhere=True
        )
        for _ in range(2):
            step()
        both, last = launches(passes), launches(optimizer.step)
        model.eval()
        inputs = direct_code(torch.rand(2, 16, 2, 2), 2)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(inputs)
            evaluation = launches(partial(model, inputs))
        found[name] = {
            kind: {"launches": sum(c.kernels.values()), "syncs": sum(c.syncs.values())}
            for kind, c in (("passes", both), ("step", last), ("evaluation", evaluation))
        }
    return found


def _graphs(nm: str, steps: int) -> dict[str, Any]:
    """Graph breaks of a compiled model, and recompilations of a run of ``steps``, freeze included.

    The model has smooth neurons, so that all of it can be one graph.
    """
    found: dict[str, Any] = {}
    for training in (True, False):
        torch.compiler.reset()
        torch.manual_seed(0)
        layers = [nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
        model = nn.Sequential(*layers)
        spikenm_fx.sparsify(model, nm, rules=[Rule("re:.*")], total_steps=steps)
        made = torch.optim.SGD(model.parameters(), lr=0.01)
        graphs = 0

        def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            nonlocal graphs
            graphs += 1
            return graph.forward

        compiled: Any = torch.compile(model, backend=backend)
        first = 0
        for number in range(steps):
            x = torch.rand(8, 16)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if training:
                    compiled.train()(x).sum().backward()
                else:
                    model.train()(x).sum().backward()
                    with torch.no_grad():
                        compiled.eval()(x)
                made.step()
            first = first or graphs
            made.zero_grad()
            del number
        kind = "train" if training else "eval"
        found[kind] = {"breaks": first - 1, "recompilations": graphs - first}
    return found


_QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "time": _time,
    "forget": _forget,
    "memory": _memory,
    "count": _count,
    "graphs": _graphs,
}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Answer one line.

    Args:
        question: ``{"ask": NAME, ...}`` with the arguments of that measurement.
    """
    rest = {key: value for key, value in question.items() if key != "ask"}
    return _QUESTIONS[question["ask"]](**rest)


def serve() -> None:
    """Answer every line of the standard input; the first one is the number of threads."""
    torch.set_num_threads(int(sys.stdin.readline()))
    warnings.simplefilter("ignore", FutureWarning)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
