"""Bodies: code that runs on the user's own network, equals it bit for bit, and owns nothing."""

from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
from settings import cut_network
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, Partition, methods
from lightning_local.cutting import Cutting

D = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + functional.gelu(self.linear(self.norm(x)))


class Stack(nn.Module):
    """A container of the user's own, whose forward the cuts open."""

    block = Block

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.block(), self.block()

    def forward(self, x):
        return self.second(self.first(x))


class Net(nn.Module):
    """Stem, a container, a classifier; subclasses change the glue."""

    container: type[nn.Module] = Stack

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.stack = self.container()
        self.fc = nn.Linear(D, 3)
        self.unused = nn.Linear(2, 2, bias=False)
        self.register_buffer("offset", torch.randn(D))

    def forward(self, x):
        return self.fc(self.stack(self.stem(x)))


class FunctionalDropout(Net):
    def forward(self, x):
        x = functional.dropout(self.stem(x), 0.5, training=self.training)
        return self.fc(functional.dropout(self.stack(x), 0.5, self.training))


class IfTraining(Net):
    class container(Stack):
        def forward(self, x):
            x = functional.dropout(self.first(x), 0.5, training=self.training)
            if not self.training:
                x = x - 1
            return self.second(x)

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.randn_like(x) if self.training else x * 2 + self.offset
        return self.fc(self.stack(x))


class Carried(Net):
    """What is computed from the input and buffers only is made early and used late."""

    def forward(self, x):
        self.offset.mul_(0.5)
        mask = (x > 0).float() * self.offset
        x = self.stack(self.stem(x) * mask)
        return {"logits": self.fc(x * mask / mask.shape[0]), "parts": [x, (x.mean(), None)]}


class LooksAtValues(Net):
    """Modules that can't be traced, and need not be."""

    class container(Stack):
        class block(Block):
            def forward(self, x):
                return super().forward(x) if x.sum() > 0 else -super().forward(x)


POINTS = ("stem", "stack.first", "stack.second")


def cut(network: nn.Module, points=POINTS) -> Cutting:
    return cut_network(network, Partition(split_points=points), [torch.randn(6, D)])


def chain(cutting: Cutting, x: torch.Tensor):
    values = (x,)
    for body in cutting.bodies:
        values = body(*values)
    return values


def compare(network: nn.Module, function, x: torch.Tensor) -> None:
    """Output, gradients, buffers and draws of `function` equal the network's, bit for bit."""
    results = []
    for call in (network, function):
        state = copy.deepcopy(network.state_dict())
        torch.manual_seed(3)
        network.zero_grad()
        leaves = torch.utils._pytree.tree_leaves(call(x.clone()))
        output = [leaf for leaf in leaves if leaf is not None]
        sum(t.square().sum() for t in output).backward()
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        buffers = [b.clone() for b in network.buffers()]
        results.append([*output, *gradients, *buffers, torch.rand(1)])
        network.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [Net, FunctionalDropout, IfTraining, Carried, LooksAtValues])
def test_bodies_chained_are_the_network(kind):
    network = kind()
    cutting = cut(network)
    assert len(cutting.bodies) == 4
    for training in (True, False, True):
        for samples in (6, 5):
            network.train(training)
            compare(network, lambda x: chain(cutting, x), torch.randn(samples, D))


def test_masks_ride_along_and_only_as_far_as_they_are_used():
    cutting = cut(Carried())
    assert [body.num_carried for body in cutting.bodies] == [0, 1, 1, 1]
    values = cutting.bodies[0](torch.randn(6, D))
    assert [value.requires_grad for value in values] == [True, False]


def test_every_tensor_belongs_to_exactly_one_body():
    network = Carried()
    for points in (POINTS, ("stack",)):
        bodies = cut(network, points=points).bodies
        parameters = [name for body in bodies for name, _ in body.named_parameters()]
        buffers = [name for body in bodies for name, _ in body.named_buffers()]
        assert sorted(parameters) == sorted(name for name, _ in network.named_parameters())
        assert sorted(buffers) == sorted(name for name, _ in network.named_buffers())
        assert "offset" in dict(bodies[0].named_buffers())
        # What the forward never uses goes with the last one.
        assert "unused.weight" in dict(bodies[-1].named_parameters())
        for body in bodies:
            for name, parameter in body.named_parameters():
                assert parameter is network.get_parameter(name)
            assert not body.state_dict()


def test_weights_tied_within_a_body_are_listed_once():
    network = Net()
    block = network.stack.second
    block.norm = nn.Linear(D, D)
    block.norm.weight = block.linear.weight
    body = cut(network).bodies[2]
    assert sum(parameter is block.linear.weight for parameter in body.parameters()) == 1
    assert len(list(body.parameters())) == 3


class Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return self.network(batch[0])


@pytest.fixture
def learner() -> LocalLearner:
    learner = LocalLearner(Module(FunctionalDropout()), methods.Greedy(), ["stem", "stack.first"])
    learner.build(torch.randn(6, D))
    return learner


def test_the_state_dict_holds_the_users_keys_and_the_heads_once(learner):
    state = learner.state_dict()
    own = [f"module.{key}" for key in learner.module.state_dict()]
    heads = [k for k, module in enumerate(learner.local_modules) if module.head is not None]
    parts = [f"local_modules.{k}.head.1.{name}" for k in heads for name in ("weight", "bias")]
    assert heads == [0, 1]
    assert sorted(state) == sorted(own + parts)
    storages = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(storages) == len(set(storages))


def test_replaced_layers_are_seen():
    network = Net()
    cutting, x = cut(network), torch.randn(6, D)
    network.fc = nn.Linear(D, 5)
    network.stack.second = Block()
    network.stack.first.linear = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    compare(network, lambda value: chain(cutting, value), x)
    assert chain(cutting, x).shape == (6, 5)
    assert dict(cutting.bodies[-1].named_parameters())["fc.weight"] is network.fc.weight


def test_parameters_of_a_replaced_layer_with_other_names_are_owned():
    network = Net()
    bodies = cut(network).bodies
    network.stem = nn.Linear(D, D, bias=False)
    network.fc = nn.Sequential(nn.Linear(D, 3, bias=False))
    assert [name for name, _ in bodies[0].named_parameters()] == ["stem.weight"]
    assert "fc.0.weight" in dict(bodies[-1].named_parameters())


def test_converted_batch_norms_are_called():
    network = Net()
    cutting = cut(network)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(network) is network
    called = []
    for layer in (network.stack.first.norm, network.stack.second.norm):
        layer.register_forward_hook(lambda module, args, out: called.append(type(module)))
    network.eval()
    chain(cutting, torch.randn(6, D))
    assert called == [nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert nn.SyncBatchNorm in {type(layer) for layer in cutting.bodies[1].layers()}


COPIES = [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
def test_a_copied_body_runs_on_a_copied_network(duplicate):
    network = FunctionalDropout().eval()
    body, x = cut(network, points=("stem",)).bodies[1], torch.randn(6, D)
    copied, expected = duplicate(body), body(x)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        dict(copied.named_parameters())["fc.bias"].add_(1)
    assert torch.equal(body(x), expected)
    assert not torch.equal(copied(x), expected)


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
def test_a_copied_learner_is_whole_and_on_its_own(learner, duplicate):
    x = torch.randn(6, D)
    copied = duplicate(learner.eval())
    network = copied.module.network
    assert network is not learner.module.network
    for module in copied.local_modules:
        for name, parameter in module.body.named_parameters():
            assert parameter is network.get_parameter(name)
    assert copied.state_dict().keys() == learner.state_dict().keys()
    expected = learner.validation_step((x, None), 0)
    assert torch.equal(copied.validation_step((x, None), 0), expected)
    with torch.no_grad():
        network.fc.bias.add_(1)
    assert torch.equal(learner.validation_step((x, None), 0), expected)
    assert torch.equal(copied.validation_step((x, None), 0), network(x))
    assert torch.equal(chain(copied.cutting, x), network(x))


def test_bodies_that_overwrite_what_they_get_are_marked():
    through_a_view = [nn.Unflatten(1, (2, 4)), nn.SiLU(inplace=True), nn.Flatten()]
    first, second, third, fourth = (nn.Linear(D, D) for _ in range(4))
    relu = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    network = nn.Sequential(relu[0], first, second, *through_a_view, third, relu[1], fourth)
    learner = LocalLearner(Module(network), methods.Greedy(), ["1", "2", "6", "7"])
    x = torch.randn(6, D)
    before = x.clone()
    learner.build(x)
    assert torch.equal(x, before)
    marked = [module.body.in_place for module in learner.local_modules]
    assert marked == [True, False, True, True, False]
    assert not any(module.head_in_place for module in learner.local_modules)


def test_modes_that_differ_are_an_error_only_where_glue_depends_on_them():
    network, x = IfTraining(), torch.randn(6, D)
    cutting = cut(network)
    network.stack.eval()
    with pytest.raises(RuntimeError, match=r"`stack` is in eval mode"):
        chain(cutting, x)
    # A frozen container whose own forward doesn't ask for the mode, as in fine-tuning.
    network = FunctionalDropout()
    cutting = cut(network)
    network.stack.eval()
    compare(network, lambda value: chain(cutting, value), x)
