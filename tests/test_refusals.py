"""What LocalLearner refuses or warns of, beside the table of `test_errors.py`."""

import lightning as L
import pytest
import torch
from simple import CLASSES, Lit, Net, data, fit, greedy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, Partition
from lightning_local.first_batch import check_target


def test_a_batch_that_cannot_be_unpacked_is_named(quiet):
    triples = [(x, y, y) for x, y in data().dataset]
    with pytest.raises(ValueError, match="The batch is a list of 3"):
        fit(greedy(Lit()), quiet, loader=DataLoader(triples, 16))
    learner = greedy(Lit(), unpack=lambda batch: (batch[0], batch[1]))

    def step(batch, batch_idx):
        return functional.cross_entropy(learner.module(batch[0]), batch[1])

    learner.module.training_step = step
    fit(learner, quiet, epochs=1, loader=DataLoader(triples, 16))
    assert learner.num_modules == 4


def test_ambiguous_networks_list_the_choices():
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.other = Net()

    with pytest.raises(ValueError, match="network='network' or 'other'"):
        greedy(Two())
    assert greedy(Two(), network="other").network_name == "other"
    with pytest.raises(ValueError, match="network='netwrok' is no submodule"):
        greedy(Two(), network="netwrok")


class NoForward(Lit):
    """Its step calls the layers."""

    def __init__(self):
        super().__init__()
        self.fc, self.network.fc = self.network.fc, nn.Identity()

    forward = L.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.fc(self.network(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


def test_a_forward_is_missed_where_it_would_be_cut(quiet):
    fit(LocalLearner(NoForward(), "EndToEnd"), quiet, epochs=1)
    fit(LocalLearner(NoForward(), "EndToEnd", network="."), quiet, epochs=1)
    with pytest.raises(ValueError, match="cuts the forward of NoForward, which defines none"):
        LocalLearner(NoForward(), "EndToEnd", network=".", recompute="body")
    with pytest.raises(ValueError, match="pass one of 'network', 'fc'.$"):
        greedy(NoForward(), network="netwrok")


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 5, 6)])
def test_classes_in_dimension_1_are_named_as_a_cause(shape):
    target = torch.arange(24).view(4, 6) % 9
    with pytest.raises(ValueError, match=r"as \(N, T, V\), classes last. If yours is \(N, V, T\)"):
        check_target(target, torch.zeros(shape))
    with pytest.raises(ValueError, match="as there are classes.$"):
        check_target(target, torch.zeros(4, 6, 8))


def test_names_are_relative_to_the_network():
    for point in ("module.network.blocks.1", "network.blocks.1"):
        with pytest.raises(ValueError, match="relative to that: pass 'blocks.1'"):
            greedy(Lit(), partition=["stem", point])
    with pytest.raises(ValueError, match="Leaf `network.stem`.* pass 'stem'"):
        greedy(Lit(), partition=Partition(leaves=["network.stem"]))
    with pytest.raises(ValueError, match="`network.blocks.7` .* closest names"):
        greedy(Lit(), partition=["network.blocks.7"])


def test_a_module_of_the_other_package_cannot_be_wrapped():
    foreign = type("LightningModule", (), {"__module__": "pytorch_lightning.core.module"})
    with pytest.raises(TypeError, match="is a pytorch_lightning module"):
        LocalLearner(type("Mine", (foreign,), {})(), "Greedy")


def test_a_coupling_without_a_boundary_warns():
    with pytest.warns(UserWarning, match="BackwardLink has no effect with one local module"):
        LocalLearner(Lit(), "BackLink", partition=1)


def test_a_network_of_one_unit_says_that_nothing_is_local(quiet):
    class One(Lit):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))

    learner = greedy(One(), network="network")
    with pytest.warns(UserWarning, match="`network` has one unit, so it is trained end to end"):
        fit(learner, quiet, epochs=1)
    assert learner.num_modules == 1


def test_a_frozen_network_trains_its_heads_and_says_so(quiet):
    learner = greedy(Lit().requires_grad_(False))
    learner.build(torch.randn(2, 1, 6, 6))
    heads = [parameter.detach().clone() for parameter in learner.local_modules.parameters()]
    before = {name: tensor.clone() for name, tensor in learner.network.named_parameters()}
    with pytest.warns(UserWarning, match="the heads alone are trained"):
        fit(learner, quiet, epochs=1)
    for name, parameter in learner.network.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for parameter, old in zip(learner.local_modules.parameters(), heads, strict=True):
        assert not torch.equal(parameter, old)


class Decides(nn.Sequential):
    """Glue that numbers decide on, in a module that holds all layers."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_a_module_that_cannot_be_followed_is_named_where_units_are_missing(quiet):
    layers = nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, CLASSES)
    network = nn.Sequential(Decides(*layers))
    reason = r"The forward of Decides can't .*\n.*x if x.sum\(\) > 0 else -x\)\n.*parts one by one"
    with pytest.warns(UserWarning, match=f"one unit, so it is trained end to end.*{reason}"):
        fit(greedy(Lit(network)), quiet, epochs=1)
    with pytest.raises(ValueError, match=f"has 1 units: pass at most 1.*{reason}"):
        fit(greedy(Lit(network), partition=2), quiet, epochs=1)
    with pytest.raises(ValueError, match=reason):
        fit(greedy(Lit(network), partition=["0.1"]), quiet, epochs=1)
