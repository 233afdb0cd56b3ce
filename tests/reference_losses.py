"""The local losses once more: slow, sample by sample, and without a line of the package.

Legend: x_k hidden state after body k, P_k the projection, dec_k the decoder, K local modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Numbers = Sequence[float]


def _root(square: torch.Tensor) -> torch.Tensor:
    """The root, which at 0 is a constant."""
    return square.sqrt() if square > 0 else square.detach()


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation."""
    values = values.reshape(-1)
    return _root(((values - values.mean()) ** 2).sum() / (len(values) - 1))


def similarity(z: torch.Tensor) -> torch.Tensor:
    """S(z), `(B, B)`, of vectors `(B, C)`, tokens `(B, T, C)` or maps `(B, C, H, W)`."""
    rows = []
    for sample in z:
        if sample.ndim == 2:
            sample = sample.T  # noqa: PLW2901
        if sample.ndim > 1 and sample.shape[0] > 3 and sample.shape[1] > 1:
            sample = torch.stack([_spread(channel) for channel in sample])  # noqa: PLW2901
        row = sample.reshape(-1)
        row = row - row.mean()
        rows.append(row / (1e-8 + _root((row * row).sum())))
    unit = torch.stack(rows)
    return (unit @ unit.T).clamp(-1, 1)


def similarity_loss(z: torch.Tensor, target: torch.Tensor, classes: int) -> torch.Tensor:
    """Mean over B x B of the squared distance to the labels' similarity."""
    wanted = torch.zeros(len(target), classes, dtype=z.dtype)
    for i, label in enumerate(target):
        wanted[i, label] = 1.0
    return ((similarity(z) - similarity(wanted)) ** 2).mean()


def contrastive_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Supervised contrastive, temperature 0.07, one view per sample."""
    n, temperature = len(output), 0.07
    unit = [row / _root((row * row).sum()) for row in output]
    terms = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        positives = [j for j in others if target[j] == target[i]]
        if not positives:
            terms.append(0.0 * output.sum())
            continue
        scores = {j: (unit[i] * unit[j]).sum() / temperature for j in others}
        whole = torch.logsumexp(torch.stack(list(scores.values())), 0)
        terms.append(-torch.stack([scores[j] - whole for j in positives]).mean())
    return torch.stack(terms).mean()


def reconstruction_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of the sigmoid against an image in [0, 1]."""
    assert logits.shape == wanted.shape
    p = 1 / (1 + torch.exp(-logits))
    return -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()


def denormalized(x: torch.Tensor, mean: Numbers, std: Numbers) -> torch.Tensor:
    """x std + mean, per channel of images `(N, C, H, W)`, per feature of what has no height."""
    channel_dim = 1 if x.ndim == 4 else x.ndim - 1
    planes = zip(x.unbind(channel_dim), mean, std, strict=True)
    return torch.stack([plane * s + m for plane, m, s in planes], channel_dim)


def interpolated(first: float, last: float, k: int, num_modules: int) -> float:
    """A weight of head k of K - 1: linear; the first one's for two modules."""
    r = k / (num_modules - 2) if num_modules > 2 else 0.0
    return (1 - r) * first + r * last


def samples(tensor: torch.Tensor, per_token: bool) -> torch.Tensor:
    """Every token a sample of its own."""
    return tensor.flatten(0, 1) if per_token else tensor


@dataclass
class CrossEntropy:
    """A criterion on the head's output; base of the others.

    `part` names what the learner's objective calls the network of this loss; `start` gives one
    such network per head, None where there is none.
    """

    part: ClassVar[str | None] = None
    criterion: Criterion | None = field(default=None, init=False)
    parts: list[nn.Module | None] = field(default_factory=list, init=False)

    def start(self, criterion: Criterion, parts: Sequence[nn.Module | None]) -> None:
        """Before the first batch."""
        self.criterion, self.parts = criterion, list(parts)

    def parameters(self, k: int) -> list[nn.Parameter]:
        """What belongs to w_k besides the head's."""
        part = self.parts[k]
        return [] if part is None else list(part.parameters())

    def __call__(
        self,
        k: int,
        output: torch.Tensor,
        hidden: torch.Tensor,
        target: torch.Tensor,
        x0: torch.Tensor,
    ) -> torch.Tensor:
        """l_k."""
        return self.criterion(output, target)


@dataclass
class PredSim(CrossEntropy):
    """beta * MSE(S(P x), S(onehot)) + (1 - beta) * CE; a weight of 0 leaves its term out.

    The parts alone have weight 1.
    """

    part: ClassVar[str | None] = "projection"
    beta: float = 0.99
    kind: str = "predsim"
    classes: int = 4

    def __call__(
        self,
        k: int,
        output: torch.Tensor,
        hidden: torch.Tensor,
        target: torch.Tensor,
        x0: torch.Tensor,
    ) -> torch.Tensor:
        """l_k."""
        beta = {"predsim": self.beta, "pred": 0.0, "sim": 1.0}[self.kind]
        terms = []
        if beta != 0:
            per_token = target.ndim == 2
            z = self.parts[k](samples(hidden, per_token))
            loss = similarity_loss(z, samples(target, per_token), self.classes)
            terms.append(beta * loss)
        if beta != 1:
            terms.append((1 - beta) * self.criterion(output, target))
        return sum(terms)


@dataclass
class InfoPro(CrossEntropy):
    """lam1 * reconstruction + lam2 * task; a weight of 0 leaves its term out."""

    part: ClassVar[str | None] = "decoder"
    mean: Numbers = ()
    std: Numbers = ()
    contrast: bool = False
    lam_first: tuple[float, float] = (5.0, 0.05)
    lam_last: tuple[float, float] = (0.2, 0.5)

    def lam(self, k: int) -> list[float]:
        """(lam1, lam2) of head k."""
        ends = zip(self.lam_first, self.lam_last, strict=True)
        return [interpolated(first, last, k, len(self.parts) + 1) for first, last in ends]

    def __call__(
        self,
        k: int,
        output: torch.Tensor,
        hidden: torch.Tensor,
        target: torch.Tensor,
        x0: torch.Tensor,
    ) -> torch.Tensor:
        """l_k."""
        reconstruct, task = self.lam(k)
        terms = []
        if reconstruct != 0:
            wanted = denormalized(x0, self.mean, self.std)
            terms.append(reconstruct * reconstruction_loss(self.parts[k](hidden), wanted))
        if task != 0:
            if self.contrast:
                per_token = target.ndim == 2
                loss = contrastive_loss(samples(output, per_token), samples(target, per_token))
            else:
                loss = self.criterion(output, target)
            terms.append(task * loss)
        return sum(terms)
