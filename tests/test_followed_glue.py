"""Glue that a body follows in every batch, and parts of a network that are left whole."""

import random
import threading
from collections import deque
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from composing import Classifier, Net, batches, chain, cut, fit
from settings import cut_network
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, Partition, methods

D = 6


def of_its_device(self, x):
    weight = next(self.parameters())
    ones = torch.ones(D, device=weight.device, dtype=weight.dtype)
    return x + ones + torch.finfo(next(self.parameters()).dtype).eps


def test_parameters_are_asked_for_their_form_in_every_batch():
    network = Net(of_its_device)
    bodies = cut(network, torch.randn(4, D))
    x = torch.randn(3, D).double()
    network.double()
    assert torch.equal(chain(bodies, x), network(x))
    network.to("meta")
    assert chain(bodies, x.to("meta")).device.type == "meta"


class OfItself(L.LightningModule):
    """Asks Lightning for device and type."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.fc = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x):
        x = self.stem(x).to(self.device) + torch.arange(D, device=self.device, dtype=self.dtype)
        return self.fc(self.middle(x).relu())


def test_a_module_is_asked_for_its_device_in_every_batch():
    network, x = OfItself(), torch.randn(4, D).double()
    bodies = cut_network(network, Partition(), [torch.randn(4, D)]).bodies
    network.double()
    assert torch.equal(chain(bodies, x), network(x))
    network.to("meta")
    assert chain(bodies, x.to("meta")).device.type == "meta"


class Scaled(nn.Linear):
    def forward(self, x, scale):
        return x + super().forward(x) * scale


class Scales(nn.Module):
    """What rides along is a view of a weight, or a copy."""

    def __init__(self, copied):
        super().__init__()
        self.stem, self.scale, self.fc = (
            nn.Linear(D, D),
            nn.Parameter(torch.ones(D)),
            nn.Linear(D, 3),
        )
        self.blocks = nn.ModuleList([Scaled(D, D) for _ in range(2)])
        self.copied = copied

    def forward(self, x):
        x, scale = self.stem(x) + self.scale, self.scale.detach()
        if self.copied:
            scale = scale.clone()
        for block in self.blocks:
            x = block(x, scale)
        return self.fc(x)


def test_a_weight_that_rides_along_is_the_one_before_the_step(quiet):
    data, left = batches(8, 8), []
    for copied in (False, True):
        torch.manual_seed(0)
        network = Scales(copied)
        assert fit(network, data, quiet).num_modules == 4
        left.append(network.fc.weight.detach())
    assert torch.equal(*left)


class Overwrites(nn.Linear):
    def forward(self, x):
        return super().forward(functional.relu(x, inplace=True))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(D, D), nn.Linear(D, 3)
        self.blocks = nn.ModuleList([Overwrites(D, D) for _ in range(2)])

    def forward(self, x):
        x = self.stem(x)
        gate = x.detach()  # the first block overwrites it, too
        for block in self.blocks:
            x = block(x)
        return self.fc(x * gate)


def test_a_view_of_the_hidden_state_does_not_ride_along():
    network, x = Gated(), torch.randn(4, D)
    bodies = cut_network(network, Partition(), [x]).bodies
    assert torch.equal(chain(bodies, x), network(x))
    for recompute in ("none", "body", "blocks"):
        learner = LocalLearner(Classifier(network), "Greedy", recompute=recompute)
        learner.build(x)
        values = (x,)
        for module in learner.local_modules:
            values = module(*values)
        assert torch.equal(values, network(x)), recompute


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = self.a(x).relu()
        if x.shape[1] > 4:
            x = x[:, :4]
        return self.b(x)


def test_a_part_that_takes_another_way_for_other_forms_is_left_whole(quiet):
    layers = [nn.Linear(D, D), nn.ReLU(), Inside(), nn.Linear(D, D), nn.Linear(D, D), Mean()]
    network = nn.Sequential(*layers, nn.Linear(D, 3))
    data = batches(4, shape=(3, D)) + batches(4, shape=(8, D))
    assert fit(network, data, quiet).split_points == ("1", "2", "3")


class Pyramid(nn.Module):
    """Reads what its modules return as a dict or a tuple."""

    def __init__(self, made, read):
        super().__init__()
        self.first, self.second, self.read = Made(made), Made(made), read

    def forward(self, x):
        return self.read(self.second(self.read(self.first(x)).relu()))


class Made(nn.Linear):
    def __init__(self, made):
        super().__init__(D, D)
        self.made = made

    def forward(self, x):
        return self.made(super().forward(x))


READS = {
    "values": (lambda y: {"a": y, "b": 2 * y}, lambda o: sum(o.values())),
    "keys": (lambda y: {"a": y, "b": 2 * y}, lambda o: sum(o[key] for key in o)),
    "isinstance": (lambda y: (y, y), lambda o: o[0] if isinstance(o, tuple) else o),
    "hasattr": (lambda y: y, lambda o: o.logits if hasattr(o, "logits") else o),
}


@pytest.mark.parametrize(("made", "read"), READS.values(), ids=READS)
def test_a_part_that_only_a_run_can_follow_is_left_whole(made, read):
    network = nn.Sequential(nn.Linear(D, D), nn.ReLU(), Pyramid(made, read), nn.Linear(D, 3))
    x = torch.randn(4, D)
    bodies = cut_network(network, Partition(), [x]).bodies
    assert len(bodies) == 3
    assert torch.equal(chain(bodies, x), network(x))


class Remembers(nn.Linear):
    """Keeps what it has seen, deep inside of its attributes."""

    def __init__(self):
        super().__init__(D, D)
        self.queue, self.kept = deque(maxlen=3), {"means": []}
        self.state = SimpleNamespace(mean=None)
        self.generator = np.random.default_rng(0)

    def forward(self, x):
        y = super().forward(x)
        for place in (self.queue, self.kept["means"]):
            place.append(y.detach().mean(0))
        self.state.mean = self.queue[-1]
        shift = int(self.generator.integers(1, 3))
        return torch.roll(y, shift, 1) + torch.stack(list(self.queue)).mean(0)

    def train(self, mode=True):
        self.mode = "train" if mode else "eval"
        return super().train(mode)


def test_what_modules_remember_and_draw_is_as_before(quiet):
    network = nn.Sequential(nn.Linear(D, D), *[Remembers() for _ in range(3)], nn.Linear(D, 3))
    learner = LocalLearner(Classifier(network), "Greedy")
    learner.build(torch.randn(4, D))
    assert learner.num_modules == 5
    for each in network[1:4]:
        assert not each.queue
        assert each.kept == {"means": []}
        assert each.state.mean is None
        fresh = np.random.default_rng(0)
        assert each.generator.bit_generator.state == fresh.bit_generator.state
    fit(network, batches(4, 4), quiet)
    assert all(type(tensor) is torch.Tensor for tensor in network[1].queue)


class Skipped(nn.Linear):
    """Stochastic depth by a generator of Python's or NumPy's."""

    def __init__(self, draw):
        super().__init__(D, D)
        self.draw = draw

    def forward(self, x):
        return x if self.training and self.draw() < 0.5 else x + super().forward(x).relu()


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "NumPy"])
def test_blocks_may_draw_random_numbers(draw):
    for seed in range(5):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        blocks = [Skipped(draw) for _ in range(4)]
        network = nn.Sequential(nn.Linear(D, D), *blocks, nn.Linear(D, 3))
        assert len(cut_network(network, Partition(), [torch.randn(4, D)]).bodies) == 6
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_weights_form_is_read_on_both_sides_of_a_cut(quiet):
    network = Net(lambda self, x: x.to(self.stem.weight.dtype) * self.fc.weight.shape[1])
    bodies = cut(network, torch.randn(4, D))
    x = torch.randn(3, D)
    assert torch.equal(chain(bodies, x), network(x))
    fit(network, batches(4), quiet, methods.BackLink())


def making_tensors(stop, failed):
    while not stop.is_set():
        try:
            with torch.autocast("cpu", enabled=False):
                assert type(torch.zeros(3).sum().item()) is float
            assert all(type(p) is nn.Parameter for p in nn.Linear(2, 2).parameters())
        except Exception as error:
            failed.append(error)


def test_other_threads_go_on_while_a_network_is_traced():
    stop, failed = threading.Event(), []
    thread = threading.Thread(target=making_tensors, args=(stop, failed))
    thread.start()
    try:
        for _ in range(3):
            cut(Net(of_its_device), torch.randn(4, D))
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert "__getattribute__" not in vars(nn.Module)
    assert nn.Module.parameters.__module__ == "torch.nn.modules.module"
