# SPDX-License-Identifier: Apache-2.0
"""A part of a model as a program, in the place of its modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spikenm_fx.program.engine import Engine

__all__ = ["ProgramPart"]


class ProgramPart(nn.Module):
    """What several modules of a model computed, as one program among the model's other modules.

    The model's reset finds it as it finds neurons: by its method ``reset`` or ``n_reset``.

    Args:
        engine: of the part.
        names: of the modules that it stands for.
    """

    def __init__(self, engine: Engine, names: tuple[str, ...]) -> None:
        super().__init__()
        self.engine, self.names = engine, names
        super().train(False)

    def forward(self, x: Tensor) -> Any:
        """What the modules gave; tensors that are not there yet are computed first.

        Args:
            x: of the shape that the first of the modules takes.
        """
        materialize = getattr(x, "materialize", None)
        return self.engine(x if materialize is None else materialize())

    def reset(self) -> None:
        """Put all of its neurons to rest."""
        self.engine.reset()

    n_reset = reset  # as BrainCog calls it

    def train(self, mode: bool = True) -> ProgramPart:
        """It only runs; ``eval`` and ``train`` of the model around it pass by."""
        return self

    def extra_repr(self) -> str:
        """Shown by print(engine)."""
        return ", ".join(self.names)
