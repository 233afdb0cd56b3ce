"""One local module: a body of the user's network with its auxiliary head. Forward only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_local.augmented import ResidualBlock, UnitCopy
from lightning_local.body import Body
from lightning_local.objectives import Objective
from lightning_local.recompute import recomputed

__all__ = ["RECOMPUTE", "LocalModule"]

RECOMPUTE = ("none", "blocks", "body")


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
        predict_flops: The same of the head alone.
        recompute: Which activations a backward computes anew: `"none"`; `"body"`, all of the body,
            so that those of body and head are never alive together; `"blocks"`, each unit of the
            body and each unit that the head imitates by itself.
        keeps: Nothing is computed twice now: gradients are differentiated again, and need it all.
        followed: Whether layers outside of the network may make the prediction from the last local
            module's output.
        behind: Whether the user's forward makes something of that output.
        trained: Whether the head has seen a batch of a fit, or was loaded.
        pieces: The body's units as bodies of their own, for `"blocks"`; else empty.
    """

    def __init__(self, body: Body, head: nn.Module | None, objective: Objective | None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.objective = objective
        self.head_in_place = False
        self.body_flops = 0
        self.head_flops = 0
        self.predict_flops = 0
        self.recompute = "none"
        self.keeps = False
        self.followed = self.behind = False
        self.trained = False
        self.pieces: tuple[Body, ...] = ()

    def forward(self, *values: Any) -> Any:
        """Runs the body: see `Body.forward`."""
        self.body.check_reads()
        if not self._recomputes:
            return self.body(*values)
        result: Any = values
        for piece in self.pieces or (self.body,):
            result = recomputed(piece, piece.holders(), result, piece.overwrites)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch's, with a look at whether a head comes from elsewhere.

        With a file that has no heads the learner's own tensors are loaded once more.
        """
        for name, own in self.state_dict().items():
            given = state_dict.get(prefix + name)
            self.trained |= isinstance(given, torch.Tensor) and not given.is_set_to(own)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _recomputes(self) -> bool:
        return self.recompute != "none" and not self.keeps and torch.is_grad_enabled()

    @property
    def predicts(self) -> bool:
        """Whether the head, or the network's own output, is trained to predict."""
        return not self.followed if self.objective is None else self.objective.predicts

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's output for a hidden state: logits `(N, C)`, or `(N, T, V)` per token.

        Under some losses it is no prediction (see `predicts`).
        """
        assert self.head is not None
        if self.recompute == "blocks" and self._recomputes:
            return self._predict_by_blocks(hidden)
        output: torch.Tensor = self.head(hidden.clone() if self.head_in_place else hidden)
        return output

    def _predict_by_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.head is not None
        layers = list(self.head) if isinstance(self.head, nn.Sequential) else [self.head]
        if self.head_in_place:
            hidden = hidden.clone()
        for layer in layers:
            if isinstance(layer, (ResidualBlock, UnitCopy)):
                hidden = recomputed(layer, layer.modules(), (hidden,), layer.overwrites)
            else:
                hidden = layer(hidden)
        return hidden
