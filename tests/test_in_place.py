"""Augmented assignment in glue that cuts open: the same operations, also on numbers."""

import copy
import pickle

import pytest
import torch
from settings import cut_network
from simple import CLASSES, Lit, run
from torch import nn

from lightning_local import LocalLearner
from lightning_local.partition import Partition


class Adds(nn.Module):
    """One block per container, so that the blocks' own forward is opened."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        size = x.size(1)
        kept = size
        size += 1
        x = self.a(x)
        other = x
        x *= 0.5
        x += other * (size - kept)
        x = self.b(torch.relu(x))
        x -= x.mean()
        x /= kept
        return self.c(torch.relu(x))


class Grows(Adds):
    """The hidden state that crosses is what is changed next."""

    def forward(self, x):
        x = self.a(x.flatten(1))
        x += 1.0
        x = self.b(x)
        x **= 2
        return self.c(x)


@pytest.mark.parametrize("kind", [Adds, Grows])
def test_bodies_equal_the_network(kind):
    network = kind()
    x = torch.randn(5, 1, 6, 6)
    cutting = cut_network(network, Partition(), (x,))
    assert len(cutting.bodies) == 3
    values = (x,)
    for body in cutting.bodies:
        values = body(*values)
    assert torch.equal(values, network(x))
    again = pickle.loads(pickle.dumps(cutting.bodies[0].codes[True]))
    assert torch.equal(again.function(network, x)[0], cutting.bodies[0](x)[0])
    assert copy.deepcopy(cutting.bodies[0])(x)[0].shape == (5, 8)


@pytest.mark.parametrize("method", ["Greedy", "BackLink", "SGR"])
@pytest.mark.parametrize("kind", [Adds, Grows])
def test_they_train(kind, method, quiet):
    trainer, learner = run(lambda m: LocalLearner(m, method), quiet, lambda: Lit(kind()))
    assert learner.num_modules == 3
    assert all(p.isfinite().all() for p in learner.parameters())
