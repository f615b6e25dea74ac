# SPDX-License-Identifier: Apache-2.0
"""Ask the reader itself: import a NIR graph with the real package and compare its spikes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.errors import ExportError, VerificationError
from spikenm_fx.export.nir_readers import DT, reader_named
from spikenm_fx.export.nir_run import run_graph
from spikenm_fx.export.packages import needed, quiet, refuse_untested
from spikenm_fx.table import text_table

__all__ = ["NIRAgreement", "NodeAgreement", "import_nir", "read_nir", "verify_nir"]


@dataclass(frozen=True, slots=True)
class NodeAgreement:
    """What one node emits in the reader, against what the graph says.

    Attributes:
        name: of the node.
        shape: over all steps, ``(T, N, ...)``, in the reader.
        expected: the same by the graph.
        different: values that differ: spikes in any way, other values beyond rounding.
        values: how many were compared.
        first_step: of a difference; None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    expected: tuple[int, ...]
    different: int
    values: int
    first_step: int | None

    @property
    def equal(self) -> bool:
        """Same shape, and nothing differs."""
        return self.shape == self.expected and not self.different


@dataclass(frozen=True, slots=True)
class NIRAgreement:
    """What a reader makes of a graph, node by node; true where all is equal.

    Attributes:
        reader: its name.
        nodes: the neurons, then the output.
        missing: neurons of the graph that are not in what the reader built.
    """

    reader: str
    nodes: tuple[NodeAgreement, ...]
    missing: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.missing and all(node.equal for node in self.nodes)

    def raise_if_different(self) -> None:
        """Nothing where the reader runs the graph as it was meant.

        Raises:
            VerificationError: with the table of what differs.
        """
        if not self:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        rows = [("node", "shape", "expected", "different", "first step")]
        rows += [
            (
                node.name,
                "x".join(map(str, node.shape)),
                "x".join(map(str, node.expected)),
                f"{node.different} of {node.values}",
                "-" if node.first_step is None else str(node.first_step),
            )
            for node in self.nodes
        ]
        verdict = "reads the graph as it was meant" if self else "computes something else"
        lost = f"; not in what it built: {', '.join(self.missing)}" if self.missing else ""
        return "\n".join([f"{self.reader} {verdict}{lost}", *text_table(rows)])


def verify_nir(
    graph: Any,
    reader: str,
    x: Tensor,
    *,
    expected: Tensor | None = None,
    any_version: bool = False,
) -> NIRAgreement:
    """Import ``graph`` with the real ``reader``, run it, and compare shapes and spikes.

    Args:
        graph: a ``nir.NIRGraph`` or the path of a file.
        reader: ``"snntorch"``, ``"spikingjelly"``, ``"norse"`` or ``"sinabs"``.
        x: ``[T, N, ...]``, the input of each step.
        expected: ``[T, N, ...]``, the model's own output of each step; by default the output that
            the graph says, as the target reads it that its metadata names, else by the book.
        any_version: accept other versions than the measured ones.

    Raises:
        ExportError: if the reader is unknown, missing, of another version, or cannot import or run
            the graph, with its own words.
    """
    if reader not in _RUNS:
        reader_named(reader)
        raise ExportError("target 'file' has no reader of its own; name one of " + ", ".join(_RUNS))
    graph = read_nir(graph)
    ours = run_graph(graph, x, reader_named(_meant_for(graph)))
    seen, out = import_nir(graph, reader, x, any_version=any_version)
    neurons = [n for n, node in graph.nodes.items() if hasattr(node, "v_threshold")]
    (name,) = [n for n, node in graph.nodes.items() if type(node).__name__ == "Output"]
    emits = next(source for source, target in graph.edges if target == name) in neurons
    rows = [_compare(n, seen[n], ours[n], spikes=True) for n in neurons if n in seen]
    wanted = ours[name] if expected is None else expected
    rows.append(_compare(name, out, wanted, spikes=emits))
    return NIRAgreement(reader, tuple(rows), tuple(n for n in neurons if n not in seen))


def _meant_for(graph: Any) -> str:
    return str(graph.metadata.get("spikenm_fx.target", "file"))


def read_nir(graph: Any) -> Any:
    """A copy of a graph, or the graph in a file.

    Raises:
        ExportError: if the file cannot be read.
    """
    package = needed("nir", "verify_nir")
    if not isinstance(graph, str | Path):
        return copy.deepcopy(graph)
    try:
        # its own check takes groups and kernels that are no squares for mistakes
        return package.read(str(graph), type_check=False)
    except Exception as error:
        raise ExportError(f"{graph}: cannot be read as NIR: {error}") from error


def import_nir(
    graph: Any, reader: str, x: Tensor, *, any_version: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """What the reader's own model emits.

    Args:
        graph: a ``nir.NIRGraph`` or the path of a file.
        reader: as for :func:`verify_nir`.
        x: ``[T, N, ...]``.
        any_version: accept other versions than the measured ones.

    Returns:
        ``[T, N, ...]`` of each of its modules by the node's name, and of its output.

    Raises:
        ExportError: if it cannot.
    """
    package = {"norse": "norse.torch"}.get(reader, reader)
    needed("nirtorch", f"reading NIR by {reader}")
    needed(reader, f"reading NIR by {reader}")
    if not any_version:
        refuse_untested("nir", "nirtorch", reader)
    names = {name.replace(".", "_"): name for name in graph.nodes}
    with quiet():
        try:
            with torch.no_grad():
                return _RUNS[reader](needed(package, "verify_nir"), copy.deepcopy(graph), x, names)
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"{reader} cannot import or run the graph: {type(error).__name__}: {error}"
            ) from error


class _Heard:
    """What the modules of an imported model emit, step by step."""

    def __init__(self, net: nn.Module, names: Mapping[str, str]) -> None:
        self.values: dict[str, list[Tensor]] = {}
        for key, child in net.named_children():
            if key in names:
                child.register_forward_hook(self._hook(names[key]))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else out
            self.values.setdefault(name, []).append(value.detach().clone())

        return hook

    def stacked(self) -> dict[str, Tensor]:
        return {name: torch.stack(values) for name, values in self.values.items()}


def _stepwise(
    net: nn.Module, x: Tensor, names: Mapping[str, str]
) -> tuple[dict[str, Tensor], Tensor]:
    heard, state, outs = _Heard(net, names), None, []
    for step in x:
        out, state = net(step, state)
        outs.append(out)
    return heard.stacked(), torch.stack(outs)


def _spikingjelly(_: Any, graph: Any, x: Tensor, names: Any) -> tuple[dict[str, Tensor], Tensor]:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return _stepwise(import_from_nir(graph, dt=DT, step_mode="s"), x, names)


def _snntorch(_: Any, graph: Any, x: Tensor, names: Any) -> tuple[dict[str, Tensor], Tensor]:
    from snntorch.import_nir import import_from_nir

    return _stepwise(import_from_nir(graph), x, names)


def _norse(package: Any, graph: Any, x: Tensor, names: Any) -> tuple[dict[str, Tensor], Tensor]:
    return _stepwise(package.from_nir(graph, dt=DT), x, names)


def _sinabs(package: Any, graph: Any, x: Tensor, names: Any) -> tuple[dict[str, Tensor], Tensor]:
    """It takes batch and time in one axis, the batch first."""
    from sinabs.nir import from_nir

    del package
    net = from_nir(graph, batch_size=x.shape[1])
    heard = _Heard(net, names)
    out, _ = net(x.transpose(0, 1).flatten(0, 1))

    def over_time(value: Tensor) -> Tensor:
        whole: Tensor = value.unflatten(0, (x.shape[1], x.shape[0]))
        return whole.transpose(0, 1)

    return {n: over_time(v[0]) for n, v in heard.values.items()}, over_time(out)


_RUNS: Mapping[str, Callable[..., tuple[dict[str, Tensor], Tensor]]] = MappingProxyType(
    {"spikingjelly": _spikingjelly, "snntorch": _snntorch, "norse": _norse, "sinabs": _sinabs}
)


def _compare(name: str, seen: Tensor, wanted: Tensor, *, spikes: bool) -> NodeAgreement:
    shapes = tuple(seen.shape), tuple(wanted.shape)
    if shapes[0] != shapes[1]:
        return NodeAgreement(name, *shapes, wanted.numel(), wanted.numel(), 0)
    close = torch.isclose(seen, wanted, rtol=1e-4, atol=1e-5)
    wrong = seen != wanted if spikes else ~close
    steps = wrong.flatten(1).any(1).nonzero()
    first = int(steps[0]) if len(steps) else None
    return NodeAgreement(name, *shapes, int(wrong.sum()), wrong.numel(), first)
