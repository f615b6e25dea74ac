# SPDX-License-Identifier: Apache-2.0
"""Moving shapes seen by an event camera: a data set of our own, the same from the same seed.

A square or a ring crosses a dark field in one of four directions, at a speed, size, contrast and
start of its own.  A pixel emits an event where the logarithm of its brightness has changed by the
threshold since its last event, up (channel 0) or down (channel 1), as in the event-camera model of
ESIM (Rebecq et al., CoRL 2018); a few events are noise.  Shape and direction are the class: no
single frame tells the direction, so that a network must remember.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikenm_fx.demo.data import Split

__all__ = ["CLASSES", "moving_shapes"]

CLASSES = 8  # two shapes, four directions
_SPEED = (0.35, 0.8)  # pixels a step
_RADIUS = (1.8, 3.0)  # pixels
_THICK = 0.5  # half the width of a ring's line
_CONTRAST = (0.6, 1.4)  # natural logarithm of brightness over the background's
_THRESHOLD = 0.25  # change of the logarithm that makes an event
_NOISE = 0.01  # share of pixels and steps with a random event


def moving_shapes(
    train: int = 2000, test: int = 1000, *, steps: int = 20, size: int = 12, seed: int = 0
) -> Split:
    """Event frames ``[N, T, 2, size, size]`` of zeros and ones, and labels.

    Args:
        train: training samples.
        test: test samples.
        steps: T.
        size: height and width.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    frames, labels = _sequences(train + test, steps, size, generator)
    return Split(frames[:train], labels[:train], frames[train:], labels[train:])


def _sequences(
    count: int, steps: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = (labels % 4).float() * (math.pi / 2)
    radius, contrast, speed = uniform(*_RADIUS), uniform(*_CONTRAST), uniform(*_SPEED)
    along = uniform(0.0, 1.0) * 2 - (steps * speed) / 2  # the path's middle is the field's, about
    across = uniform(-size / 4, size / 4)
    seen = torch.zeros(count, size, size)  # logarithm of brightness at the last event
    frames = torch.zeros(count, steps, 2, size, size)
    grid = torch.arange(size).float() - (size - 1) / 2
    for step in range(steps + 1):
        path = along + speed * step
        x = path * angle.cos() - across * angle.sin()
        y = path * angle.sin() + across * angle.cos()
        dx, dy = grid.view(1, 1, -1) - x.view(-1, 1, 1), grid.view(1, -1, 1) - y.view(-1, 1, 1)
        square = radius.view(-1, 1, 1) - torch.maximum(dx.abs(), dy.abs())
        ring = _THICK - ((dx.square() + dy.square()).sqrt() - radius.view(-1, 1, 1)).abs()
        depth = torch.where((labels < 4).view(-1, 1, 1), square, ring)
        inside = (depth + 0.5).clamp(0, 1)  # with a soft edge
        bright = contrast.view(-1, 1, 1) * inside
        if not step:
            seen = bright
            continue
        change = bright - seen
        frames[:, step - 1, 0] = (change >= _THRESHOLD).float()
        frames[:, step - 1, 1] = (change <= -_THRESHOLD).float()
        seen = torch.where(change.abs() >= _THRESHOLD, bright, seen)
    noise = torch.rand(frames.shape, generator=generator) < _NOISE / 2
    return torch.maximum(frames, noise.float()), labels
