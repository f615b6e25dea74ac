# SPDX-License-Identifier: Apache-2.0
"""An engine that is a program: one call into the library per forward, and a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikenm_fx.checkpoint import write_atomically
from spikenm_fx.errors import PackedFileError, PackError
from spikenm_fx.native.threads import kernel_threads
from spikenm_fx.program.held import Held, metadata_of
from spikenm_fx.program.native import Net

__all__ = ["Engine", "load_engine"]


class Engine(nn.Module):
    """A packed network as one native program.

    Made by ``pack(model, x, program=True)``, or by :func:`load_engine` from a file, without the
    model's code.  States are kept between calls as the model keeps them, until :meth:`reset`.  One
    engine is one set of states: threads that share it wait for each other, so give each its own
    (``copy.deepcopy``, at rest).

    Args:
        content: the bytes of its file.
        name: of the file, for messages.
    """

    def __init__(self, content: bytes, name: str = "the engine") -> None:
        super().__init__()
        self._net = Net(content, name)
        self._held = Held(content, self._net.stored)
        about = metadata_of(content)
        self._result, _, places = about.get("result", "tensor").partition(" ")
        self._places = [place == "output" for place in places.split()]
        self._small = about.get("memory") == "small"
        what, _, size = about.get("folded", "").partition(" ")
        self._folded = None if not what else (int(size), -1) if what == "batch" else (-1, int(size))
        self._operations: list[str] = json.loads(about["operations"])
        self._names: list[str] = json.loads(about.get("inputs", '["x"]'))
        self._taken: list[int] = json.loads(about.get("taken", "[0]"))
        if len(self._taken) != self._net.inputs or not all(
            0 <= at < len(self._names) for at in self._taken
        ):
            raise PackedFileError(f"{name}: it names other inputs than its program reads")
        super().train(False)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of the input that it was made from; steps and batch may have other sizes."""
        shape = self._net.input()[0]
        return shape if self._folded is None else (shape[0] * shape[1], *shape[2:])

    @property
    def example_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all inputs that it reads, in order."""
        if self._net.inputs == 1:
            return (self.example_shape,)
        return tuple(self._net.input(at)[0] for at in range(self._net.inputs))

    @property
    def operations(self) -> list[str]:
        """What it runs, in order: the kind of each operation and the module that it was."""
        return list(self._operations)

    @property
    def resident_bytes(self) -> int:
        """Bytes that it keeps in memory: layouts, what calls reuse, and what of its file they lack.

        With ``memory="small"`` the layouts are all that there is of the weights.
        """
        return self._held.nbytes + sum(self._net.nbytes())

    @property
    def content(self) -> bytes:
        """The bytes of its file."""
        return self._held.content()

    @property
    def small(self) -> bool:
        """Whether its weights stay packed in memory."""
        return self._small

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of each operation's layout, in the order of :attr:`operations`."""
        return self._net.op_bytes(len(self._operations))

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Run the network on a whole input, as the model takes it.

        Args:
            inputs: fp32 on the CPU, of the examples' shapes but for the number of steps and the
                batch, which all share.
            named: those that follow by their names in the model's forward.

        Returns:
            What the model returns: a tensor, or a tuple or list of them; None in the place of
            states, which the engine keeps itself.

        Raises:
            PackError: for an input that it does not take, by name.
        """
        return self._call(inputs, named, False)

    def step(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Run one time step, from the states that the last call left.

        Args:
            inputs: one step of each, of its shape without the axis of time where it has one.
            named: as in a call.

        Returns:
            As a call; outputs over time are those of this step, without that axis.

        Raises:
            PackError: for an input that it does not take, by name.
        """
        return self._call(inputs, named, True)

    def reset(self) -> None:
        """Put all neurons to rest."""
        self._net.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the engine to one file that :func:`load_engine` and ``spikenm-run`` read.

        The file appears under its name only when it is complete.

        Args:
            path: of the file, by custom ``*.snm``.

        Raises:
            CheckpointError: if the disk refuses.
        """
        write_atomically(Path(path), lambda part: part.write_bytes(self.content))

    def _call(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], step: bool) -> Any:
        if len(inputs) == len(self._names) == 1 and not named:
            x = inputs[0]
            if type(x) is Tensor and (step or self._folded is None):
                quick = self._net.quick(x, step, kernel_threads())
                if quick is not None:
                    return quick if self._result == "tensor" else self._returned(quick)
        else:
            inputs = self._bound(inputs, named)
        for x in inputs:
            if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device.type != "cpu":
                what = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
                raise PackError(f"the input is {what}; an engine takes a float32 tensor on the CPU")
            if x.requires_grad and torch.is_grad_enabled():
                raise PackError("an engine has no gradients; detach its input")
        if not step:
            inputs = tuple(map(self.unfolded, inputs))
        ready = tuple(x if x.is_contiguous() else x.contiguous() for x in inputs)
        found = self._net.call(ready, step=step, threads=kernel_threads())
        return found[0] if self._result == "tensor" else self._returned(found)

    def _bound(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The inputs that the program reads, in order."""
        given = dict(zip(self._names, inputs, strict=False))
        wrong = [n for n in named if n in given or n not in self._names]
        missing = [n for n in self._names if n not in given and n not in named]
        if len(inputs) > len(self._names) or wrong or missing:
            raise PackError(
                f"the engine is given {len(inputs)} inputs"
                f"{' and ' + ', '.join(named) if named else ''}; it takes "
                f"{', '.join(self._names)}, each once"
            )
        given.update(named)
        return tuple(given[self._names[at]] for at in self._taken)

    def _returned(self, found: Tensor | Iterable[Tensor]) -> Any:
        given: list[Tensor | None] = [found] if isinstance(found, Tensor) else list(found)
        if not all(self._places):  # a state that the model returns, and the engine keeps
            outputs = iter(given)
            given = [next(outputs) if is_output else None for is_output in self._places]
        return tuple(given) if self._result == "tuple" else given

    def unfolded(self, x: Tensor) -> Tensor:
        """An input with axes of their own for samples and steps, where they share the first.

        Args:
            x: ``(samples * steps, *)`` of a network that takes both on one axis; any other shape
                of another network, which stays as it is.

        Returns:
            ``(samples, steps, *)``, sharing memory.

        Raises:
            PackError: if its first axis is no multiple of what is known of either.
        """
        if self._folded is None or not x.dim():
            return x
        known = max(self._folded)
        if x.shape[0] % known:
            what = "samples" if self._folded[1] < 0 else "time steps"
            raise PackError(
                f"axis 0 of the input has size {x.shape[0]}; it holds {known} {what}, and must be "
                "a multiple of that"
            )
        whole: Tensor = x.unflatten(0, self._folded)
        return whole

    def train(self, mode: bool = True) -> Engine:
        """Engines only run.

        Raises:
            PackError: for ``train(True)``.
        """
        if mode:
            raise PackError("an engine cannot train; train the model that it was made of")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """Another engine of the same weights, at rest."""
        copied = Engine(self.content)
        copied.__dict__ |= {k: v for k, v in self.__dict__.items() if k == "_spikenm_packing"}
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> Any:
        """Its bytes: pickled engines come back at rest."""
        return Engine, (self.content,)

    def extra_repr(self) -> str:
        """Shown by print(engine)."""
        return f"{len(self._operations)} operations, {self._held.size} bytes"


def load_engine(path: str | os.PathLike[str]) -> Engine:
    """Read an engine that :meth:`Engine.save` wrote; no code of the model is needed.

    Args:
        path: of the file.

    Raises:
        PackedFileError: if the file is no engine, of a newer version, damaged or edited.
        FileNotFoundError: if it is missing.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PackedFileError(f"{path} cannot be read: {error}") from error
    return Engine(content, str(path))
