"""A new method in one file: heads learn the class, bodies also keep their channels apart.

    python -m examples.new_method

The loss of a local module is the task's plus `weight` times the mean squared correlation of the
hidden state's channels over the batch (as in Barlow Twins, Zbontar et al. 2021, arXiv 2103.03230).
"""

import copy

import lightning as L
import torch
from torch import nn

from examples.image_classification import CifarResNet, DigitsDataModule, LitClassifier
from lightning_local import LocalLearner, couplings, heads, losses, methods


class Decorrelated(losses.Loss):
    """The recipe: arguments, and one `Objective` per local module."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def build(self, place, criterion):
        """Makes the loss of one local module."""
        return _Decorrelated(copy.deepcopy(criterion), self.weight, place.hidden.channel_dim)


class _Decorrelated(losses.Objective):
    def __init__(self, criterion, weight, channel_dim):
        super().__init__()
        self.criterion, self.weight, self.channel_dim = criterion, weight, channel_dim

    def forward(self, output, hidden, target, input):
        z = hidden.movedim(self.channel_dim, 1).flatten(2).mean(2) if hidden.ndim > 2 else hidden
        z = nn.functional.normalize(z - z.mean(0), dim=0, eps=1e-6)
        apart = (z.T @ z - torch.eye(z.shape[1], device=z.device)).square().mean()
        return self.criterion(output, target) + self.weight * apart


class Apart(methods.LocalMethod):
    """The preset: head x loss x coupling."""

    def __init__(self, *, weight: float = 1.0, coupling: couplings.Coupling | None = None) -> None:
        super().__init__(heads.Conv(), Decorrelated(weight), coupling)


def main(**trainer) -> LocalLearner:
    """Digits, with errors that flow one local module back."""
    module = LitClassifier(CifarResNet(depth=14, in_channels=1), schedule="onecycle")
    learner = LocalLearner(module, Apart(coupling=couplings.BackwardLink()))
    L.Trainer(**{"max_epochs": 4, "accelerator": "cpu", **trainer}).fit(learner, DigitsDataModule())
    return learner


if __name__ == "__main__":
    main()
