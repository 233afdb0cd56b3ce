"""Activations computed twice change no result, and take less memory."""

import random
from functools import partial

import lightning as L
import numpy as np
import pytest
import simple
import torch
from networks import CLASSES, PreAct, ResNet, Vit
from settings import batches, make, run
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, methods
from lightning_local.augmented import ResidualBlock
from lightning_local.layers import BatchNorm2d, norm_relu_conv
from lightning_local.meter import LiveBytes
from lightning_local.recompute import recomputed

W = 4  # channels
MODES = ["blocks", {0: "body"}]
METHODS = {
    **simple.METHODS,
    "InfoPro": lambda: methods.InfoPro(denormalize=([0.5] * 3, [0.1] * 3)),
    "BackLink of one unit": lambda: methods.BackLink(length=1),
}


class Block(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(W, W, 3, padding=1), make()
        self.bn, self.dropout = nn.BatchNorm2d(W), nn.Dropout(0.2)

    def forward(self, x):
        return functional.relu(x + self.dropout(self.bn(self.layer(self.conv(x)))))


class Net(nn.Module):
    def __init__(self, make=nn.Identity, blocks=3):
        super().__init__()
        self.stem = nn.Conv2d(3, W, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(make) for _ in range(blocks)))
        self.fc = nn.Linear(W, CLASSES)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def data(network=ResNet, **options):
    return batches(network if network is Vit else ResNet, **{"dtype": torch.float32, **options})


def wrapped(network, method, recompute="none", partition=2, dtype=torch.float32):
    L.seed_everything(3, verbose=False)
    partition = 1 if method == "EndToEnd" else partition
    return LocalLearner(make(network, dtype), method, partition, recompute=recompute)


def trained(network, method=None, *args, dtype=torch.float32, **options):
    """Weights, buffers and random states after a fit; without a method, of the module alone."""
    learner = wrapped(network, method or "EndToEnd", *args, dtype=dtype)
    lit, found = learner.module, {}
    torch.manual_seed(5)
    run(learner if method else lit, data(network, dtype=dtype), **options)
    numpy = np.random.get_state()[1]
    draws = [torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.tensor(numpy)]
    if learner.num_modules > 1:
        found, draws = learner.local_modules.state_dict(), draws + learner.streams.save()["cpu"]
    return {**lit.state_dict(), **found, **{f"random {i}": s for i, s in enumerate(draws)}}


def check(modes, network, method, partition=2, **options):
    """Against the same without recomputing; one module against the user's alone."""
    plain = None if method == "EndToEnd" else method
    expected = trained(network, plain, "none", partition, **options)
    for mode in modes:
        found = trained(network, method, mode, partition, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"EndToEnd", "SGR"}))
def test_a_fit_is_the_same(name):
    check(MODES, Net, METHODS[name]())
    if name in ("AugLocal", "BackLink"):
        check(["blocks", [1]], ResNet, METHODS[name](), "units")


def test_sgr_keeps_what_it_differentiates_twice():
    check([{0: "body"}], Net, methods.SGR())
    with pytest.warns(UserWarning, match="needs all their activations"):
        check(["blocks"], Net, methods.SGR(every=2))


def test_a_step_that_calls_parts_of_the_network_is_refused(quiet):
    learner = wrapped(Net, "EndToEnd", "blocks")
    network = learner.module.net

    def step(batch, batch_idx):
        hidden = network.blocks(network.stem(batch[0]))
        return functional.cross_entropy(network.fc(hidden.mean((2, 3))), batch[1])

    learner.module.training_step = step
    with pytest.raises(ValueError, match="called parts of it directly"):
        L.Trainer(**quiet, max_epochs=1).fit(learner, DataLoader(data(), batch_size=None))


def test_the_trainers_options():
    window = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    for options in ({"precision": "bf16-mixed"}, window):
        check(["blocks", "body"], Net, METHODS["AugLocal"](), **options)
        check(["blocks"], Net, "EndToEnd", **options)


def test_another_mode_resumes(tmp_path, quiet):
    found, path = [], tmp_path / "a.ckpt"
    for mode, epochs, resumed in (("none", 2, None), ("body", 1, None), ("blocks", 2, path)):
        learner = wrapped(Net, "BackLink", mode)
        trainer = L.Trainer(**quiet, max_epochs=epochs)
        trainer.fit(learner, DataLoader(data(), batch_size=None), ckpt_path=resumed)
        trainer.save_checkpoint(path)
        found.append(learner.state_dict())
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


class Glue(Net):
    """A mask and a size ride along, the mode changes the glue, layers are frozen."""

    def __init__(self, overwritten=None):
        super().__init__()
        self.overwritten = overwritten
        self.register_buffer("steps", torch.zeros(()))
        self.stem.requires_grad_(False)
        self.blocks[1].requires_grad_(False)

    def forward(self, x):
        mask, size = (x[:, :1] > 0).float(), x.shape[-1]
        count, x = torch.zeros_like(mask), self.stem(x)
        for block in self.blocks:
            x = block(x)
            if self.overwritten == "buffer":
                self.steps.add_(1)
            elif self.overwritten == "rider":
                count += 1
            x = functional.relu(x + count + self.steps) * mask / size
            x = functional.dropout(x, 0.2) if self.training else 2 * x
        return self.fc(x.sum((2, 3)))


class Mean(nn.Module):
    def __init__(self, change, late=False):
        super().__init__()
        self.change = change
        self.register_buffer("mean", None if late else torch.zeros(W, 1, 1))
        self.register_buffer("mask", torch.eye(8))

    def forward(self, x):
        self.change(self, x.detach().mean((2, 3), keepdim=True))
        return (x - self.mean) * self.mask


def assign(m, x):
    m.mean = x[0] if m.mean is None else m.mean / 2 + x[0]


LAYERS = {
    "norms": partial(nn.BatchNorm2d, W, momentum=None),
    "spectral": lambda: spectral_norm(nn.Conv2d(W, W, 1)),
    "buffer in place": partial(Mean, lambda m, x: m.mean.lerp_(x[0], 0.1)),
    "buffer assigned": partial(Mean, assign),
    "buffer made late": partial(Mean, assign, late=True),
    "buffer's data": partial(Mean, lambda m, x: m.mean.data.lerp_(x[0], 0.1)),
    "own batch norm": partial(
        Mean, lambda m, x: functional.batch_norm(x, m.mean.view(-1), torch.ones(W), training=True)
    ),
    "python": partial(Mean, lambda m, x: m.mean.fill_(random.random() + np.random.rand())),
}
NETWORKS = {name: partial(Net, layer) for name, layer in LAYERS.items()}
NETWORKS |= {"in place": PreAct, "attention": Vit, "glue": Glue, "rider": partial(Glue, "rider")}
NETWORKS |= {"network's buffer": partial(Glue, "buffer")}


@pytest.mark.parametrize("name", NETWORKS)
def test_whatever_a_network_does(name):
    check([{0: "body", 1: "blocks"}, "blocks"], NETWORKS[name], methods.BackLink())
    if name in ("in place", "glue", "norms"):
        check([{0: "body"}, "blocks"], NETWORKS[name], "EndToEnd")


@pytest.mark.parametrize(
    ("method", "recompute", "expected"),
    [
        ("Greedy", {0: "none"}, [1, 1, 1]),
        ("Greedy", [1], [1, 2, 2]),
        ("BackLink", [0], [3, 1, 1]),
        ("EndToEnd", "body", [2, 2, 2]),
    ],
)
def test_how_often_blocks_run(method, recompute, expected):
    learner, calls = wrapped(Net, method, recompute), []
    learner.build(data()[0][0])
    for i, block in enumerate(learner.module.net.blocks):
        block.conv.register_forward_hook(lambda *args, i=i: calls.append(i))
    run(learner, data())
    assert [calls.count(i) for i in range(3)] == [3 * n for n in expected]


@pytest.mark.parametrize("method", [methods.AugLocal(depth=2), methods.BackLink()])
def test_peaks(method):
    peaks = []
    for mode in ("none", "body", "blocks"):
        learner = wrapped(partial(Net, blocks=5), method, mode)
        learner.build(data()[0][0])
        with LiveBytes([*learner.parameters(), *learner.buffers()]) as live:
            run(learner, data(count=1, size=64))
        peaks.append(live.peak)
    assert peaks[2] < 0.9 * peaks[1] < 0.8 * peaks[0], peaks


WRONG = [
    (ValueError, ["all"], "recompute='all'.*'none', 'blocks', 'body'.*list of indices"),
    (ValueError, [[-1], {-2: "body"}, [0, 1, 0]], "recompute=.*counted from 0, each named once"),
    (ValueError, [{0: "all"}, {0: 1}], "(all'|1) .of local module 0.*'none', 'blocks', 'body'"),
    (TypeError, [True, None, 1, [True], {"0": "body"}, {0}], "recompute=.*'blocks'.*a list of"),
    (ValueError, [[0, 2]], "local module 2, and there are 2: pass indices from 0 to 1"),
]


@pytest.mark.parametrize(("error", "values", "message"), WRONG)
def test_a_wrong_argument_is_refused(error, values, message):
    for value in values:
        with pytest.raises(error, match=message):
            wrapped(Net, "Greedy", value).build(data()[0][0])


def both(use, shape=(5, W, 8, 8), train=True, autocast=False):
    for call in (norm_relu_conv, lambda x, norm, conv: conv(functional.relu(norm(x)))):
        torch.manual_seed(2)
        norm, conv = BatchNorm2d(W).train(train), nn.Conv2d(W, 6, 3, padding=1)
        x = torch.randn(shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(x.bfloat16() if autocast else x, norm, conv)
        yield [y, *use(y, [x, *norm.parameters(), *conv.parameters()]), *norm.buffers()]


def backwards(y, wanted):
    yield from torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
    for one in wanted:
        yield from torch.autograd.grad(y.sin().sum(), one, retain_graph=True)


def second_derivatives(y, wanted):
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)


@pytest.mark.parametrize("how", [{}, {"train": False}, {"autocast": True}, {"shape": (1, W, 1, 1)}])
def test_nothing_kept_before_a_convolution_changes_nothing(how):
    ours, plain = both(backwards, **how)
    assert all(map(torch.equal, ours, plain))
    torch.testing.assert_close(*both(second_derivatives, **how))


@pytest.mark.parametrize(("again", "most"), [(False, 2.1), (True, 0.1)])
def test_what_a_residual_block_keeps(again, most):
    block, x = ResidualBlock(W, W, 1), torch.randn(5, W, 8, 8, requires_grad=True)
    with LiveBytes() as live:
        y = recomputed(block, block.modules(), (x,), False) if again else block(x)
    assert live.live / y.untyped_storage().nbytes() - 1 <= most
