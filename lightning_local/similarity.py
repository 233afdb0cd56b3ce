"""Losses that compare the samples of a batch with each other: PredSim, and contrasting.

Legend: B samples, C channels. All of it is computed outside of autocast, in float32 at least.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lightning_local.layers import CONV, ChannelsFirst, without_autocast
from lightning_local.objectives import (
    Criterion,
    Loss,
    Objective,
    form_of,
    ignored_index,
    own,
    per_item,
)
from lightning_local.place import Place
from lightning_local.ranges import number, one_of

__all__ = [
    "PredSim",
    "class_similarity",
    "similarity",
    "similarity_loss",
    "supervised_contrastive",
]


_EPS = 1e-8


def _root(squared: torch.Tensor, at_zero: float) -> torch.Tensor:
    """Square root; at 0 it is `at_zero`, and both its derivatives are 0, not infinite or NaN."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), at_zero)


def similarity(z: torch.Tensor) -> torch.Tensor:
    """Adjusted cosine similarity S(z) of all pairs of samples (Nokland & Eidnes 2019, section 2.1).

    Maps of more than 3 channels count with the standard deviation of each channel over its
    positions; anything else is flattened.

    Args:
        z: `(B, C)` or, channels first, `(B, C, ...)`.

    Returns:
        `(B, B)` in [-1, 1]; 0 for a sample whose features are all equal.
    """
    with without_autocast(z):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if z.ndim > 2 and z.shape[1] > 3 and z.shape[2] > 1:
            z = _root(z.flatten(2).var(2), 0.0)
        z = z.flatten(1)
        z = z - z.mean(1, keepdim=True)
        # A sample without spread has S = 0 whatever divides it: by 1, so that gradients are small.
        z = z / (_EPS + _root(z.square().sum(1, keepdim=True), 1.0))
        return (z @ z.T).clamp(-1, 1)


def class_similarity(
    target: torch.Tensor, num_classes: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """S of one-hot vectors: 1 for equal classes, else -1 / (num_classes - 1), but for 1e-8.

    Args:
        target: Class indices `(B,)`.
        num_classes: 2 or more.
        dtype: Of the result.
    """
    same = target[:, None] == target[None, :]
    squared = (num_classes - 1) / num_classes  # of a one-hot vector without its mean
    scale = (math.sqrt(squared) + _EPS) ** -2
    apart = torch.full(same.shape, -scale / num_classes, dtype=dtype, device=target.device)
    return apart.masked_fill(same, squared * scale)


def similarity_loss(
    z: torch.Tensor, target: torch.Tensor, num_classes: int, ignored: int = -100
) -> torch.Tensor:
    """Mean squared difference of the similarities of hidden states and of targets.

    Args:
        z: `(B, C)` or `(B, C, ...)`.
        target: Class indices `(B,)`, or numbers `(B, ...)`.
        num_classes: Number of classes, for indices.
        ignored: An index that is left out, as negative ones are.
    """
    own = similarity(z)
    if target.is_floating_point():
        return functional.mse_loss(own, similarity(target.flatten(1)).to(own.dtype))
    wanted = class_similarity(target, num_classes, own.dtype)
    counted = (target >= 0) & (target != ignored)
    counts = (counted[:, None] & counted[None, :]).to(own.dtype)
    return ((own - wanted).square() * counts).sum() / counts.sum().clamp(min=1)


def supervised_contrastive(
    z: torch.Tensor, target: torch.Tensor, temperature: float = 0.07, ignored: int = -100
) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362, equation 2).

    Each sample is an anchor: minus the mean log-probability, over the others of its class, of a
    softmax of similarities over all others; 0 for an anchor alone in its class. The prefactor
    temperature / base temperature is 1.

    Args:
        z: Embeddings `(B, D)`; they are normalised here.
        target: Class indices `(B,)`.
        temperature: Divides the cosine similarities.
        ignored: An index that is left out, as negative ones are.

    Returns:
        The mean over the batch, a scalar.
    """
    with without_autocast(z):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        z = z / _root(z.square().sum(1, keepdim=True), 1.0)
        logits = z @ z.T / temperature
        counted = (target >= 0) & (target != ignored)
        others = counted[:, None] & counted[None, :]
        others &= ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        # Finite, so that an anchor without others has finite gradients.
        logits = logits.masked_fill(~others, torch.finfo(logits.dtype).min / 2)
        log_probability = logits - logits.logsumexp(1, keepdim=True)
        positive = others & (target[:, None] == target[None, :])
        total = torch.where(positive, log_probability, 0.0).sum(1)
        anchors = total / positive.sum(1).clamp(min=1)
        return -anchors.sum() / counted.sum().clamp(min=1)


class PredSim(Loss):
    """Prediction and similarity matching (Nokland & Eidnes 2019, arXiv 1901.06656).

    l_k = beta * MSE(S(P_k x_k), S(onehot(y))) + (1 - beta) * task; P_k is a 3x3 convolution C -> C
    without bias (a linear layer for tokens and vectors), S the adjusted cosine similarity of the
    samples of a batch (`similarity`). For a network that predicts per token, tokens are
    the samples. Targets that are numbers are compared as they are.

    Args:
        beta: Share of the similarity, 0 (the task alone) to 1.
        parts: `"predsim"`; `"pred"`, the task alone, or `"sim"`, the similarity alone, without a
            head.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, beta: float = 0.99, parts: str = "predsim") -> None:
        beta = number("PredSim", "beta", beta, 1, what="a share of the similarity")
        self.parts = one_of("PredSim", "parts", parts, ("predsim", "pred", "sim"))
        self.beta = {"predsim": beta, "pred": 0.0, "sim": 1.0}[parts]
        if parts == "sim":
            self.embedding = 0

    def build(self, place: Place, criterion: Criterion) -> Objective:
        """Makes the loss and its projection."""
        channels, dims = place.hidden.channels, len(place.hidden.space)
        projection: nn.Module | None = None
        if self.parts != "pred" and dims and not place.tokens and place.pools:
            projection = CONV[dims - 1](channels, channels, 3, padding=1, bias=False)
            if place.hidden.channel_dim != 1:
                projection = nn.Sequential(ChannelsFirst(place.hidden.channel_dim), projection)
        elif self.parts != "pred":
            projection = nn.Linear(channels, channels, bias=False)
        return _PredSim(projection, own(criterion), self.beta, place)


class _PredSim(Objective):
    def __init__(
        self, projection: nn.Module | None, criterion: Criterion, beta: float, place: Place
    ) -> None:
        super().__init__()
        self.projection = projection
        self.criterion = criterion
        self.beta = beta
        self.predicts = beta < 1
        self.channel_dim = place.hidden.channel_dim
        self.pools = place.pools
        # One number per sample with class indices: two classes.
        self.num_classes = max(2, place.out_features)
        self.ignored = ignored_index(criterion)
        self.items = 1 if place.pools else 2  # dimensions of a class index per prediction

    def networks(self) -> list[nn.Module]:
        return [] if self.projection is None else [self.projection]

    def forward(
        self, output: torch.Tensor, hidden: torch.Tensor, target: Any, input: Any = None
    ) -> torch.Tensor:
        if self.projection is None or self.beta == 0:
            return self.criterion(*per_item(output, target, not self.pools))
        loss = self._similarity(hidden, target)
        if self.beta == 1:
            return loss
        return self.beta * loss + (1 - self.beta) * self.criterion(
            *per_item(output, target, not self.pools)
        )

    def _similarity(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert self.projection is not None
        if target.ndim > self.items:
            target = target.to(torch.promote_types(target.dtype, torch.float32))
        if not self.pools:
            z = self.projection(hidden.movedim(self.channel_dim, -1)).flatten(0, -2)
            target = target.flatten(0, hidden.ndim - 2)
        elif isinstance(self.projection, nn.Linear):
            z = self.projection(hidden.movedim(self.channel_dim, -1)).movedim(-1, 1)
        else:
            z = self.projection(hidden)
        return similarity_loss(z, target, self.num_classes, self.ignored)

    def check(self, output: torch.Tensor, target: Any, input: Any) -> None:
        if self.beta == 0:
            return
        remedy = "use unpack=... to give it that, or parts='pred', which takes any criterion's."
        tensor = isinstance(target, torch.Tensor)
        indices = tensor and target.ndim == self.items and not target.is_floating_point()
        if not indices and not (tensor and target.ndim > self.items and target[0].numel() > 1):
            raise ValueError(
                f"PredSim compares targets with each other, and got {form_of(target)}: it takes a "
                f"class index per prediction, or two or more numbers; {remedy}"
            )
        if indices and bool(((target >= self.num_classes) & (target != self.ignored)).any()):
            raise ValueError(
                f"PredSim got the class index {int(target.max())}, and there are "
                f"{self.num_classes} classes, as many as the network has outputs: {remedy}"
            )
