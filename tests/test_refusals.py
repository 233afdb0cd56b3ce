"""What LocalLearner refuses, when it arrives or in the first step, and what it says."""

import pytest
import torch
from simple import CLASSES, Lit, Net, data, fit, greedy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_local import LocalLearner


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda self, b, i: self.loss(self(b[0] + 1.0), b[1]), "another input than the batch's"),
        (lambda self, b, i: self.loss(self(b[0]) + self(b[0]), b[1]), "called the network twice"),
        (lambda self, b, i: self.fixed.sum(), "did not call the network"),
        (lambda self, b, i: self(b[0]) and None, "without a loss tensor"),
        (lambda self, b, i: self(b[0]).mean(0), "return a scalar"),
    ],
)
def test_a_step_that_hides_something_is_refused(step, words, quiet):
    class Odd(Lit):
        def __init__(self):
            super().__init__()
            self.fixed = nn.Parameter(torch.zeros(1))

        def loss(self, output, y):
            return functional.cross_entropy(output, y)

        def training_step(self, batch, batch_idx):
            if words == "without a loss tensor":
                self(batch[0])
                return None
            return step(self, batch, batch_idx)

    with pytest.raises(ValueError, match=words):
        fit(greedy(Odd(), network="network"), quiet)


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


def test_modules_that_cannot_be_wrapped():
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Steps(Lit):
        def optimizer_step(self, *args, **kwargs):
            pass

    with pytest.raises(ValueError, match="automatic_optimization = False"):
        greedy(Manual())
    with pytest.raises(ValueError, match="overrides optimizer_step"):
        greedy(Steps())
    with pytest.raises(TypeError, match="got a Net: pass a"):
        greedy(Net())

    foreign = type("LightningModule", (), {"__module__": "pytorch_lightning.core.module"})
    with pytest.raises(TypeError, match="is a pytorch_lightning module"):
        LocalLearner(type("Mine", (foreign,), {})(), "Greedy")


def test_arguments_are_checked_when_they_arrive():
    for arguments, words in [
        ({"method": "auglocl"}, "Did you mean 'AugLocal'"),
        ({"method": 3}, "pass one of"),
        ({"method": "EndToEnd", "partition": 2}, "trains the network as one module"),
        ({"partition": "blocks"}, "partition='blocks' is not known"),
        ({"partition": 0}, "1 .end to end. or more"),
        ({"partition": ["stm"]}, "closest names are: stem"),
        ({"out_features": 0}, "heads need 1 or more"),
        ({"lr_scheduler": torch.optim.lr_scheduler.StepLR}, "needs optimizer"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            LocalLearner(Lit(), **arguments)


def test_more_modules_than_units_is_an_error_that_counts(quiet):
    with pytest.raises(ValueError, match="asks for 9 local modules, but `network` has 4 units"):
        fit(greedy(Lit(), partition=9), quiet)


def test_a_coupling_without_a_boundary_warns():
    with pytest.warns(UserWarning, match="BackwardLink has no effect with one local module"):
        LocalLearner(Lit(), "BackLink", partition=1)


def test_several_optimizers_are_refused(quiet):
    class Several(Lit):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    with pytest.raises(ValueError, match="returned 2 optimizers"):
        fit(greedy(Several()), quiet)


def test_a_nan_loss_is_named_by_module_and_batch(quiet):
    class Bad(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.network.blocks[1].conv.weight.data.fill_(float("nan"))

    with pytest.raises(
        FloatingPointError, match="local module 2 of 4 was NaN or infinite in batch 1"
    ):
        fit(greedy(Bad()), quiet, log_every_n_steps=1)


def test_a_network_of_one_unit_says_that_nothing_is_local(quiet):
    class One(Lit):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))

    learner = greedy(One(), network="network")
    with pytest.warns(UserWarning, match="`network` has one unit, so it is trained end to end"):
        fit(learner, quiet, epochs=1)
    assert learner.num_modules == 1
