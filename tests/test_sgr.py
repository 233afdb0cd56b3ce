"""SGR: where it differentiates twice, what it leaves as it was, and its BP-free form."""

import lightning as L
import pytest
import torch
from networks import Cnn, Mlp, Vit
from settings import Lit, batches, fit, learner_of, make
from torch import nn

from lightning_local import LocalLearner, Partition, couplings, heads, methods
from lightning_local.methods import LocalMethod

WEIGHT_LAYERS = ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0")


def weight_layers(tensor):
    """How many weight layers the graph behind a tensor spans."""
    waiting, seen, count = [tensor.grad_fn], set(), 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += node.name() in WEIGHT_LAYERS
        waiting += [following for following, _ in node.next_functions]
    return count


class Watched(couplings.GradientReconciliation):
    """Notes what each batch's work looks like before anything is differentiated."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def prepare(self, work):
        hidden = None if work.hidden is None else weight_layers(work.hidden)
        self.seen.append((hidden, weight_layers(work.loss), work.input is not None))
        return super().prepare(work)


@pytest.mark.parametrize(("network", "layers_at_the_end"), [(Cnn, 2), (Mlp, 1)])
def test_without_backpropagation_no_graph_spans_two_weight_layers(network, layers_at_the_end):
    """The BP-free setting: one layer per module, and a linear head, one layer of its own."""
    coupling = Watched(weight=0.05)
    method = LocalMethod(heads.Linear(), coupling=coupling)
    learner = learner_of(make(network), method, Partition(granularity="finest"))
    fit(learner, batches(network, 2))
    k = learner.num_modules
    assert k >= 4
    assert len(coupling.seen) == 2 * k
    for i, (hidden, loss, _) in enumerate(coupling.seen):
        if i % k < k - 1:
            assert (hidden, loss) == (1, 2)  # the layer, and the head's on top of it
        else:
            # Cnn's classifier belongs to its last convolution, as what follows the last map does.
            assert (hidden, loss) == (None, layers_at_the_end)


def test_other_batches_are_those_of_greedy():
    """Between regularised batches nothing is a leaf, and no gradient of an input is formed."""
    coupling = Watched(weight=0.05, every=3)
    learner = learner_of(make(Cnn), LocalMethod(heads.Linear(), coupling=coupling), 3)
    record = fit(learner, batches(Cnn, 5))
    leaves = [seen[2] for seen in coupling.seen]
    for step in range(5):
        regularised = step % 3 == 0
        assert leaves[3 * step : 3 * step + 3] == [False, regularised, regularised]
    assert "local/01/reconciliation" in record.logged[3]


def kernels(network, method):
    """Which attention kernels are allowed at each call of attention, in a fit and behind it."""
    seen = []
    learner = learner_of(make(network), method)

    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            for block in learner.module.net.encoder:
                block.norm1.register_forward_hook(lambda *_: seen.append(flags()))

    def flags():
        backends = torch.backends.cuda
        return backends.flash_sdp_enabled(), backends.math_sdp_enabled()

    before = flags()
    fit(learner, batches(network, 2), callbacks=[Watch()])
    assert flags() == before
    return seen, before


def test_attention_is_plain_where_it_is_differentiated_twice_and_only_there():
    every = LocalMethod(heads.Linear(), coupling=couplings.GradientReconciliation(0.05, every=2))
    seen, usual = kernels(Vit, every)
    assert seen == [(False, True)] * 3 + [usual] * 3
    assert usual[0]
    seen, usual = kernels(Vit, methods.Greedy())
    assert seen == [usual] * 6


def test_statistics_are_updated_once_per_batch():
    learner = learner_of(make(Cnn), methods.SGR(weight=0.05), 3)
    fit(learner, batches(Cnn, 4))
    counters = [b for name, b in learner.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counters) == 5 + 2
    assert {int(counter) for counter in counters} == {4}


class Once(torch.autograd.Function):
    """Has a gradient that can't be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class Doubling(nn.Module):
    def forward(self, x):
        return Once.apply(x)


@pytest.mark.parametrize("layer", [nn.Hardsigmoid, Doubling])
def test_what_has_no_second_derivative_is_named(layer):
    net = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(7, 7), layer())))
    learner = LocalLearner(Lit(net.double()), methods.SGR(), 3)
    learner.build(batches(Mlp, 1)[0][0])
    with pytest.raises(ValueError, match="SGR's reconciliation differentiates gradients once more"):
        fit(learner, batches(Mlp, 1))
