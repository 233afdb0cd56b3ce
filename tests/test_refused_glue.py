"""Glue that a body can't follow is refused: a body is the network, or there is an error."""

import functools
import random

import numpy as np
import pytest
import torch
from composing import Classifier, Net, batches, chain, cut, fit
from settings import cut_network
from torch import nn

from lightning_local import LocalLearner, Partition

D = 6


class FactorOf(nn.Linear):
    """Returns nothing beside its value."""

    def forward(self, x):
        return super().forward(x), None


def without_a_factor(self, x):
    x, factor = self.pair(x)
    return x * (1.0 if factor is None else 0.5)


OTHERS = {
    "isinstance": lambda self, x: x * (2.0 if isinstance(x, torch.Tensor) else 3.0),
    "is": lambda self, x: x * (2.0 if x.dtype is torch.float32 else 3.0),
    "set": lambda self, x: x * (2.0 if x.shape[1] in {6, 8} else 3.0),
    "get": lambda self, x: x * {6: 2.0}.get(x.shape[1], 3.0),
    "str": lambda self, x: x * (2.0 if str(x.dtype) == "torch.float32" else 3.0),
    "hasattr": lambda self, x: x * (2.0 if hasattr(x, "logits") else 3.0),
    "a module's None": without_a_factor,
}


@pytest.mark.parametrize("glue", OTHERS.values(), ids=OTHERS)
def test_numbers_chosen_by_what_a_proxy_is_not_asked_for(glue):
    network = Net(glue)
    network.pair = FactorOf(D, D)
    with pytest.raises(ValueError, match=r"other operations than by itself \(aten.mul.Tensor of"):
        cut(network, torch.randn(4, D))


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return x.float() @ torch.eye(D)


def under_a_seed(self, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x + torch.randn(D)


def counting(self, x):
    self.calls["n"] += 1
    return x


def collecting(self, x):
    self.found.append(x.square().mean())
    return x


REFUSED = {
    "Python's numbers": (lambda self, x: x * random.random(), "random numbers of Python or NumPy"),
    "NumPy's": (lambda self, x: x * np.random.rand(), "random numbers of Python or NumPy"),
    "its own": (lambda self, x: x * self.generator.random(), "changes Net.generator"),
    "autocast": (without_autocast, "under torch.autocast"),
    "a question": (lambda self, x: x * (2 if torch.is_grad_enabled() else 1), "is_grad_enabled"),
    "a seed": (under_a_seed, "torch.manual_seed"),
    "another seed": (
        lambda self, x: x + torch.random.manual_seed(0).initial_seed(),
        "calls torch.manual_seed",
    ),
    "a counter": (counting, "changes Net.calls"),
    "a list": (collecting, "changes Net.found"),
    "large batches": (lambda self, x: x * 2 if x.shape[0] > 16 else x, "size of the batch"),
}


@pytest.mark.parametrize(("glue", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_does_not_hold(glue, words):
    network = Net(glue)
    network.calls, network.found = {"n": 0}, []
    network.generator = np.random.default_rng(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(ValueError, match=f"can't be followed .*{words}"):
        cut(network, torch.randn(4, D))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert network.calls == {"n": 0}
    assert network.found == []


class Alpha(Net):
    alpha = 1.0  # of the class


READ = {
    "alpha": (1.0, 0.5, lambda self, x: x * self.alpha),
    "_alpha": (1.0, 0.5, lambda self, x: x * self._alpha),
    "alphas": ([1.0], [0.5], lambda self, x: x * self.alphas[0]),
    "options": ({"alpha": 1.0}, {"alpha": 0.5}, lambda self, x: x * self.options["alpha"]),
    "function": (torch.relu, torch.tanh, lambda self, x: self.function(x)),
    "mask": (None, torch.ones(D), lambda self, x: x if self.mask is None else x * self.mask),
}


@pytest.mark.parametrize("name", READ)
def test_an_attribute_that_glue_reads_may_not_change(name):
    before, after, glue = READ[name]
    network = Alpha(glue)
    if name != "alpha":
        setattr(network, name, before)
    learner = LocalLearner(Classifier(network), "Greedy")
    learner.build(torch.randn(4, D))
    learner.local_modules[0](torch.randn(3, D))
    network.other = 0.5
    learner.local_modules[0](torch.randn(3, D))
    setattr(network, name, after)
    with pytest.raises(ValueError, match=rf"when {name} of Alpha was .* and now it is .* buffer"):
        learner.local_modules[0](torch.randn(3, D))


class Masked(Net):
    def forward(self, x, mask):
        x = super().forward(x)
        return x if mask is None else x * mask


def test_an_input_that_is_none():
    x = torch.randn(4, D)
    network = Masked(lambda self, x: x)
    bodies = cut_network(network, Partition(), [x, None]).bodies
    assert torch.equal(chain(bodies, x, None), network(x, None))
    bodies = cut_network(network, Partition(), [x, torch.ones(4, 1)]).bodies
    with pytest.raises(ValueError, match="whether it is None: True instead of False"):
        chain(bodies, x, None)


class Passing(nn.Module):
    """Hands one list or dict to all of its blocks, which change it."""

    def __init__(self, made, change):
        super().__init__()
        self.stem, self.fc = nn.Linear(D, D), nn.Linear(D, 3)
        self.blocks = nn.ModuleList([Changing(change) for _ in range(2)])
        self.made = made

    def forward(self, x):
        x, kept = self.stem(x), self.made()
        for block in self.blocks:
            x = block(x, kept).relu()
        return self.fc(x)


class Changing(nn.Linear):
    def __init__(self, change):
        super().__init__(D, D)
        self.change = change

    def forward(self, x, kept):
        return super().forward(self.change(x, kept))


def append(x, kept):
    kept.append(x)
    return torch.stack(kept).mean(0)


def count(x, kept):
    kept["n"] = kept.get("n", 0) + 1
    return x * kept["n"]


@pytest.mark.parametrize(
    ("made", "change"),
    [(list, append), (dict, count), (lambda: {"mask": torch.ones(D)}, count)],
    ids=["a list", "an empty dict", "a dict"],
)
def test_a_container_that_several_modules_change(made, change):
    with pytest.raises(ValueError, match="`blocks.0` changes a list that it is given"):
        cut_network(Passing(made, change), Partition(), [torch.randn(4, D)])


@functools.lru_cache
def table(n):
    return torch.arange(n).float()


class Tabled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * table(x.shape[1])


class Cached(nn.Linear):
    def __init__(self):
        super().__init__(D, D)
        self.cache = {}

    def forward(self, x):
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.arange(x.shape[1]).float()
        return super().forward(x) * self.cache[x.shape[1]]


def test_a_cache_of_a_module_is_as_before(quiet):
    network = nn.Sequential(nn.Linear(D, D), Cached(), nn.Linear(D, 3))
    before = [p.detach().clone() for p in network.parameters()]
    fit(network, batches(4, 4), quiet)
    assert type(network[1].cache[D]) is torch.Tensor
    assert not any(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


# torch/_subclasses/meta_utils.py looks at .grad of what meets the fake.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_cache_outside_of_the_modules_is_named(quiet):
    table.cache_clear()
    network = nn.Sequential(nn.Linear(D, D), Tabled(D, D), nn.Linear(D, 3))
    try:
        with pytest.raises(ValueError, match=r"Local module 1 .*functools.lru_cache.* buffer"):
            fit(network, batches(4), quiet)
    finally:
        table.cache_clear()
    network(torch.randn(4, D))  # as the message says
    fit(network, batches(4), quiet)
    table.cache_clear()
