"""One local module: a body of the user's network with its auxiliary head. Forward only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_local.body import Body
from lightning_local.objectives import Objective

__all__ = ["LocalModule"]


class LocalModule(nn.Module):
    """Body and head.

    Args:
        body: A slice of the user's network; it registers nothing.
        head: The auxiliary network; None for the last local module.
        objective: The local loss; None for the last local module, whose loss is the user's own.

    Attributes:
        head_in_place: Whether the head starts with an operation that overwrites its input, which
            is what is sent on.
        body_flops: Forward FLOPs of the body per sample: those of matrix products, convolutions
            and attention, a multiplication and an addition counting two.
        head_flops: The same of the head and what else the local loss runs.
    """

    def __init__(self, body: Body, head: nn.Module | None, objective: Objective | None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.objective = objective
        self.head_in_place = False
        self.body_flops = 0
        self.head_flops = 0

    def forward(self, *values: Any) -> Any:
        """Runs the body: see `Body.forward`."""
        return self.body(*values)

    @property
    def predicts(self) -> bool:
        """Whether the head, or the network's own output, is trained to predict."""
        return self.objective is None or self.objective.predicts

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's output for a hidden state: logits `(N, C)`, or `(N, T, V)` per token.

        Under some losses it is no prediction (see `predicts`).
        """
        assert self.head is not None
        output: torch.Tensor = self.head(hidden.clone() if self.head_in_place else hidden)
        return output
