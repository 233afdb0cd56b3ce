"""Networks, data and pieces at the edge: what trains anyway, and what is refused with a remedy."""

import lightning as L
import pytest
import torch
from simple import METHODS
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, couplings, heads, losses, methods
from lightning_local.methods import LocalMethod
from lightning_local.reconciliation import gradient_distance
from lightning_local.similarity import similarity_loss, supervised_contrastive

CLASSES = 3
LOCAL = [name for name in METHODS if name != "EndToEnd"]


class Lit(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        output, target = self.net(batch[0]), batch[1]
        return functional.cross_entropy(output, target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


class Net(nn.Module):
    """Convolutions of 1, 2 or 3 dimensions, but the first perhaps checkpointed; a classifier."""

    def __init__(self, dims=2, reentrant=None):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.layers = nn.ModuleList(conv(a, 8, 3, padding=1) for a in (1, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)
        if reentrant is not None:
            for i in (1, 2, 3):
                self.layers[i] = Checkpointed(self.layers[i], reentrant)

    def forward(self, x):
        for layer in self.layers:
            x = functional.relu(layer(x))
        return self.fc(x.flatten(2).mean(2))


def batch(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.rand(shape, generator=generator)
    return x, torch.randint(CLASSES, (shape[0],), generator=generator)


def fit(net, data, method, quiet, partition=2, **options):
    torch.manual_seed(0)
    learner = LocalLearner(Lit(net), method, partition, **options)
    loader = DataLoader(data, batch_size=None)
    trainer = L.Trainer(max_epochs=1, **quiet)
    trainer.fit(learner, loader)
    assert all(p.isfinite().all() for p in learner.parameters())
    return learner


def method_of(name):
    if name == "InfoPro":
        return methods.InfoPro(denormalize=([0.0], [1.0]))
    return METHODS[name]()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", LOCAL)
def test_a_last_batch_of_one_small_sample(name, dims, quiet):
    data = [batch(n, 1, *[4] * dims) for n in (4, 1)]
    fit(Net(dims), data, method_of(name), quiet)


@pytest.mark.parametrize("name", LOCAL)
def test_images_of_several_sizes(name, quiet):
    data = [batch(4, 1, 8, 8), batch(4, 1, 12, 12)]
    if name == "PredSim":
        with pytest.raises(
            ValueError, match=r"hidden states of shape \(8, 8, 8\), and got \(8, 12"
        ):
            fit(Net(), data, methods.PredSim(pool_features=16), quiet)
        return
    fit(Net(), data, method_of(name), quiet)


@pytest.mark.parametrize("distance", ["cosine", "normalized_l2"])
def test_gradients_that_are_zero_have_no_direction(distance, quiet):
    """A classifier that starts at zero gives g_in = 0, and its derivative is then 1 / 0."""
    own = torch.zeros(2, 3, requires_grad=True)
    found = gradient_distance(own, torch.ones(2, 3), distance)
    assert float(found.detach()) == pytest.approx(1, abs=1e-6)
    (gradient,) = torch.autograd.grad(found, own)
    assert not gradient.any()
    net = Net()
    nn.init.zeros_(net.fc.weight)
    method = methods.SGR(weight=0.1, distance=distance)
    learner = fit(net, [batch(8, 1, 6, 6)], method, quiet)
    assert learner.network.fc.weight.abs().max() < 1


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_cosine_and_its_derivative_are_those_of_torch(dtype, size):
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 4, 2, 3, generator=generator).to(dtype).mul(size)
    own.requires_grad_()
    found = gradient_distance(own, other, "cosine")
    (gradient,) = torch.autograd.grad(found, own)
    a, b = own.detach().double().flatten(1).requires_grad_(), other.double().flatten(1)
    expected = (1 - functional.cosine_similarity(a, b, eps=0)).mean()
    (derivative,) = torch.autograd.grad(expected, a)
    bound = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=min(bound, 1e-5))
    wrong = (gradient.double().flatten(1) - derivative).norm() / derivative.norm()
    assert wrong < bound
    assert gradient.dtype == dtype


@pytest.mark.parametrize("name", ["BackLink", "SGR"])
def test_reentrant_checkpoints_hide_parameters_from_couplings(name, quiet):
    data = [batch(4, 1, 6, 6)]
    with pytest.raises(ValueError, match="pass use_reentrant=False"):
        fit(Net(reentrant=True), data, method_of(name), quiet)
    torch.manual_seed(1)
    linked = fit(Net(reentrant=False), data, method_of(name), quiet)
    torch.manual_seed(1)
    plain = fit(Net(), data, method_of(name), quiet)
    for found, value in zip(linked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, value)


class Custom(losses.Loss):
    def __init__(self, kind):
        self.kind = kind

    def build(self, place, criterion):
        return {"in place": InPlace, "vector": Vector}.get(self.kind, nn.Identity)()


class InPlace(losses.Objective):
    def forward(self, output, hidden, target, input):
        return functional.cross_entropy(output, target) + hidden.detach().tanh_().mean()


class Vector(losses.Objective):
    def forward(self, output, hidden, target, input):
        return functional.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("in place", ValueError, "The loss InPlace overwrites the hidden state"),
        ("vector", ValueError, r"loss Vector of local module 0 returned \(4,\), and a scalar is"),
        ("none", TypeError, r"Custom.build returned a Identity: it has to return a losses\.Obj"),
    ],
)
def test_losses_of_others_are_checked(kind, error, message, quiet):
    method = LocalMethod(heads.Linear(), Custom(kind))
    with pytest.raises(error, match=message):
        fit(Net(), [batch(4, 1, 6, 6)], method, quiet)


def test_the_criterions_ignored_index_is_left_out_everywhere():
    torch.manual_seed(0)
    z, target = torch.randn(6, 5), torch.tensor([0, 1, 255, 1, 0, 255])
    kept = target != 255
    for loss, options in ((similarity_loss, (3,)), (supervised_contrastive, (0.07,))):
        found = loss(z, target, *options, ignored=255)
        torch.testing.assert_close(found, loss(z[kept], target[kept], *options))
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    for loss in (losses.PredSim(), losses.InfoPro(([0.0], [1.0]), task="contrast")):
        learner = LocalLearner(Lit(Net()), LocalMethod(heads.Conv(), loss), 2, criterion=criterion)
        learner.build(batch(4, 1, 6, 6)[0])
        assert learner.local_modules[0].objective.ignored == 255


def test_more_classes_than_outputs_are_refused(quiet):
    x, target = batch(4, 1, 6, 6)
    method = methods.PredSim(parts="sim")
    with pytest.raises(ValueError, match="got the class index 7, and there are 3 classes"):
        fit(Net(), [(x, target.fill_(7))], method, quiet)


def test_several_labels_and_targets_of_many_dimensions():
    torch.manual_seed(0)
    z, target = torch.randn(3, 6), torch.rand(3, 4, 5)
    found = similarity_loss(z, target, 2)
    torch.testing.assert_close(found, similarity_loss(z, target.flatten(1), 2))
    learner = LocalLearner(Lit(Net()), methods.PredSim(parts="sim"), 2)
    learner.build(batch(4, 1, 6, 6)[0])
    objective = learner.local_modules[0].objective
    hidden, labels = torch.randn(4, 8, 6, 6), torch.randint(2, (4, 5))
    objective.check(None, labels, None)
    torch.testing.assert_close(
        objective(None, hidden, labels, None), objective(None, hidden, labels.float(), None)
    )


def test_a_language_model_under_infopro_without_reconstruction(quiet):
    net = nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    weights = {"lam_first": (0, 1), "lam_last": (0, 1)}
    method = methods.InfoPro(denormalize=([0.0], [1.0]), **weights)
    ids = torch.arange(20).view(5, 4) % 9
    learner = fit(net, [(ids, ids[:, 0] % 3)], method, quiet)
    assert learner.local_modules[0].objective.networks() == []


def test_data_in_the_precision_of_the_fit(quiet):
    """Double data are cut before Lightning makes the network double."""
    x, target = batch(4, 1, 6, 6)
    options = {**quiet, "precision": "64-true"}
    learner = fit(Net(), [(x.double(), target)], methods.SGR(), options)
    assert learner.network.fc.weight.dtype == torch.float64


@pytest.mark.parametrize("coupling", [None, couplings.BackwardLink(), "sgr"])
def test_augmented_heads_contrast(coupling, quiet):
    """The copied classifier gets as many outputs as the loss wants."""
    if coupling == "sgr":
        coupling = couplings.GradientReconciliation()
    loss = losses.InfoPro(([0.0], [1.0]), task="contrast")
    method = LocalMethod(heads.Augmented(1), loss, coupling)
    learner = fit(Net(), [batch(6, 1, 6, 6)], method, quiet, "units")
    head = learner.local_modules[0].head
    assert head(torch.randn(2, 8, 6, 6)).shape == (2, 128)
    assert learner.network.fc.out_features == CLASSES
