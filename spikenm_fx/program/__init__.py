# SPDX-License-Identifier: Apache-2.0
"""A network as one native program: no Python between its kernels, and a file that runs by itself.

``pack(model, x, program=True)`` lowers the trace of a model (:mod:`spikenm_fx.program.lower`) to a
flat list of operations (:mod:`spikenm_fx.program.code`) and hands back an
:class:`~spikenm_fx.program.engine.Engine`.  What has no operation is refused by name; the engine is
then the one that :func:`~spikenm_fx.pack.api.pack` gives without ``program``, in which the largest
parts that have a program are programs (:mod:`spikenm_fx.program.part`), and its report says which,
and why.  An engine *is* the bytes of its file (:mod:`spikenm_fx.program.image`): the library reads
and checks them in the same way whether they come from ``pack``, from
:func:`~spikenm_fx.program.engine.load_engine` or from the program ``spikenm-run``.

Axes are named parts (:mod:`spikenm_fx.program.axes`): reshapes move names, time and batch keep any
size, and heads of an attention are parts of the channels.  Layers, neurons and pools know their
axes; all else that runs along axes of a token is nested loops
(:mod:`spikenm_fx.program.products`).

Work follows the spikes: a layer reads one row of weights per number that is not zero, and silent
inputs cost nothing (``native/csrc/stream.h``).  Spikes between layers are bits.  Memory is planned
once for each batch size and number of steps, and a call allocates nothing but its outputs.
"""

from spikenm_fx.program.draft import NotLowered
from spikenm_fx.program.engine import Engine, load_engine

__all__ = ["Engine", "NotLowered", "load_engine"]
