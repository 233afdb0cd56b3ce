"""Local losses: what one local module minimises. Pure torch.

`PredSim` stands in `similarity.py`, `InfoPro` in `reconstruction.py`, what a loss is in
`objectives.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_local.objectives import Criterion, Loss, Objective, own, per_item
from lightning_local.place import Place
from lightning_local.reconstruction import InfoPro
from lightning_local.similarity import PredSim

__all__ = ["CrossEntropy", "InfoPro", "Loss", "Objective", "PredSim"]


class CrossEntropy(Loss):
    """The task loss on the head's output: cross entropy, or whatever `criterion` is.

    Example:
        >>> CrossEntropy().needs_input
        False
    """

    def build(self, place: Place, criterion: Criterion) -> Objective:
        """Makes the loss; a criterion that is a module is copied, so each has its own buffers."""
        return _Task(own(criterion), not place.pools)


class _Task(Objective):
    def __init__(self, criterion: Criterion, tokens: bool) -> None:
        super().__init__()
        self.criterion = criterion
        self.tokens = tokens

    def forward(
        self, output: torch.Tensor, hidden: torch.Tensor, target: Any, input: Any = None
    ) -> torch.Tensor:
        return self.criterion(*per_item(output, target, self.tokens))
