"""How a message reaches the neighbour.

The training loop sees `Links` only and never asks which kind it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from lightning_local.message import Message

__all__ = ["InProcessLinks", "Links"]


class Links(ABC):
    """The two directions between neighbouring local modules k and k + 1."""

    @abstractmethod
    def send(self, k: int, message: Message) -> None:
        """Hands a message to local module `k`."""

    @abstractmethod
    def receive(self, k: int) -> Message:
        """Takes the message for local module `k`."""

    @abstractmethod
    def return_error(self, k: int, error: torch.Tensor) -> None:
        """Hands the boundary error back to local module `k`; its shape is the hidden state's."""

    @abstractmethod
    def await_error(self, k: int) -> torch.Tensor:
        """Takes the boundary error for local module `k`."""


class InProcessLinks(Links):
    """Neighbours in one process: a message is handed over as it is."""

    def __init__(self) -> None:
        self._messages: dict[int, Message] = {}
        self._errors: dict[int, torch.Tensor] = {}

    def send(self, k: int, message: Message) -> None:
        """Keeps the message until it is received."""
        self._messages[k] = message

    def receive(self, k: int) -> Message:
        """Gives the message away, so that its tensors can be freed."""
        return self._messages.pop(k)

    def return_error(self, k: int, error: torch.Tensor) -> None:
        """Keeps the error until it is awaited."""
        self._errors[k] = error

    def await_error(self, k: int) -> torch.Tensor:
        """Gives the error away."""
        return self._errors.pop(k)
