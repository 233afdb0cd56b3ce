"""Where a head sits: the facts about its hidden state and the units behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_local.body import Body
from lightning_local.dryrun import Boundary

__all__ = ["Place", "Unit"]


@dataclass(frozen=True)
class Unit:
    """A unit that a head may imitate.

    Attributes:
        body: Its code and the names of its parameters.
        input: The form of the hidden state it takes; None where it is not clear.
        output: The form of what it returns; None for the last unit, or where it is not clear.
        last: It is the network's last unit.
    """

    body: Body
    input: Boundary | None
    output: Boundary | None
    last: bool = False


@dataclass(frozen=True)
class Place:
    """Where a head sits, and what it has to predict.

    Attributes:
        k: Index of its local module.
        num_modules: K.
        hidden: The form of its hidden state.
        out_features: Number of logits.
        pools: One prediction per sample; False: one per token.
        unit: Index of the last unit with a part in its local module.
        later: All units after that one.
        input: The network's input, a tensor without data; None if it is something else.
    """

    k: int
    num_modules: int
    hidden: Boundary
    out_features: int
    pools: bool
    unit: int
    later: Sequence[Unit]
    input: torch.Tensor | None = None

    @property
    def tokens(self) -> bool:
        """The hidden state is a sequence of tokens, `(N, T, C)`."""
        return len(self.hidden.space) == 1 and self.hidden.channel_dim == 2
