# SPDX-License-Identifier: Apache-2.0
"""Instructions of the hot loops of an aarch64 library: what a processor would have to do."""

from __future__ import annotations

import argparse
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Loop", "loops_of", "main"]

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
            function, lines = head.group(1), []
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


def main(arguments: list[str]) -> None:
    """Print the loops of a library, the longest names cut."""
    parser = argparse.ArgumentParser(prog="spikenm_fx.bench instructions", description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--only", default="add_|fma|lut|event", help="functions that match")
    options = parser.parse_args(arguments)
    command = (OBJDUMP, "-d", "-C", str(options.library))
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(f"{'instructions':>12} {'vector':>6} {'fmla':>4} {'tbl':>4}  loop of")
    for loop in loops_of(listing):
        if re.search(options.only, loop.function):
            short = loop.function.replace("(anonymous namespace)::", "")[:70]
            print(
                f"{loop.instructions:>12} {loop.vector:>6} {loop.fused:>4} {loop.lookups:>4}"
                f"  {short}"
            )
