"""A network cut into bodies, chained again: the same output, buffers and random draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning as L
import torch
from settings import cut_network
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, Partition

CLASSES = 5


class Classifier(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def run(network: nn.Module, function: Callable[[], torch.Tensor], training: bool):
    """What `function` returns, and leaves of buffers and random state, from one same start."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        output = function()
    after = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for name, buffer in network.named_buffers():
        buffer.copy_(before.get(name, buffer))
    return output, after, torch.get_rng_state()


def chain(bodies, *values: torch.Tensor) -> torch.Tensor:
    for body in bodies:
        values = body(*values)
    return values


def check_composition(network: nn.Module, bodies, x: torch.Tensor) -> None:
    """The chain of bodies is the network: output, buffers, random draws; left in train mode."""
    for training in (True, False):
        expected, buffers, state = run(network, partial(network, x), training)
        output, own_buffers, own_state = run(network, partial(chain, bodies, x), training)
        assert torch.equal(output, expected), f"training={training}"
        assert torch.equal(own_state, state), f"another draw in training={training}"
        changed = [n for n in buffers if not torch.equal(own_buffers[n], buffers[n])]
        assert not changed, f"training={training}"
    network.train()


class Net(nn.Module):
    """Two layers, then `glue`, then the classifier."""

    def __init__(self, glue: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem, self.middle = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
        self.count, self.kept, self.glue = 0, None, glue

    def forward(self, x):
        return self.fc(self.glue(self, self.middle(self.stem(x))).relu())


def cut(network: nn.Module, x: torch.Tensor):
    return cut_network(network, Partition(split_points=["stem", "middle"]), [x]).bodies


def batches(*sizes: int, shape: tuple[int, ...] = (6,)):
    """Batches of so many samples."""
    return [(torch.randn(n, *shape), torch.arange(n) % 3) for n in sizes]


def fit(network: nn.Module, data, quiet, method="Greedy") -> LocalLearner:
    """One epoch."""
    learner = LocalLearner(Classifier(network), method)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    L.Trainer(max_epochs=1, **quiet).fit(learner, loader)
    return learner
