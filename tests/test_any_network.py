"""Fifteen torchvision families: cut into four, composed back bit for bit, trained for one step.

The classes and their forwards are torchvision's own; widths and images are as small as their
constructors allow.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import lightning as L
import pytest
import torch
from settings import cut_network
from torch import nn
from torch.nn import functional
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

from examples.image_classification import CifarResNet
from lightning_local import LocalLearner, Partition, methods

CLASSES = 5


def small_vgg() -> nn.Module:
    """vgg16_bn without the 120 million weights of its classifier, which no argument makes fewer."""
    with torch.device("meta"):
        network = models.vgg16_bn(init_weights=False)
    network.to_empty(device="cpu")
    for i, sizes in {0: (512 * 7 * 7, 16), 3: (16, 16), 6: (16, CLASSES)}.items():
        network.classifier[i] = nn.Linear(*sizes)
    for module in network.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


def small_vit() -> nn.Module:
    network = models.VisionTransformer(32, 16, 12, 2, 16, 32, num_classes=CLASSES)
    # torchvision starts the head at zero, through which nothing comes back in the first step.
    nn.init.normal_(network.heads.head.weight)
    return network


def small_convnext() -> nn.Module:
    stages = zip((6, 12, 24, 48), (12, 24, 48, None), (3, 3, 9, 3), strict=True)
    # With the default 1e-6 one step would move some weights by less than a float can hold.
    return models.ConvNeXt([CNBlockConfig(*stage) for stage in stages], 0.1, layer_scale=0.1)


# Family: (its network, units as a person would count them).
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (models.resnet18, 1 + 8),
    "resnet50": (lambda: models.ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=8), 1 + 16),
    "vgg16_bn": (small_vgg, 13),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 1 + 11 + 1),
    "efficientnet_b0": (models.efficientnet_b0, 1 + 16 + 1),
    "convnext_tiny": (small_convnext, 1 + 18 + 3),
    "vit_b_16": (small_vit, 1 + 12),
    "swin_t": (
        lambda: models.SwinTransformer([4, 4], 16, [2, 2, 6, 2], [1, 2, 4, 8], [2, 2]),
        1 + 12 + 3,
    ),
    "densenet121": (lambda: models.DenseNet(4, (2, 3, 4, 3), 8), 1 + 4 + 3),
    "regnet_y_400mf": (models.regnet_y_400mf, 1 + 16),
    "googlenet": (lambda: models.googlenet(aux_logits=False, init_weights=False), 3 + 9),
    "maxvit_t": (
        lambda: models.MaxVit((64, 64), 8, 2, [8, 16, 16, 24], [1, 1, 1, 1], 8, 0.2),
        2 + 4,
    ),
    "shufflenet_v2_x1_0": (models.shufflenet_v2_x1_0, 1 + 16 + 1),
    "mnasnet1_0": (models.mnasnet1_0, 3 + 16 + 1),
    "squeezenet1_0": (models.squeezenet1_0, 1 + 8 + 1),
}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_cut_composed_back_and_trained(family, quiet, tmp_path):
    make, units = FAMILIES[family]
    network, side = make(), 64 if family == "maxvit_t" else 32
    x, y = torch.randn(4, 3, side, side), torch.randint(CLASSES, (4,))
    learner = LocalLearner(Classifier(network), methods.Greedy(), Partition(num_modules=4))
    learner.build(x)
    bodies = [module.body for module in learner.local_modules]
    assert len(bodies) == 4
    assert len(learner.cutting.unit_points) + 1 == units

    check_composition(network, bodies, x)
    owned = [dict(body.named_parameters()) for body in bodies]
    assert sorted(n for names in owned for n in names) == sorted(
        n for n, _ in network.named_parameters()
    )
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    loader = torch.utils.data.DataLoader([(x, y)], batch_size=None)
    L.Trainer(**quiet, max_steps=1, default_root_dir=tmp_path).fit(learner, loader)
    for k, names in enumerate(owned):
        same = [n for n in names if torch.equal(network.get_parameter(n), before[n])]
        assert not same, f"local module {k} of {family} did not train these"


@pytest.mark.parametrize(("depth", "units"), [(32, 16), (110, 55)])
def test_units_of_the_papers_resnets(depth, units):
    cutting = cut_network(CifarResNet(depth), Partition(), [torch.zeros(2, 3, 16, 16)])
    assert len(cutting.bodies) == units
    assert cutting.unit_points == cutting.split_points
    assert cutting.split_points[:3] == ("relu", "layer1.0", "layer1.1")


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
