"""What tracing leaves as it is: tensors made in glue, random draws, the network, its output."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import lightning as L
import pytest
import torch
from composing import CLASSES, Classifier, Net, chain, cut, run
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, methods


def attributes(network: nn.Module) -> list[dict[str, int]]:
    """Which object each attribute, buffer and parameter of each module is."""
    return [
        {name: id(value) for name, value in {**vars(m), **m._buffers, **m._parameters}.items()}
        for m in network.modules()
    ]


RANDOM = {
    "rand": lambda self, x: x + torch.rand(x.shape[0], 1, device=x.device),
    "rand of a tuple": lambda self, x: x + torch.rand((x.size(0), 1)),
    "dropped paths": lambda self, x: x * x.new_empty(x.shape[0], 1).bernoulli_(0.5),
    "empty": lambda self, x: x * torch.empty(x.shape[0], 1).uniform_(),
    "randperm": lambda self, x: x[torch.randperm(x.shape[0])],
}
FIXED = {
    "zeros": lambda self, x: x + torch.zeros(x.shape[0], 1),
    "ones": lambda self, x: torch.ones(x.size(0), x.size(0)).triu(1) @ x,
    "arange": lambda self, x: x + torch.arange(x.shape[0])[:, None],
    "linspace": lambda self, x: x * torch.linspace(0, 1, x.shape[0])[:, None],
    "tensor": lambda self, x: x * torch.tensor([2.0] * 6),
    "a module made in the glue": lambda self, x: nn.Dropout(0.0)(nn.ReLU()(x)),
}


@pytest.mark.parametrize("name", [*RANDOM, *FIXED])
def test_tensors_made_in_the_glue_follow_the_batch(name):
    network = Net({**RANDOM, **FIXED}[name])
    bodies = cut(network, torch.randn(4, 6))
    for samples in (4, 3):
        x = torch.randn(samples, 6)
        expected, _, state = run(network, partial(network, x), True)
        output, _, own_state = run(network, partial(chain, bodies, x), True)
        assert torch.equal(output, expected)
        assert torch.equal(own_state, state)
    assert torch.equal(chain(bodies, x), chain(bodies, x)) == (name in FIXED)


def stochastic(self, x):
    return x * 2 if random.random() < 0.5 else x


def frozen(self, x):
    with torch.no_grad():
        return self.norm(x)


def half(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ x.T @ x).float()


def counted(self, x):
    self.count += 1
    return x * self.count


def kept(self, x):
    self.kept = x
    return x


def asked(self, x):
    return self.norm(x) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("glue", [stochastic, frozen, half, counted, kept, asked])
def test_what_tracing_would_silently_change_is_kept_or_refused(glue):
    network, x = Net(glue), torch.randn(4, 6)
    reference, before = copy.deepcopy(network), attributes(network)
    bodies = None
    with suppress(ValueError):
        bodies = cut(network, x)
    assert attributes(network) == before
    for seed in range(8) if bodies else ():
        results = []
        for model, function in ((reference, reference), (network, partial(chain, bodies))):
            random.seed(seed)
            model.zero_grad()
            output = function(x)
            output.sum().backward()
            gradient = model.stem.weight.grad
            left = [gradient, model.count, model.kept]
            results.append([output, *(torch.as_tensor(0 if v is None else v) for v in left)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Remembers(nn.Linear):
    """A layer that keeps what it computed, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.table, self.calls = None, 0
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        self.calls += 1
        if self.table is None:
            self.table = torch.arange(6.0).cos()
            self.cache = self.table * 2
        return super().forward(x) * self.table * self.cache


class Reads(nn.Linear):
    """A layer whose Python looks at numbers, which fakes don't have."""

    def forward(self, x):
        scale = float(x.detach().numpy().std())
        return super().forward(x) * (scale if x[0, 0].item() > 0 else 1.0)


@pytest.mark.parametrize("layer", [Remembers, partial(Reads, 6, 6), partial(nn.BatchNorm1d, 6)])
def test_building_leaves_the_network_as_it_was(layer):
    block, x = nn.Sequential(layer(), nn.Dropout(), nn.Linear(6, 6)), torch.randn(4, 6)
    network = nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 3))
    reference = copy.deepcopy(network)
    network[0].eval()
    before, draws = attributes(network), torch.get_rng_state()
    learner = LocalLearner(Classifier(network), methods.Greedy(), ["0", "1"])
    learner.build(x)
    assert torch.equal(torch.get_rng_state(), draws)
    assert attributes(network) == before
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name
    bodies = [module.body for module in learner.local_modules]
    expected, *_ = run(reference, partial(reference, x), True)
    output, *_ = run(network, partial(chain, bodies, x), True)
    assert torch.equal(output, expected)


@dataclass
class Output(OrderedDict):
    """A dict whose items are attributes too, as what transformers' networks return."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None

    def __post_init__(self):
        self["logits"] = self.logits


class Returns(Net):
    def forward(self, x):
        return Output(logits=super().forward(x))


def test_what_the_network_returns_keeps_its_class():
    network, x = Returns(lambda self, x: x), torch.randn(4, 6)
    output = chain(cut(network, x), x)
    assert type(output) is Output
    assert torch.equal(output.logits, network(x)["logits"])
    assert output.hidden is None


class Only(Returns):
    def forward(self, x):
        return {"logits": super().forward(x).logits, "loss": None}


class Asks(Classifier):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self.network(x)["logits"], y)


@pytest.mark.parametrize("method", [methods.Greedy(), methods.AugLocal(depth=1)])
def test_the_only_tensor_of_an_output_is_the_prediction(method, quiet, tmp_path):
    batch = torch.randn(4, 6), torch.randint(CLASSES, (4,))
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    learner = LocalLearner(Asks(Only(lambda self, x: x)), method, ["stem"])
    trainer = L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path, log_every_n_steps=1)
    trainer.fit(learner, loader)
    assert {"local/00/accuracy", "local/01/accuracy"} <= set(trainer.callback_metrics)
