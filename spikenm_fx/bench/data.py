# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 from a folder of the user, split the same way every time."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from spikenm_fx.demo.data import Split

__all__ = ["cifar10", "shrunk"]


def cifar10(folder: Path, train: int | None = None, test: int | None = None) -> Split:
    """CIFAR-10 from ``train.npz`` and ``test.npz`` with JPEG bytes, normalised per channel.

    Args:
        folder: holds the two files: ``jpeg`` uint8 (all images one after the other), ``offset``
            int64 (where each begins, and the end), ``label`` uint8.
        train: how many training images, the same ones each time; all by default.
        test: how many test images.

    Raises:
        FileNotFoundError: if a file is missing.
    """
    images, labels = _jpegs(folder / "train.npz", train)
    test_images, test_labels = _jpegs(folder / "test.npz", test)
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return Split((images - mean) / std, labels, (test_images - mean) / std, test_labels)


def shrunk(data: Split, size: int) -> Split:
    """The same images at ``size`` x ``size``, by averaging squares of pixels.

    Raises:
        ValueError: if the images' size is not a multiple of ``size``.
    """
    full = data.train_images.shape[-1]
    if size < 1 or full % size:
        raise ValueError(f"images of {full} x {full} cannot be averaged to {size} x {size}")
    if size == full:
        return data
    train, test = (avg_pool2d(x, full // size) for x in (data.train_images, data.test_images))
    return data._replace(train_images=train, test_images=test)


def _jpegs(path: Path, count: int | None) -> tuple[Tensor, Tensor]:
    import numpy as np
    from PIL import Image

    with np.load(path) as file:
        jpeg, offset, label = file["jpeg"], file["offset"], file["label"]
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))[:count].tolist()
    pictures = [
        np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB"))
        for i in order
    ]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(label[order].astype("int64"))
