# SPDX-License-Identifier: Apache-2.0
"""As it was before: run somebody's model, look at it, and leave no trace of that.

:func:`preserved` takes a snapshot (:mod:`~spikenm_fx.state.snapshot`) of everything that a module
tree holds; parameters are copied only when something is about to write into them
(:mod:`~spikenm_fx.state.guard`).  :func:`preserved_in_eval`, :func:`uncompiled` and
:func:`reset_to_rest` are for measuring (:mod:`~spikenm_fx.state.rest`).  :func:`read_parameter`
lets a module that hands out a computed parameter tell whoever looks which parameter that was
(:mod:`~spikenm_fx.state.parameters`);
:func:`advice_if_sharded` tells of models in parts; :func:`deepcopied` copies those whose own way
does not work.
"""

from spikenm_fx.state.copied import deepcopied
from spikenm_fx.state.parameters import ParameterReader, is_reading, read_parameter, reading
from spikenm_fx.state.rest import (
    RESET_METHODS,
    as_given,
    preserved_in_eval,
    reset_to_rest,
    takes_no_arguments,
    uncompiled,
)
from spikenm_fx.state.sharded import advice_if_sharded
from spikenm_fx.state.snapshot import detach_state, preserved, preserved_records

__all__ = [
    "RESET_METHODS",
    "ParameterReader",
    "advice_if_sharded",
    "as_given",
    "deepcopied",
    "detach_state",
    "is_reading",
    "preserved",
    "preserved_in_eval",
    "preserved_records",
    "read_parameter",
    "reading",
    "reset_to_rest",
    "takes_no_arguments",
    "uncompiled",
]
