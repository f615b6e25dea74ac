# SPDX-License-Identifier: Apache-2.0
"""Axes of a token: which of them are its channels, and which become time.

A value holds its tokens as channels of up to two axes of pixels.  What works along another axis
than the channels, as a Linear along the words of a sentence does, reads a copy in which that axis
is the channels.  Where a model makes its time steps of channels, as encoders of time series do,
the steps lie behind each other in one token, which is then cut.
"""

from __future__ import annotations

from spikenm_fx.program.axes import Atom, Layout, size_of
from spikenm_fx.program.code import Code
from spikenm_fx.program.draft import Draft, NotLowered, Ref
from spikenm_fx.program.strided import COPY, strided

__all__ = ["as_steps", "outside", "relaid", "with_channels"]


def outside(draft: Draft, ref: Ref, *groups: tuple[Atom, ...]) -> tuple[Atom, ...]:
    """The axes among some that belong to the batch, as far as anybody knows.

    Args:
        draft: of the program.
        ref: whose axes they are.
        groups: the axes.
    """
    lead = ref.value.layout.lead
    return tuple(a for group in groups for a in group if a in lead and a is not draft.time)


def relaid(draft: Draft, where: str, ref: Ref, channels: tuple[Atom, ...]) -> Ref:
    """The same numbers, of which other axes are the channels, and all that is left is pixels.

    Args:
        draft: of the program.
        where: for messages.
        ref: the value.
        channels: all of them axes of its tokens.

    Raises:
        NotLowered: where more than two axes are left.
    """
    layout = ref.value.layout
    if layout.channels == channels:
        return ref
    left = [a for a in ref.atoms if a in layout.features and a not in channels and a.size > 1]
    thin = [a for a in ref.atoms if a in layout.features and a not in channels and a.size == 1]
    while len(left) < 2 and thin:
        left.append(thin.pop())
    if len(left) + len(thin) > 2:
        raise NotLowered(where, f"it works along one of {len(left) + 1} axes of a token")
    new = Layout((*layout.lead, *channels, *left), channels)
    new.set_pixels([a for a in ref.atoms if a in left])
    groups = [((a,), (a,), ()) for a in (*channels, *left)]
    return Ref(strided(draft, where, COPY, new, groups, ref), ref.axes, ref.step)


def with_channels(draft: Draft, where: str, ref: Ref, axis: int) -> Ref:
    """The same numbers with one axis as their channels; learns it of an input that nobody knows.

    Args:
        draft: of the program.
        where: for messages.
        ref: the value.
        axis: of it.

    Raises:
        NotLowered: where that axis is none of a token.
    """
    layout, group = ref.value.layout, ref.axes[axis]
    if layout.channels is None:
        layout.learn(group)
    if any(atom in layout.lead for atom in group):
        raise NotLowered(
            where,
            "it mixes time steps or samples: its axis of channels is one of those elsewhere",
            inside=outside(draft, ref, group),
        )
    return relaid(draft, where, ref, group)


def as_steps(draft: Draft, where: str, ref: Ref, axis: int) -> Ref:
    """The same numbers, of which one axis of a token is time from here on.

    Args:
        draft: of the program.
        where: what says so.
        ref: the value.
        axis: that is time.

    Raises:
        NotLowered: where the network has time steps already.
    """
    layout, group = ref.value.layout, ref.axes[axis]
    rest = [a for a in ref.atoms if a in layout.features and a not in group]
    if draft.time is not None:
        raise NotLowered(where, f"axis {axis} of its input is not time alone")
    draft.time = time = Atom(size_of(group), "time")
    draft.constant_steps = time.size
    flat = Layout((*layout.lead, *group, *rest), (*group, *rest))
    groups = [((a,), (a,), ()) for a in (*group, *rest)]
    source = Ref(strided(draft, where, COPY, flat, groups, ref), ref.axes, ref.step)
    pixels = rest[:-1] if len(rest) <= 3 else []
    new = Layout((time, *layout.lead, *rest), tuple(rest[len(pixels) :]))
    new.set_pixels(pixels)
    made = draft.apply(Code.STEPS, new, source, name=where)
    return Ref(made, (*ref.axes[:axis], (time,), *ref.axes[axis + 1 :]), ref.step)
