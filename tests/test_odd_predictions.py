"""Predictions, targets and hidden states that look like something else."""

import lightning as L
import pytest
import torch
from simple import CLASSES, Lit, data, fit
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_local import EarlyExit, LocalLearner, methods
from lightning_local.metrics import LocalMetrics, countable, hits
from lightning_local.objectives import per_item

CPU = torch.device("cpu")


def test_maps_as_large_as_there_are_classes_are_maps():
    logits, target = torch.randn(2, 3, 3, 3), torch.randint(3, (2, 3, 3))
    assert per_item(logits, target, tokens=False)[0] is logits
    assert per_item(logits, target, tokens=True)[0].shape == (18, 3)
    other = torch.randn(2, 4, 5)
    assert per_item(other, torch.zeros(2, 4, dtype=torch.long), tokens=False)[0].shape == (8, 5)


class Maps(nn.Module):
    """As large as there are classes; its heads are as large."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(w, 3, 3, padding=1) for w in (1, 3, 3)])
        self.out = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(x)


class MapHead(methods.Greedy().head.__class__.__mro__[1]):
    def build(self, place):
        return nn.Conv2d(place.hidden.channels, 3, 1)


def test_heads_of_such_maps_learn_from_the_criterion_itself(quiet):
    seen = []

    def criterion(output, target):
        seen.append(output.shape)
        return functional.cross_entropy(output, target)

    loader = DataLoader(TensorDataset(torch.randn(8, 1, 3, 3), torch.randint(3, (8, 3, 3))), 4)
    method = methods.LocalMethod(head=MapHead())
    learner = LocalLearner(Lit(Maps()), method, out_features=3, criterion=criterion)
    trainer = L.Trainer(max_epochs=1, limit_val_batches=0, **quiet)
    learner.module.configure_optimizers = lambda: torch.optim.SGD(learner.module.parameters(), 0.1)
    trainer.fit(learner, loader, loader)
    assert set(seen) == {(4, 3, 3, 3)}


@pytest.mark.parametrize(
    ("shape", "target", "counts"),
    [((4, 1), (4,), False), ((4, 2), (4,), True), ((4, 3, 3), (4, 3), False)],
)
def test_what_has_no_clear_classes_has_no_accuracy(shape, target, counts):
    assert countable(torch.zeros(shape), torch.zeros(target, dtype=torch.long)) == counts


def test_any_ignored_index_is_left_out():
    logits, target = torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 0, 2])
    assert hits(logits[None], target, ignored=0).tolist() == [2]
    metrics = LocalMetrics(1, CPU, ignored=0)
    metrics.update(0, torch.tensor(1.0), logits, target)
    metrics.close_step(0)
    assert metrics.read()["local/00/accuracy"] == 1.0


def test_a_target_that_is_edited_counts_as_it_was():
    logits, target = torch.eye(3), torch.tensor([0, 1, 2])
    metrics = LocalMetrics(2, CPU)
    metrics.update(0, torch.tensor(1.0), logits, target)
    metrics.keep(target)
    target.fill_(-100)
    metrics.update(1, torch.tensor(1.0), logits, target)
    metrics.close_step(0)
    found = metrics.read()
    assert found["local/00/accuracy"] == found["local/01/accuracy"] == 1.0


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


def test_no_gradient_goes_back_where_a_layer_detaches(quiet):
    """The error is 0, so the layer before learns as under greedy."""
    states = []
    for method in (methods.Greedy(), methods.BackLink(head=methods.Greedy().head)):
        L.seed_everything(0, verbose=False)
        layers = [nn.Linear(36, 8), nn.ReLU(), Detached(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)]
        network = nn.Sequential(nn.Flatten(), *layers)
        fit(LocalLearner(Lit(network), method, ["2", "4"]), quiet)
        states.append(network[1].weight)
    assert torch.equal(*states)


class Query(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return self.query.expand(len(x), -1, -1)


class Queries(nn.Module):
    """Its first hidden state is a view of a weight."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.fc = Query(), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.key(self.query(x)).relu().mean(1))


def test_a_view_of_a_weight_goes_on_as_it_was_before_the_step(quiet):
    L.seed_everything(0, verbose=False)
    network, (x, y) = Queries(), next(iter(data(shuffle=False)))
    hidden = network.query.query.detach().expand(len(x), -1, -1)
    out = network.fc(network.key(hidden).relu().mean(1))
    functional.cross_entropy(out, y, label_smoothing=0.1).backward()
    expected = network.key.weight - network.key.weight.grad
    network.zero_grad()
    module = Lit(network)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1.0)
    learner = LocalLearner(module, "Greedy", ["query"])
    L.Trainer(max_steps=1, **quiet).fit(learner, data(shuffle=False), data(shuffle=False))
    torch.testing.assert_close(network.key.weight, expected)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm = nn.Linear(6, 18), nn.LayerNorm(6)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + torch.softmax(q @ k.transpose(1, 2) + mask, -1) @ v


class Masked(nn.Module):
    """A mask (T, T) goes along with the hidden state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(3)])
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x.squeeze(1)
        mask = torch.full((x.shape[1], x.shape[1]), -9.0).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.fc(x.mean(1))


class Predicts(Lit):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("size", [6, 7, 9])
def test_a_mask_stays_whole_when_as_many_samples_are_left(size, quiet):
    L.seed_everything(0, verbose=False)
    learner = LocalLearner(Predicts(Masked()), "Greedy")
    fit(learner, quiet, epochs=1)
    found = []
    for n in (size, 40):
        leave = EarlyExit(0.4, pictures=False)
        trainer = L.Trainer(callbacks=[leave], **quiet)
        found.append(torch.cat(trainer.predict(learner, data(shuffle=False, size=n))))
    assert 0 < sum(leave.counts[:-1]) < 40
    torch.testing.assert_close(*found)


class Behind(L.LightningModule):
    """A classifier follows a network that is as wide as there are classes."""

    def __init__(self):
        super().__init__()
        layers = [nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, CLASSES), nn.ReLU()]
        self.backbone, self.classifier = nn.Sequential(*layers), nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        return self.classifier(self.backbone(x))

    training_step, validation_step = Lit.training_step, Lit.validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("options", [{}, {"out_features": CLASSES}])
def test_features_are_no_prediction(options, quiet):
    learner = LocalLearner(Behind(), "Greedy", network="backbone", **options)
    trainer = fit(learner, quiet, epochs=1)
    last = f"local/{learner.num_modules - 1:02d}/accuracy_epoch"
    assert last not in trainer.callback_metrics
    trainer = L.Trainer(callbacks=[EarlyExit(0.9, pictures=False)], **quiet)
    with pytest.raises(ValueError, match="other layers make the prediction from its output"):
        trainer.predict(learner, data(shuffle=False))
