"""Local losses: what one local module minimises. Pure torch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_local.place import Place

__all__ = ["CrossEntropy", "Loss"]

Criterion = Callable[[torch.Tensor, Any], torch.Tensor]


class Loss(ABC):
    """Recipe for the local loss of one local module.

    Attributes:
        needs_input: Whether the network's input has to travel to every local module.
    """

    needs_input: bool = False

    @abstractmethod
    def build(self, place: Place, criterion: Criterion) -> nn.Module:
        """Makes the loss of one local module.

        Args:
            place: Where the head sits.
            criterion: The task loss.

        Returns:
            A module that maps (output of the head, hidden state, target) to a scalar.
        """


class CrossEntropy(Loss):
    """The task loss on the head's output: cross entropy, or whatever `criterion` is.

    Example:
        >>> CrossEntropy().needs_input
        False
    """

    def build(self, place: Place, criterion: Criterion) -> nn.Module:
        """Makes the loss; a criterion that is a module is copied, so each has its own buffers."""
        return _Task(copy.deepcopy(criterion))


class _Task(nn.Module):
    def __init__(self, criterion: Criterion) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, output: torch.Tensor, hidden: torch.Tensor, target: Any) -> torch.Tensor:
        return self.criterion(*per_item(output, target))


def per_item(output: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
    """Joins batch and token dimensions when there is one class index per token.

    Args:
        output: Logits `(N, C)`, or `(N, T, V)` per token.
        target: Class indices `(N,)` or `(N, T)`; anything else is passed on.

    Returns:
        `(N * T, V)` and `(N * T,)` for tokens, else both as they came.
    """
    tokens = (
        isinstance(target, torch.Tensor)
        and not target.is_floating_point()
        and output.ndim == target.ndim + 1
        and output.ndim > 2
        and output.shape[:-1] == target.shape
    )
    if tokens:
        return output.flatten(0, -2), target.flatten()
    return output, target
