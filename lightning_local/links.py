"""How a message reaches the neighbour, and what processes of one run tell each other.

The training loop sees `Links` only and never asks which kind it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lightning_local.message import Message

__all__ = ["BrokenLinks", "InProcessLinks", "Links"]


class Links(ABC):
    """The two directions between neighbouring local modules k and k + 1.

    Attributes:
        of_strategy: They were made for a run with a strategy that links processes.
        alone: There is no other process.
        first: This process has local module 0, and reads the data.
        last: It has the last local module, whose loss is the user's.
        replica: Which of the processes with the same local modules, but other data, this is.
        stages: The local modules of each stage; empty for one process.
        skipped: The first stage skips this batch and the rest of the epoch.
    """

    of_strategy: bool = False
    alone: bool = True
    first: bool = True
    last: bool = True
    replica: int = 0
    stages: Sequence[range] = ()
    skipped: bool = False

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

    @abstractmethod
    def owned(self, num_modules: int) -> range:
        """The local modules of this process."""

    @abstractmethod
    def skip(self) -> None:
        """Tells the later stages that this batch, and the rest of the epoch, is left out."""

    @abstractmethod
    def hide(self, inputs: Iterable[Any]) -> None:
        """The network's inputs of a batch, which later stages do not get as part of it."""

    @abstractmethod
    def average(
        self, k: int, parameters: Iterable[torch.nn.Parameter]
    ) -> Callable[[], None] | None:
        """Starts to average gradients of local module `k` over its replicas.

        Returns:
            Waits for the means; None without replicas.
        """

    @abstractmethod
    def from_first(self, make: Callable[[], Any]) -> Any:
        """What is made where the data are read, for all processes."""

    @abstractmethod
    def gather(self, part: Any) -> list[list[Any]] | None:
        """Parts by stage and replica for the process that writes a checkpoint; None for others."""

    @abstractmethod
    def report(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values of all stages for the last one; nothing for the others, which don't wait."""

    @abstractmethod
    def decide(self, value: bool) -> bool:
        """What the first stage thinks, for all; it does not wait for the others."""

    @abstractmethod
    def share(self, values: dict[str, Any]) -> dict[str, Any]:
        """The last stage's values, for all, which wait for it."""

    @abstractmethod
    def reasons(self) -> AbstractContextManager[None]:
        """An error inside gives way to an earlier stage's, of which it may be the result."""

    @abstractmethod
    def add_up(self, counts: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """The sum, or maximum, over all processes."""


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

    def owned(self, num_modules: int) -> range:
        """The local modules of this process."""
        return range(num_modules)

    def skip(self) -> None:
        """Tells the later stages that this batch, and the rest of the epoch, is left out."""

    def hide(self, inputs: Iterable[Any]) -> None:
        """The network's inputs of a batch, which later stages do not get as part of it."""

    def average(
        self, k: int, parameters: Iterable[torch.nn.Parameter]
    ) -> Callable[[], None] | None:
        """Starts to average gradients of local module `k` over its replicas.

        Returns:
            Waits for the means; None without replicas.
        """
        return None

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What is made where the data are read, for all processes."""
        return make()

    def gather(self, part: Any) -> list[list[Any]] | None:
        """Parts by stage and replica for the process that writes a checkpoint; None for others."""
        return [[part]]

    def report(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values of all stages for the last one; nothing for the others, which don't wait."""
        return values

    def decide(self, value: bool) -> bool:
        """What the first stage thinks, for all; it does not wait for the others."""
        return value

    def share(self, values: dict[str, Any]) -> dict[str, Any]:
        """The last stage's values, for all, which wait for it."""
        return values

    def reasons(self) -> AbstractContextManager[None]:
        """Nothing is behind an error here."""
        return nullcontext()

    def add_up(self, counts: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """The sum, or maximum, over all processes."""
        return counts


class BrokenLinks(InProcessLinks):
    """After a failure: the others are elsewhere, so there is nothing whole to save."""

    of_strategy = True

    def gather(self, part: Any) -> list[list[Any]] | None:
        """Nobody writes."""
        return None
