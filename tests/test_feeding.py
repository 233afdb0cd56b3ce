"""Who reads data, and who is told that there is a batch: without processes."""

import pytest
import torch
from simple import data
from torch.utils.data import DataLoader, IterableDataset

from lightning_local.feeding import feed


class Told:
    """Processes that note what they are told, or say what they were told to."""

    num_stages = 2
    replica = 0

    def __init__(self, stage, says=()):
        self.stage = stage
        self.says = list(says)
        self.told = []

    def announce(self, value):
        self.told.append(value)
        return self.says.pop(0) if self.stage else value


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


def stream():
    return DataLoader(Stream(), 2)


def test_a_length_that_is_sure_needs_no_word():
    loader = data()
    first, later = Told(0), Told(1)
    assert feed(loader, first) is loader
    fed = feed(loader, later)
    assert len(fed) == len(list(fed)) == 3
    assert first.told == later.told == []


def test_an_end_that_nobody_knows_is_told():
    first, later = Told(0), Told(1, [1, 1, 1, 0])
    assert [batch.tolist() for batch in feed(stream(), first)] == [[0, 1], [2, 3], [4]]
    assert first.told == [1, 1, 1, 0]
    fed = feed(stream(), later)
    assert len(list(fed)) == 3
    assert not later.says
    with pytest.raises(TypeError):
        len(fed)


def test_an_iterator_is_made_when_it_is_asked_for():
    """As torch's loaders do: making one draws from the generator."""
    loader = stream()
    before = torch.get_rng_state()
    iter(feed(loader, Told(0)))
    assert not torch.equal(before, torch.get_rng_state())


class Stateful:
    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < 3:
            self.position += 1
            yield self.position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_stateful_loader_stays_one():
    first = Told(0)
    fed = feed(Stateful(), first)
    fed.load_state_dict({"position": 1})
    assert list(fed) == [2, 3]
    assert fed.state_dict() == {"position": 3}
    assert first.told == [1, 1, 0]
    assert not hasattr(feed(stream(), Told(0)), "state_dict")


def test_attributes_of_the_loader_are_there():
    fed = feed(stream(), Told(0))
    assert fed.batch_size == 2
    with pytest.raises(AttributeError):
        _ = fed.nothing
