"""Inputs of a network: what the batch gives, and arguments that it does not give."""

from __future__ import annotations

import pytest
import torch
from sketches import VECTOR, D, composed, cut, linear, net
from torch import nn

FORWARDS = {
    "none": lambda self, x, mask=None: self.b(self.a(x if mask is None else x * mask)),
    "keyword only": lambda self, x, *, flip=False: self.b(self.a(-x if flip else x)),
    "number and name": lambda self, x, scale=2.0, mode="a": self.b(self.a(x * scale)),
    "structure": lambda self, x, sizes=(2, 3), more=None: self.b(self.a(x * sizes[1])),
    "any": lambda self, x, *args, **kwargs: self.b(self.a(x)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_arguments_that_the_batch_does_not_give(name):
    network = net(FORWARDS[name], a=linear(), b=linear())
    assert torch.equal(composed(cut(network, VECTOR).bodies, VECTOR), network(VECTOR))


def test_inputs_have_to_fit_the_forward():
    two = net(lambda self, x, y: self.b(self.a(x * y)), a=linear(), b=linear())
    optional = net(FORWARDS["none"], a=linear(), b=linear())
    # A mask for all samples is no batch of one.
    inputs = VECTOR, torch.rand(1, D)
    for network in (two, optional):
        assert torch.equal(composed(cut(network, *inputs).bodies, *inputs), network(*inputs))
    with pytest.raises((TypeError, ValueError), match="y"):
        cut(two, VECTOR)
    with pytest.raises((TypeError, ValueError), match="2 inputs"):
        cut(net(lambda self, x: self.b(self.a(x)), a=linear(), b=linear()), *inputs)
    # BatchNorm needs two samples; one is enough as an example.
    normed = nn.Sequential(linear(), nn.BatchNorm1d(D), linear())
    assert cut(normed, VECTOR[:1]).split_points == ("1",)
