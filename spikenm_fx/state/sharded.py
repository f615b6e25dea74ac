# SPDX-License-Identifier: Apache-2.0
"""Models whose parameters are shared out over ranks: what no single rank can do with them."""

from __future__ import annotations

from torch import nn

from spikenm_fx._torch import is_fsdp_module
from spikenm_fx.errors import some_of

__all__ = ["advice_if_sharded"]


def advice_if_sharded(model: nn.Module) -> str:
    """A sentence for errors about ``model``, led in by a blank; empty if it is whole here."""
    gathered = any(map(is_fsdp_module, nn.Module.modules(model)))  # perhaps, by a failed forward
    parameters = nn.Module.named_parameters(model)
    names = [name for name, p in parameters if gathered or hasattr(p, "device_mesh")]
    if not names:
        return ""
    return (
        f" {some_of(names, 2)} are shared out over ranks, which only the training loop gathers: do "
        "this before fully_shard or parallelize_module, or with a model of one process that has "
        "loaded get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))."
    )
