# SPDX-License-Identifier: Apache-2.0
"""The demo's data set: small enough for a minute, and part of an installed package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Split", "digits"]


class Split(NamedTuple):
    """Images ``[N, C, H, W]`` in [0, 1] and int64 labels ``[N]``, for training and testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(test_share: float = 0.3) -> Split:
    """scikit-learn's 1,797 handwritten digits, 8x8, shuffled once with a fixed seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    cut = round(len(images) * (1 - test_share))
    return Split(images[:cut], labels[:cut], images[cut:], labels[cut:])
