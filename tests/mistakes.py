"""A table of mistakes that users make, which `mistakes_*.py` fill, with the words of each error."""

import torch
from simple import CLASSES, fit
from torch.utils.data import DataLoader, TensorDataset

CASES = {}
# Of the run that is under way: arguments of a quiet Trainer, and a folder with a checkpoint.
NOW = {}


def case(words, kind=ValueError):
    """Adds a case; `words` are in its message, in this order."""

    def add(function):
        CASES[function.__name__] = (function, words, kind)
        return function

    return add


def argument(name, make, *words, kind=ValueError):
    """Adds a case of a constructor."""
    CASES[name] = (make, words, kind)


def fitted(learner, loader=None, **options):
    return fit(learner, NOW["quiet"], epochs=1, loader=loader, **options)


def loader_of(x, y, size=8):
    return DataLoader(TensorDataset(x, y), size)


X, Y = torch.randn(16, 1, 6, 6), torch.arange(16) % CLASSES
