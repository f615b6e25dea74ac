# SPDX-License-Identifier: Apache-2.0
"""Loops and their instructions are found in a disassembly."""

from spikenm_fx.bench.instructions import Loop, loops_of

LISTING = """
0000000000001000 <outer(float*)>:
    1000:\t4f000400 \tmovi\tv0.4s, #0x0
    1004:\t3dc00021 \tldr\tq1, [x1]
    1008:\t4e21cc40 \tfmla\tv0.4s, v2.4s, v1.4s
    100c:\t91004021 \tadd\tx1, x1, #0x10
    1010:\tf1000442 \tsubs\tx2, x2, #0x1
    1014:\t54ffff81 \tb.ne\t1004 <outer(float*)+0x4>
    1018:\tf1000463 \tsubs\tx3, x3, #0x1
    101c:\t54ffff21 \tb.ne\t1000 <outer(float*)>
    1020:\td65f03c0 \tret

0000000000001024 <plain(int)>:
    1024:\tf1000400 \tsubs\tx0, x0, #0x1
    1028:\t54ffffe1 \tb.ne\t1024 <plain(int)>
"""


def test_innermost_loops_on_vectors_are_counted() -> None:
    """The outer loop, and one without arithmetic on vectors, are not."""
    assert loops_of(LISTING) == [Loop("outer(float*)", 5, 2, 1, 0)]
