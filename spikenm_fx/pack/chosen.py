# SPDX-License-Identifier: Apache-2.0
"""``pack(model, x, program=...)``: one program, or an engine with parts that are, and why."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spikenm_fx.errors import PackError, SpikeNMWarning
from spikenm_fx.pack.copying import copy_at_rest, unregister
from spikenm_fx.pack.programs import made_program
from spikenm_fx.pack.summary import GAINS, PackReport
from spikenm_fx.pattern import NM
from spikenm_fx.program.draft import NotLowered
from spikenm_fx.program.held import Memory

__all__ = ["with_program"]


def with_program(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    backend: str | Mapping[str, str],
    dtype: torch.dtype | None,
    nm: NM | None,
    *,
    check: bool,
    auto: bool,
    memory: Memory,
) -> nn.Module:
    """The engine that is a program; or one without, of which parts are programs.

    Args:
        model: folded, on the CPU; it is left as it is.
        args: the example inputs.
        backend: of an engine without a program.
        dtype: of the stored weights, or None.
        nm: what each layer must be that is not dense, or None.
        check: compare the program with the model.
        auto: take whichever of both gains more.
        memory: whether weights stay packed in memory.

    Raises:
        PackError: for weights that cannot be packed, or no examples.
    """
    if args is None:
        raise PackError("a program is made from example inputs: pack(model, x, program=True)")
    made, why = None, ""
    copied = copy_at_rest(model)
    try:
        made = made_program(copied, args, dtype, nm, check=check, memory=memory)
    except NotLowered as error:
        why = f"There is no program of this network. {error}"
        if not auto:
            warnings.warn(f"pack: {why} It runs without one.", SpikeNMWarning, stacklevel=3)
    finally:
        unregister(copied)
    if made is not None and not auto:
        return made
    # what runs without a program need not be imported where there is one
    from spikenm_fx.pack.copied import packed_copy
    from spikenm_fx.pack.partly import run_parts_as_programs

    engine = packed_copy(model, args, backend, dtype, nm, check=check, memory=memory)
    report: PackReport = engine.__dict__["_spikenm_packing"]
    if made is not None:
        own: PackReport = made.__dict__["_spikenm_packing"]
        why, faster = _compared(own, report)
        made.__dict__["_spikenm_packing"] = _noted(own, why)
        if faster:
            return made
    else:
        copied = copy_at_rest(model)
        try:
            report = run_parts_as_programs(
                copied, engine, report, args, why, dtype=dtype, nm=nm, check=check, memory=memory
            )
        finally:
            unregister(copied)
    engine.__dict__["_spikenm_packing"] = _noted(report, why)
    return engine


def _compared(program: PackReport, copied: PackReport) -> tuple[str, bool]:
    """Which of two engines gains more, in words too."""
    assert program.whole is not None
    if copied.whole is None:  # layers that stay as they are stored are not timed
        return "", True
    gains = program.whole.gain, copied.whole.gain
    told = f"{gains[0]:.2f}x as one program, {gains[1]:.2f}x as a copy of the model"
    return f"The faster of two engines runs: {told}.", gains[0] >= max(gains[1], GAINS)


def _noted(report: PackReport, why: str) -> PackReport:
    return replace(report, note=" ".join(part for part in (report.note, why) if part))
