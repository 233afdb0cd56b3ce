"""What crosses the boundary between two local modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Fed", "Message"]


class Fed:
    """In place of a batch that is not here: still on its way, or left out."""

    def __repr__(self) -> str:
        """What it stands for."""
        return "a batch of the stage before"


@dataclass(frozen=True)
class Message:
    """The detached tensors one local module hands to the next.

    Attributes:
        values: The hidden state first, then what rides along with it (masks, sizes); for the first
            local module the network's inputs.
        target: The batch's target, for the local losses.
        batch: The user's batch, for the last local module.
        batch_idx: Number of the batch in the epoch.
        input: The network's input, for losses that ask for it; else None.
        gradient: The boundary gradient: gradient of the sender's loss with respect to the hidden
            state, unscaled; None unless the coupling sends it.
    """

    values: tuple[Any, ...]
    target: Any
    batch: Any
    batch_idx: int
    input: Any = None
    gradient: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Holds our own invariant: no autograd edge crosses a boundary."""
        for value in (*self.values, self.gradient):
            assert not (isinstance(value, torch.Tensor) and value.grad_fn is not None)
