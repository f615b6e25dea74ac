# SPDX-License-Identifier: Apache-2.0
"""Instructions of the hot loops of an aarch64 library: what a processor would have to do."""

from __future__ import annotations

import argparse
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from spikenm_fx.bench.measure import RESULTS, save

__all__ = ["HOT", "Loop", "Named", "loops_of", "main"]

OBJDUMP = "aarch64-linux-gnu-objdump"
_LINE = re.compile(r"^\s*([0-9a-f]+):\s+[0-9a-f]{8}\s+(\S+)\s*(.*)$")
_HEAD = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_VECTOR = re.compile(r"\b[vq]\d+\b")


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop of a function.

    Attributes:
        function: demangled name.
        instructions: of one turn.
        vector: of these, on vector registers, loads and stores among them.
        fused: multiply-adds among the vector ones.
        lookups: of bytes in a table (``tbl``).
    """

    function: str
    instructions: int
    vector: int
    fused: int
    lookups: int


def loops_of(listing: str) -> list[Loop]:
    """Innermost loops that work on vectors, of a disassembly.

    Args:
        listing: what ``objdump -d -C`` prints.
    """
    found: list[Loop] = []
    function, lines = "", list[tuple[int, str, str]]()
    for text in [*listing.splitlines(), "0 <>:"]:
        head = _HEAD.match(text)
        if head:
            found += _innermost(function, lines)
            function, lines = head.group(1).replace("(anonymous namespace)::", ""), []
        elif line := _LINE.match(text):
            lines.append((int(line.group(1), 16), line.group(2), line.group(3)))
    return found


def _innermost(function: str, lines: list[tuple[int, str, str]]) -> list[Loop]:
    place = {address: at for at, (address, _, _) in enumerate(lines)}
    jumps = []
    for at, (address, operation, operands) in enumerate(lines):
        if operation.startswith("b.") or operation in ("cbnz", "cbz", "tbnz", "tbz"):
            target = re.search(r"\b([0-9a-f]+) <", operands)
            back = int(target.group(1), 16) if target else address + 1
            if back <= address and back in place:
                jumps.append((place[back], at))
    inner = [j for j in jumps if not any(k != j and j[0] <= k[0] and k[1] <= j[1] for k in jumps)]
    loops = []
    for start, end in inner:
        body = lines[start : end + 1]
        vector = [operation for _, operation, operands in body if _VECTOR.search(operands)]
        fused, lookups = vector.count("fmla"), vector.count("tbl")
        if fused or lookups or vector.count("fadd"):
            loops.append(Loop(function, len(body), len(vector), fused, lookups))
    return loops


@dataclass(frozen=True, slots=True)
class Named:
    """A loop that is looked for.

    Attributes:
        name: for the table.
        function: a pattern of the function that holds it.
        turn: what one turn does.
    """

    name: str
    function: str
    turn: str


HOT = (
    Named("spikes, fp32 rows", "add_rows_of<false, float>", "adds 8 inputs to 4 outputs"),
    Named("floats, fp32 rows", "add_rows_of<true, float>", "adds 8 inputs to 4 outputs"),
    Named("spikes, int8 rows", "add_rows_of<false, signed char>", "adds 8 inputs to 4 outputs"),
    Named("packed rows at 2:4, fp32", "add_active<2, float>", "4 kept values, one per output"),
    Named("packed rows at 2:4, int8", "add_active<2, signed char>", "4 kept values"),
    Named("packed rows at 1:8, fp32", "add_active<3, float>", "4 kept values, one per output"),
    Named("fma", "Fma::rows", "one kept value of 2 outputs, for 32 tokens"),
    Named("lut at 2:4", "Lut<Scheme<4, true", "8 inputs of an output, for 64 tokens"),
)
"""Loops in which programs and packed layers spend their time."""


def main(arguments: list[str]) -> None:
    """Print the hot loops of a library, and write ``results/instructions-aarch64.json``."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench instructions", description=__doc__)
    parser.add_argument("library", type=Path, help="libspikenm.so, as nox -s aarch64 builds it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    command = (OBJDUMP, "-d", "-C", str(options.library))
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loops, rows = loops_of(listing), []
    for hot in HOT:
        inside = [loop for loop in loops if hot.function in loop.function]
        if not inside:
            print(f"{hot.name}: no such loop")
            continue
        best = max(inside, key=lambda loop: (loop.fused + loop.lookups, loop.vector))
        counts = {k: v for k, v in asdict(best).items() if k != "function"}
        rows.append({"loop": hot.name, "turn": hot.turn, **counts})
        print(f"{hot.name:<26} {hot.turn:<44} {counts}")
    save("instructions-aarch64", {"rows": rows}, options.out)
