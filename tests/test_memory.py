# SPDX-License-Identifier: Apache-2.0
"""What a masked layer keeps alive between forward and backward."""

import gc

import torch
from torch import nn

import spikenm_fx
from spikenm_fx import Rule


def alive() -> dict[int, int]:
    """Bytes of every storage that a tensor known to the garbage collector holds."""
    gc.collect()
    kinds = (torch.Tensor, nn.Parameter)  # and no fake or sparse tensors, which have no storage
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    tensors = [tensor for tensor in found if tensor.layout is torch.strided]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_at_most_two_weights_are_alive_between_forward_and_backward():
    """Beside parameters and activations a layer holds its masked weight and one bool mask."""
    model = nn.Sequential(nn.Linear(256, 128))
    spikenm_fx.sparsify(model, "2:4", rules=[Rule("0")])
    model(torch.randn(2, 256)).sum().backward()  # whatever is made once is there now
    with torch.no_grad():
        model[0].weight_dense.add_(0.01)  # an optimizer step: the next forward draws anew
    model[0]._nm_mask._cache = None
    before = alive()
    loss = model(torch.randn(2, 256)).sum()
    after = alive()
    new = sum(size for pointer, size in after.items() if pointer not in before)
    weight = model[0].weight_dense.untyped_storage().nbytes()
    assert weight < new <= 2 * weight
    loss.backward()
