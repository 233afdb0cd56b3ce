"""What changes in place in glue that cuts open: `x += y`, also on numbers, and lists."""

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


class Branch(nn.Linear):
    """Changes the list that it is given, as the branches of HRNet do."""

    def __init__(self, change):
        super().__init__(8, 8)
        self.change = change

    def forward(self, xs):
        self.change(xs, super().forward(xs[0]))
        return xs[0] * xs[-1]


class Lists(nn.Module):
    """Two layers, then a module that changes `xs`; `read` says what of it is read behind."""

    def __init__(self, change, read):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.branch, self.read = Branch(change), read

    def forward(self, x):
        x = self.b(self.a(x.flatten(1)).relu()).relu()
        xs = [x, x + 1]
        y = self.branch(xs)
        return self.c(y + sum(xs[i] for i in self.read))


@pytest.mark.parametrize(
    ("change", "read", "fits"),
    [
        (lambda xs, y: xs.__setitem__(0, y), (), True),
        (lambda xs, y: xs.__setitem__(0, y), (1,), True),
        (lambda xs, y: xs.__setitem__(0, y), (0,), False),
        (lambda xs, y: xs.append(y), (), True),
        (lambda xs, y: xs.append(y), (-1,), False),
        (lambda xs, y: xs.pop(), (0,), False),
    ],
)
def test_a_module_may_change_a_list_that_nobody_reads_again(change, read, fits):
    network, x = Lists(change, read), torch.randn(5, 1, 6, 6)
    if not fits:
        with pytest.raises(ValueError, match=r"`branch` changes a list .* give it a copy, list"):
            cut_network(network, Partition(), (x,))
        return
    values = (x,)
    for body in cut_network(network, Partition(), (x,)).bodies:
        values = body(*values)
    assert torch.equal(values, network(x))
