"""What a local loss is: the recipe and what it makes for one local module.

A `Loss` is a recipe; `build` makes the `Objective` of one local module, which may bring a network
of its own (PredSim's projection, InfoPro's decoder); its weights are trained with the head's.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_local.place import Place

__all__ = ["Criterion", "Loss", "Objective", "form_of", "ignored_index", "own", "per_item"]

Criterion = Callable[[torch.Tensor, Any], torch.Tensor]


class Objective(nn.Module, ABC):
    """The loss of one local module.

    Attributes:
        predicts: Whether the head is trained to predict, so that its accuracy says something.
    """

    predicts: bool = True

    @abstractmethod
    def forward(
        self, output: torch.Tensor, hidden: torch.Tensor, target: Any, input: Any
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            output: The head's.
            hidden: The hidden state.
            target: The batch's target.
            input: The network's input; None unless the loss has `needs_input`.
        """

    def networks(self) -> list[nn.Module]:
        """What runs on the hidden state besides the head."""
        return []

    def check(self, output: torch.Tensor, target: Any, input: Any) -> None:
        """Looks at the first batch of a fit; what it finds may wait for the device.

        Raises:
            ValueError: The batch doesn't fit the loss.
        """
        return


class Loss(ABC):
    """Recipe for the local loss of one local module.

    Attributes:
        needs_input: Whether the network's input has to travel to every local module.
        embedding: Number of features the head returns instead of a prediction; None: it predicts;
            0: the loss does not use the head, and none is made.
    """

    needs_input: bool = False
    embedding: int | None = None

    @abstractmethod
    def build(self, place: Place, criterion: Criterion) -> Objective:
        """Makes the loss of one local module.

        Args:
            place: Where the head sits.
            criterion: The task loss.
        """


def own(criterion: Criterion) -> Criterion:
    """A local module's own criterion: a copy of a module, whose buffers it then has for itself.

    A function stays what it is: what it belongs to, the user's module say, goes on changing.
    """
    return copy.deepcopy(criterion) if isinstance(criterion, nn.Module) else criterion


def per_item(output: torch.Tensor, target: Any, tokens: bool = True) -> tuple[torch.Tensor, Any]:
    """Joins batch and token dimensions when there is one class index per token.

    Args:
        output: Logits `(N, C)`, or `(N, T, V)` per token.
        target: Class indices `(N,)` or `(N, T)`; anything else is passed on.
        tokens: Whether the head predicts per token. Else an output whose form is also that of
            `(N, C, ...)`, as torch's criteria take it, is passed on.

    Returns:
        `(N * T, V)` and `(N * T,)` for tokens, else both as they came.
    """
    joined = (
        isinstance(target, torch.Tensor)
        and not target.is_floating_point()
        and output.ndim == target.ndim + 1
        and output.ndim > 2
        and output.shape[:-1] == target.shape
        and (tokens or (output.shape[0], *output.shape[2:]) != target.shape)
    )
    if joined:
        return output.flatten(0, -2), target.flatten()
    return output, target


def form_of(target: Any) -> str:
    """What a target is, for an error."""
    if isinstance(target, torch.Tensor):
        return f"{target.dtype} of shape {tuple(target.shape)}"
    return f"a {type(target).__name__}"


def ignored_index(criterion: Criterion) -> int:
    """The class index that a criterion leaves out; torch's default where it names none."""
    return int(getattr(criterion, "ignore_index", -100))
