"""Criteria other than classification, and what a loss asks of the batch, for every method."""

import lightning as L
import pytest
import torch
from networks import Cnn, Tagger, Vit
from simple import METHODS
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, heads, losses, methods
from lightning_local.methods import LocalMethod

LOCAL = [name for name in METHODS if name != "EndToEnd"]


class Scalar(Cnn):
    """One number per sample, `(N,)`."""

    def forward(self, x):
        return super().forward(x)[:, 0]


class Lit(L.LightningModule):
    def __init__(self, net, loss):
        super().__init__()
        self.net = net
        self.loss = loss
        self.losses = []

    def training_step(self, batch, batch_idx):
        output, target = self.net(batch[0]), batch[1]
        if output.ndim == 3 and not target.is_floating_point():
            output, target = output.flatten(0, 1), target.flatten()
        return self.loss(output, target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def images(target):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 3, 8, 8, generator=generator)
    return x, target(x)


def tokens(target):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 6, 5, generator=generator)
    return x, target(x)


# Name: network, the batch, criterion, shape of what a head returns.
TASKS = {
    "regression": (Cnn, images(lambda x: x.mean((2, 3)) @ torch.ones(3, 4)), nn.MSELoss(), (12, 4)),
    "one-number": (Scalar, images(lambda x: x.mean((1, 2, 3))), nn.MSELoss(), (12,)),
    "multi-label": (
        Cnn,
        images(lambda x: (x.mean((2, 3)) @ torch.ones(3, 4) > 1.5).float()),
        nn.BCEWithLogitsLoss(),
        (12, 4),
    ),
    "soft-labels": (
        Vit,
        tokens(lambda x: functional.one_hot(x[:, 0, 0].mul(4).long(), 4) * 0.8 + 0.05),
        nn.CrossEntropyLoss(),
        (12, 4),
    ),
    "per-token": (Tagger, tokens(lambda x: x[:, :, 0].mul(4).long()), None, (12, 6, 4)),
    "per-token-regression": (
        Tagger,
        tokens(lambda x: x[:, :, :4].contiguous()),
        functional.mse_loss,
        (12, 6, 4),
    ),
}
# PredSim compares targets of two or more numbers per prediction.
REFUSED = [("PredSim", "one-number")]


def method_of(name):
    if name == "InfoPro":
        return methods.InfoPro(denormalize=([0.0], [1.0]))
    return METHODS[name]()


def fit(lit, method, batch, quiet, criterion=None, epochs=12, partition="units"):
    torch.manual_seed(1)
    learner = LocalLearner(lit, method, partition, criterion=criterion)
    loader = DataLoader([batch], batch_size=None)
    losses = []

    class Watch(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            losses.append(float(loss.detach()))

    L.Trainer(max_epochs=epochs, callbacks=[Watch()], **quiet).fit(learner, loader)
    return learner, losses


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", LOCAL)
def test_every_method_learns_every_task(name, task, quiet):
    network, batch, criterion, shape = TASKS[task]
    torch.manual_seed(0)
    lit = Lit(network(), criterion or nn.CrossEntropyLoss())
    if (name, task) in REFUSED:
        with pytest.raises(ValueError, match="a class index per prediction, or two or more"):
            fit(lit, method_of(name), batch, quiet, criterion, partition=3)
        return
    learner, found = fit(lit, method_of(name), batch, quiet, criterion, partition=3)
    k = learner.num_modules
    hidden = batch[0]
    with torch.no_grad():
        for module in learner.modules_in_order()[:-1]:
            (hidden,) = module(hidden)
            assert module.predict(hidden).shape == shape
    for own in range(k):
        assert found[own - k] < found[own], f"module {own}: {found[own::k]}"


def test_a_criterion_is_asked_as_the_network_would_be(quiet):
    """The same shapes: nothing is broadcast, which torch would warn of."""
    seen = []

    def criterion(output, target):
        seen.append((output.shape, target.shape))
        return functional.mse_loss(output, target)

    batch = images(lambda x: x.mean((1, 2, 3)))
    fit(Lit(Scalar(), nn.MSELoss()), methods.Greedy(), batch, quiet, criterion, epochs=1)
    assert seen == [((12,), (12,))] * 4


class Column(Cnn):
    """One number per sample, `(N, 1)`."""

    def forward(self, x):
        return super().forward(x)[:, :1]


def squared(output, target):
    return (output - target).square().mean()


def ranked(output, target):
    """Compares outputs with each other, and targets."""
    return ((output - output.T) - (target[:, None] - target)).square().mean()


NUMBERS = images(lambda x: x.mean((1, 2, 3)))


@pytest.mark.parametrize("name", ["Greedy", "InfoPro"])
@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.HuberLoss(), squared, nn.PoissonNLLLoss()])
def test_numbers_in_a_column_are_not_compared_with_every_target(criterion, name, quiet):
    lit = Lit(Column(), lambda output, target: functional.mse_loss(output[:, 0], target))
    before = {name: tensor.clone() for name, tensor in lit.state_dict().items()}
    message = r"each target, \(12, 12\) .* \(12, 1\), and the target .* \(12,\): .*squeeze"
    with pytest.raises(ValueError, match=message):
        fit(lit, method_of(name), NUMBERS, quiet, criterion)
    for key, parameter in lit.named_parameters():
        assert torch.equal(parameter, before[key]), key


def test_a_column_of_targets_is_not_compared_with_every_output(quiet):
    x, target = NUMBERS
    lit = Lit(Scalar(), lambda output, target: functional.mse_loss(output, target[:, 0]))
    with pytest.raises(ValueError, match=r"\(12, 12\) .* target\.squeeze\(-1\)"):
        fit(lit, methods.Greedy(), (x, target[:, None]), quiet, squared)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda output, target: squared(output[:, 0], target),
        lambda output, target: functional.mse_loss(output.squeeze(-1), target),
        lambda output, target: functional.l1_loss(output, target[:, None]),
        ranked,
    ],
)
def test_numbers_in_a_column_can_be_learned(criterion, quiet):
    lit = Lit(Column(), lambda output, target: functional.mse_loss(output[:, 0], target))
    learner, found = fit(lit, methods.Greedy(), NUMBERS, quiet, criterion)
    for own in range(k := learner.num_modules):
        assert found[own - k] < found[own]


def test_a_device_without_memory_says_so_itself(quiet):
    """Lightning's BatchSizeFinder looks for that error."""

    def criterion(output, target):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        fit(Lit(Scalar(), nn.MSELoss()), methods.Greedy(), NUMBERS, quiet, criterion)


def test_out_features_win_over_a_network_of_one_number():
    learner = LocalLearner(Lit(Scalar(), nn.MSELoss()), "Greedy", out_features=3)
    learner.build(torch.rand(2, 3, 8, 8))
    with torch.no_grad():
        (hidden,) = learner.local_modules[0](torch.rand(2, 3, 8, 8))
        assert learner.local_modules[0].predict(hidden).shape == (2, 3)


@pytest.mark.parametrize(
    ("method", "batch", "message"),
    [
        (
            methods.InfoPro(denormalize=([0.5], [0.25]), task="contrast"),
            images(lambda x: x.mean((2, 3)) @ torch.ones(3, 4)),
            "needs a class index per prediction, and got torch.float32",
        ),
        (
            methods.InfoPro(denormalize=([0.5], [2.0])),
            images(lambda x: torch.zeros(12, dtype=torch.int64)),
            r"turns the first batch into numbers from 0.5.* to 2.5, and the",
        ),
        (
            methods.InfoPro(denormalize=([0.5] * 4, [1.0] * 4)),
            images(lambda x: torch.zeros(12, dtype=torch.int64)),
            "has 4 channels, and the network's input of shape .* has 3",
        ),
        (
            methods.InfoPro(denormalize=([0.0], [1.0]), lam_last=(0, 0)),
            images(lambda x: torch.zeros(12, dtype=torch.int64)),
            "local module 1 of 3 would learn nothing",
        ),
        (
            methods.PredSim(),
            images(lambda x: {"label": torch.zeros(12)}),
            "got a dict: it takes a class index",
        ),
    ],
    ids=["contrast", "range", "channels", "weights", "dict"],
)
def test_what_does_not_fit_is_refused_before_a_weight_changes(method, batch, message, quiet):
    lit = Lit(Cnn(), functional.mse_loss)
    before = {name: tensor.clone() for name, tensor in lit.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(lit, method, batch, quiet, functional.mse_loss, epochs=1, partition=3)
    for name, parameter in lit.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_inputs_that_are_no_numbers_can_not_be_rebuilt(quiet):
    class Words(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Embedding(7, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    ids = torch.arange(12).remainder(7).view(3, 4)
    lit = Lit(Words(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"input, and this one is of type torch\.int64"):
        fit(lit, methods.InfoPro(denormalize=([0.0], [1.0])), (ids, ids % 4), quiet, epochs=1)
    fit(lit, LocalMethod(heads.MLP(), losses.PredSim()), (ids, ids % 4), quiet, epochs=1)


def test_a_preset_that_needs_arguments_says_so():
    with pytest.raises(ValueError, match=r"pass methods\.InfoPro\(denormalize=\.\.\.\)"):
        LocalLearner(Lit(Cnn(), nn.MSELoss()), "infopro")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.MLP(convs=-1), r"MLP\(convs=-1\): pass a whole number, 0 or more"),
        (lambda: heads.MLP(hidden=1.5), r"MLP\(hidden=1.5\)"),
        (lambda: heads.Linear(pool_features=0), r"Linear\(pool_features=0\): .* 1 or more"),
        (lambda: heads.Conv(widen=0), r"Conv\(widen=0\): pass a factor, above 0"),
        (lambda: methods.DGL(variant="mine"), r"variant='mine'\): pass one of \['auglocal'"),
        (lambda: methods.PredSim(beta=1.5), r"PredSim\(beta=1.5\): .* 0 to 1"),
        (lambda: methods.PredSim(parts="both"), r"pass one of \['predsim', 'pred', 'sim'\]"),
        (lambda: losses.InfoPro(([0.5], [0.0])), "standard deviations"),
        (lambda: losses.InfoPro(([0.5], [0.5, 0.5])), "two lists of one number per channel"),
        (
            lambda: losses.InfoPro(([0.5], [0.5]), task="both"),
            r"pass one of \['softmax', 'contrast'\]",
        ),
        (lambda: losses.InfoPro(([0.5], [0.5]), lam_first=(1,)), "pass two numbers, 0 or more"),
        (lambda: losses.InfoPro(([0.5], [0.5]), lam_first=5), "pass two numbers, 0 or more"),
        (lambda: losses.InfoPro((["a"], ["b"])), "two lists of one number per channel"),
        (lambda: losses.InfoPro(([float("nan")], [0.5])), "two lists of one number per channel"),
        (lambda: losses.InfoPro({"mean": 0, "std": 1}), "two lists of one number per channel"),
        (lambda: heads.Conv(widen="x"), r"widen='x'\): pass a factor, above 0"),
        (lambda: heads.Linear(zero_init="no"), "pass True or False"),
        (lambda: methods.AugLocal(depth="x"), r"depth='x'\): pass a number of units, 0 or more"),
        (lambda: methods.SGR(every="x"), r"every='x'\): pass a number of batches, 1 or more"),
        (lambda: methods.BackLink(length="x"), "or a number of units, 0 or more"),
        (lambda: losses.InfoPro(([0.5], [0.5]), lam_last=(-1, 1)), "pass two numbers, 0 or more"),
        (lambda: losses.InfoPro(([0.5], [0.5]), widen=0), "pass a factor, above 0"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
