"""Glue that decides on shapes and types, and what rides along because no gradient passes it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from composing import CLASSES, Net, chain
from composing import cut as cut_into_three
from settings import cut_network
from torch import nn
from torch._dynamo.utils import counters

from lightning_local import Partition

D = 6


def by_shape(self, x):
    return x * 2 if x.shape[-1] == D and x.dtype == torch.float32 else x


def by_length(self, x):
    assert len(x.shape) == 2
    return x.reshape(*x.shape[:1], *(2, 3)).flatten(1) if x.ndim < 3 else x


def in_a_loop(self, x):
    for size in x.shape[1:]:
        x = x / size
    return x


def by_a_weight(self, x):
    return x + 1 if self.middle.weight.shape[0] == x.shape[1] else x


def by_an_argument(self, x):
    if x.shape[0] == 0:
        raise ValueError("no samples")
    return x


def by_the_limits_of_a_type(self, x):
    return torch.where(x > 0, x, torch.finfo(x.dtype).eps) + torch.finfo(torch.float32).eps


FORMS = [by_shape, by_length, in_a_loop, by_a_weight, by_an_argument, by_the_limits_of_a_type]


def by_numbers(self, x):
    return x * 2 if x.sum() > 0 else x


def by_an_item(self, x):
    return x * 2 if x[0, 0].item() > 0 else x


def by_the_batch(self, x):
    return x * 2 if x.shape[0] % 2 else x


def over_the_batch(self, x):
    return torch.stack([row * 2 for row in x])


@pytest.mark.parametrize("glue", FORMS)
def test_glue_that_asks_for_forms_is_cut(glue):
    network = Net(glue)
    bodies = cut_into_three(network, torch.randn(4, D))
    for samples in (4, 3, 1):
        x = torch.randn(samples, D)
        network.train(samples > 1)
        assert torch.equal(chain(bodies, x), network(x))
    again = pickle.loads(pickle.dumps([body.codes[True] for body in bodies]))
    assert [code.source for code in again] == [body.codes[True].source for body in bodies]
    assert torch.equal(chain(copy.deepcopy(bodies), x), chain(bodies, x))


@pytest.mark.parametrize("glue", [by_numbers, by_an_item, by_the_batch, over_the_batch])
def test_glue_that_asks_for_numbers_or_samples_is_refused(glue):
    with pytest.raises(ValueError, match="The forward of Net can't be followed"):
        cut_into_three(Net(glue), torch.randn(4, D))


class Cache:
    """What a language model keeps of earlier tokens."""


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Bilinear(D, D, CLASSES)

    def forward(self, x):
        return self.middle(x, Cache())


def test_an_object_made_for_a_module_is_named_with_the_remedy():
    words = "glue makes a Cache for a module, .* such as use_cache=False"
    with pytest.raises(ValueError, match=words):
        cut_network(Caching(), Partition(), [torch.randn(4, D)])


class Sequence(nn.Module):
    """Another way for long sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x):
        x = self.first(x)
        x = x if x.shape[1] <= 4 else x[:, ::2]
        return self.fc(self.second(x).mean(1))


def test_another_way_than_for_the_example_is_an_error():
    network = Sequence()
    bodies = cut_network(network, Partition(), [torch.randn(2, 3, D)]).bodies
    short, long = torch.randn(5, 4, D), torch.randn(5, 8, D)
    assert torch.equal(chain(bodies, short), network(short))
    words = r"takes another way for this batch .*False instead of True.*\n.*x.shape\[1\] <= 4.*\n"
    with pytest.raises(ValueError, match=f"{words}.*batches of one form"):
        chain(bodies, long)


# torch/_dynamo/variables/builder.py hides it with another showwarning, which comes after filters.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_bodies_ask_too():
    network = Sequence()
    bodies = cut_network(network, Partition(), [torch.randn(2, 3, D)]).bodies
    torch._dynamo.reset()
    counters.clear()
    compiled = [torch.compile(body, backend="aot_eager") for body in bodies]
    x = torch.randn(5, 4, D)
    torch.testing.assert_close(chain(compiled, x), network(x))
    assert counters["stats"]["unique_graphs"] == len(bodies)
    assert not counters["graph_break"]
    with pytest.raises(ValueError, match="takes another way for this batch"):
        chain(compiled, torch.randn(5, 8, D))
    torch._dynamo.reset()


# ---------------------------------------------------------------------- what rides along


class Rotary(nn.Module):
    """A table that every block needs, computed without gradient from a hidden state."""

    @torch.no_grad()
    def forward(self, x):
        return torch.arange(x.shape[1], device=x.device).to(x.dtype)[:, None].cos()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x, table, sizes):
        assert sizes == (x.shape[1], D)
        return x + self.fc(x) * table


class Embeds(nn.Module):
    """Returns a hidden state and its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, D)

    def forward(self, x):
        return self.fc(x), (x.shape[1], D)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rotary = Embeds(), Rotary()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x):
        x, sizes = self.embed(x)
        table = self.rotary(x)
        mask = (x.detach() > 0).any(1).float()
        for block in self.blocks:
            x = block(x, table, sizes)
        return self.head(x.mean(1) * mask)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_has_no_gradient_rides_along(frozen):
    network, x = Decoder().requires_grad_(not frozen), torch.randn(4, 3, 4)
    cutting = cut_network(network, Partition(), [x])
    assert cutting.unit_points == ("rotary", "blocks.0", "blocks.1")
    assert [p.requires_grad for p in network.parameters()] == [not frozen] * 10
    for training in (True, False):
        network.train(training)
        assert torch.equal(chain(cutting.bodies, x), network(x))


class Joins(Decoder):
    """The table has a weight, so two paths of gradients lead into every block."""

    def forward(self, x):
        x, sizes = self.embed(x)
        table = self.rotary(x) * self.head.weight.mean()
        for block in self.blocks:
            x = block(x, table, sizes)
        return self.head(x.mean(1))


def test_two_tensors_with_gradients_are_still_too_many():
    assert cut_network(Joins(), Partition(), [torch.randn(4, 3, 4)]).unit_points == ("rotary",)
