"""Whole runs: everything trains, random streams, and heads that any builder makes the same."""

from __future__ import annotations

import copy

import torch
from networks import Cnn, Mlp
from settings import ScaledCrossEntropy, batches, fit, learner_of, make
from torch import nn

from lightning_local import LocalLearner, methods


def test_every_weight_and_buffer_moves() -> None:
    """The comparisons with the reference would also hold if nothing trained."""
    learner = learner_of(make(Cnn), methods.BackLink(), 3)
    before = copy.deepcopy(learner.state_dict())
    fit(learner, batches(Cnn))
    for name, value in learner.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_weights_outside_the_network_belong_to_the_last_module() -> None:
    learners = []
    for outside in (False, True):
        lit = make(Mlp)
        if outside:
            lit.loss.factor = nn.Parameter(torch.ones((), dtype=torch.float64))
            lit.loss.register_forward_hook(lambda module, args, loss: loss * module.factor)
        learners.append(learner_of(lit, methods.BackLink(), 2, network="net"))
        record = fit(learners[-1], batches(Mlp, 1))
    factor = record.gradients[0]["module.loss.factor"]
    torch.testing.assert_close(factor, record.losses[0][1], rtol=1e-10, atol=1e-10)
    assert float(learners[1].module.loss.factor.detach()) != 1.0
    for name, value in learners[0].state_dict().items():
        assert torch.equal(value, learners[1].state_dict()[name]), name


def test_dropout_comes_from_one_stream_per_module() -> None:
    """Same seed, same run; another state of the global generator changes nothing."""
    states = []
    for disturb in (False, False, True):
        lit = make(Cnn)
        for block in lit.net.blocks:
            block.relu = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.3))
        learner = learner_of(lit, methods.BackLink(), 3)
        if disturb:
            torch.rand(5)
        fit(learner, batches(Cnn))
        states.append(learner.state_dict())
    plain = learner_of(make(Cnn), methods.BackLink(), 3)
    fit(plain, batches(Cnn))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert torch.equal(value, states[2][name]), name
    weight = "module.net.blocks.4.conv.weight"
    assert not torch.equal(states[0][weight], plain.state_dict()[weight]), "dropout did nothing"


def test_heads_made_by_the_fit_are_those_made_before_it() -> None:
    built = learner_of(make(Cnn), methods.AugLocal(depth=1))
    torch.manual_seed(5)
    unbuilt = LocalLearner(make(Cnn), methods.AugLocal(depth=1), criterion=ScaledCrossEntropy())
    torch.manual_seed(5)
    for learner in (built, unbuilt):
        fit(learner, batches(Cnn))
    assert set(built.state_dict()) == set(unbuilt.state_dict())
    for name, value in built.state_dict().items():
        assert torch.equal(value, unbuilt.state_dict()[name]), name


def test_reconciliation_brings_gradients_together() -> None:
    """R falls while the loss still does, and further than without the penalty."""
    ends = []
    for weight in (0.0, 1.0):
        method = methods.SGR(weight=weight, distance="cosine")
        learner = learner_of(make(Cnn, lr=0.03), method, 2)
        logged = fit(learner, batches(Cnn, 4, size=16) * 8).logged
        losses = [step["local/01/loss"] for step in logged]
        distances = [step["local/01/reconciliation"] * step["local/01/loss"] for step in logged]
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
        assert sum(distances[-4:]) < sum(distances[:4])
        ends.append(sum(distances[-4:]))
    assert ends[1] < 0.8 * ends[0], ends
