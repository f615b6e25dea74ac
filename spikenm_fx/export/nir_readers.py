# SPDX-License-Identifier: Apache-2.0
"""How each program reads a NIR file, measured: which nodes arrive, and what becomes of numbers.

| reader | nodes that arrive |
|---|---|
| spikingjelly | Affine, Linear, Conv1d, Conv2d, AvgPool2d, Flatten, IF, LIF |
| snntorch | Affine, Linear, Conv2d, AvgPool2d, Flatten, LIF (IF becomes a `Leaky` of beta 0.9) |
| norse | Affine, Linear, Conv2d, SumPool2d, Flatten, IF, LIF; all others vanish |
| sinabs | Affine, Conv2d, SumPool2d, Flatten, LIF, LI |
| file | all of these, and I: by the book |

| reader | fires | r | numbers |
|---|---|---|---|
| spikingjelly | at the threshold | 1 or tau / dt, else refused | one for all neurons of a layer |
| snntorch | above it | read | one threshold a layer; resets to 0, leaks to 0 |
| norse | above it | not read | `dt=1e-4` must be asked for; resets to 0 |
| sinabs | several times a step | not read | tau counts steps; resets by subtraction, always |
| file | above it | read | tau in seconds, of steps of 1e-4 |

Grouped convolutions do not arrive in SpikingJelly, depthwise ones nowhere.  Recurrent connections
arrive in SpikingJelly and Norse.  Branches that meet again arrive in SpikingJelly and snnTorch: the
other two run nodes depth first and lose one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from spikenm_fx.errors import ExportError, did_you_mean

__all__ = ["DT", "READERS", "Reader", "reader_named"]

DT = 1e-4
"""Seconds of a step: what SpikingJelly and snnTorch take for granted, and Norse is to be told."""

_COMMON = frozenset(["Affine", "Linear", "Conv2d", "Flatten", "LIF"])


@dataclass(frozen=True, slots=True)
class Reader:
    """What one program makes of a NIR file.

    Attributes:
        name: as :func:`spikenm_fx.export.nir` takes it.
        nodes: that arrive.
        strict: fires above the threshold only, not at it.
        counts: emits several spikes a step and resets by subtraction (sinabs); the others one, and
            reset to a value.
        reset: may reset to, and leak towards, another value than 0.
        uniform: names of the parameters that must be the same in all neurons of a layer.
        groups: convolutions in groups arrive.
        recurrent: recurrent connections arrive.
        in_preorder: runs the nodes depth first, each as soon as one of its sources has run
            (``nirtorch.load``), so that a sum of two branches would miss one of them.
    """

    name: str
    nodes: frozenset[str]
    strict: bool = True
    counts: bool = False
    reset: bool = False
    uniform: tuple[str, ...] = ()
    groups: bool = True
    recurrent: bool = False
    in_preorder: bool = False


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "file": Reader(
            "file",
            _COMMON | {"Conv1d", "AvgPool2d", "SumPool2d", "IF", "LI", "I"},
            reset=True,
            recurrent=True,
        ),
        "spikingjelly": Reader(
            "spikingjelly",
            _COMMON | {"Conv1d", "AvgPool2d", "IF"},
            strict=False,
            reset=True,
            uniform=("decay", "gain", "threshold", "reset value"),
            groups=False,
            recurrent=True,
        ),
        "snntorch": Reader(
            "snntorch", _COMMON | {"AvgPool2d"}, uniform=("gain", "threshold", "reset value")
        ),
        "norse": Reader("norse", _COMMON | {"SumPool2d", "IF"}, recurrent=True, in_preorder=True),
        "sinabs": Reader(
            "sinabs",
            (_COMMON | {"SumPool2d", "LI"}) - {"Linear"},
            strict=False,
            counts=True,
            in_preorder=True,
        ),
    }
)


def reader_named(name: str) -> Reader:
    """The reader of that name.

    Raises:
        ExportError: for an unknown one, with the nearest known.
    """
    if name not in READERS:
        known = f"{', '.join(READERS)}{did_you_mean(str(name), READERS)}"
        raise ExportError(f"target {name!r} is unknown; known are {known}")
    return READERS[name]
