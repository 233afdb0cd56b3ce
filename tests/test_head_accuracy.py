"""Which local modules have an accuracy, and which accuracies say nothing."""

import copy
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from fleet import QUIET, differences, single, together, trainer
from lightning.pytorch.loggers import CSVLogger
from parallel_runs import left, start
from simple import CLASSES, Lit, Net, data, run
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_local import EarlyExit, LocalLearner, LocalSummary


class Features(Net):
    """No classifier of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Identity()


class Outside(Lit):
    """Its classifier is no part of the network that is cut."""

    def __init__(self):
        super().__init__(Features())
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(self.network(x))


class Beside(Lit):
    """Has parameters outside of the network, behind which nothing follows."""

    def __init__(self):
        super().__init__()
        self.teacher = Net().requires_grad_(False)


def cut(module, **options):
    return LocalLearner(module, "Greedy", network="network", out_features=CLASSES, **options)


def accuracies(metrics):
    """Names of the epoch's."""
    return {name for name in metrics if name.endswith(("accuracy_epoch", "val_accuracy"))}


def names(modules):
    kinds = ("accuracy_epoch", "val_accuracy")
    return {f"local/{k:02d}/{kind}" for k in modules for kind in kinds}


def test_features_have_no_accuracy(quiet, tmp_path, capsys):
    """Their largest one is no class, and a classifier outside of the network makes that of it."""
    summary = LocalSummary(head_accuracy=True)
    options = {**quiet, "logger": CSVLogger(tmp_path)}
    trainer, learner = run(cut, options, Outside, callbacks=[summary])
    assert not learner.modules_in_order()[-1].predicts
    assert accuracies(trainer.callback_metrics) == names(range(3))
    assert [a >= 0 for a in summary.accuracies] == [True, True, True, False]
    table = capsys.readouterr().out.partition("validation accuracy")[2]
    rows = [line.split()[-2] for line in table.splitlines() if line.startswith("│")]
    assert rows == [*(f"{100 * a:.2f}%" for a in summary.accuracies[:3]), "-"]
    # The others are drawn.
    assert {path.name for path in tmp_path.rglob("*.png")} == {
        "local_loss.png",
        "local_accuracy.png",
    }
    assert [row.isnan().tolist() for row in summary._curves["accuracy"]] == [
        [False] * 3 + [True]
    ] * 2


def test_what_stands_beside_the_network_leaves_its_accuracy(quiet):
    trainer, _ = run(cut, quiet, Beside, callbacks=[LocalSummary(head_accuracy=True)])
    assert accuracies(trainer.callback_metrics) == names(range(4))


def test_samples_leave_by_an_output_of_which_nobody_says_that_it_predicts(quiet):
    class Tested(Beside):
        def test_step(self, batch, batch_idx):
            self.log("test/loss", functional.cross_entropy(self(batch[0]), batch[1]))

    options = {"network": "network", "criterion": nn.CrossEntropyLoss(label_smoothing=0.1)}
    _, learner = run(lambda m: LocalLearner(m, "Greedy", **options), quiet, Tested, epochs=1)
    assert not learner.modules_in_order()[-1].predicts
    callback = EarlyExit(1)
    L.Trainer(**quiet, callbacks=[callback]).test(learner, data(shuffle=False))
    assert callback.counts == [0, 0, 0, 40]


def outside(make):
    """With what one process finds by its own way through the heads."""
    options = {"network": "network", "out_features": CLASSES}
    return left(start(make, Outside, options=options, callbacks=[LocalSummary(head_accuracy=True)]))


def outside_in_fleet(rank, size):
    return outside(partial(trainer, rank, size, QUIET))


def test_features_have_no_accuracy_on_several_stages():
    wanted = outside(single)
    assert accuracies(wanted["metrics"]) == names(range(3))
    for rank, found in enumerate(together(2, outside_in_fleet, 2)):
        wrong = differences(wanted, found)
        assert not wrong, f"rank {rank}\n" + "\n".join(wrong[:20])


class Regression(Lit):
    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", functional.mse_loss(self(batch[0]), batch[1]))


def test_regression_has_no_accuracies(quiet, tmp_path, capsys):
    x = torch.randn(16, 1, 6, 6)
    loader = DataLoader(TensorDataset(x, x.flatten(1)[:, :CLASSES]), 8)
    summary = LocalSummary(head_accuracy=True)
    options = {**quiet, "logger": CSVLogger(tmp_path), "max_epochs": 1, "callbacks": [summary]}
    trainer = L.Trainer(**options)
    trainer.fit(LocalLearner(Regression(), "Greedy", criterion=nn.MSELoss()), loader, loader)
    assert not accuracies(trainer.callback_metrics)
    assert summary.accuracies == []
    assert "accuracy" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.rglob("*.png")} == {"local_loss.png"}


class Steps(Lit):
    def test_step(self, batch, batch_idx):
        self.log("test/loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def evaluate(learner, call, quiet, path=None):
    """Texts of the warnings of a run in which everybody asks for heads."""
    callbacks = [LocalSummary(head_accuracy=True), EarlyExit(0.5)]
    trainer = L.Trainer(**quiet, callbacks=callbacks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(trainer, call)(learner, data(shuffle=False), ckpt_path=path)
    return [str(w.message) for w in caught if "have not been trained" in str(w.message)]


def fitted(quiet, path, make):
    trainer, learner = run(make, quiet, Steps, epochs=1)
    trainer.save_checkpoint(path)
    return learner


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_heads_that_were_never_trained_are_named_once(call, quiet, tmp_path):
    path = tmp_path / "plain.ckpt"
    fitted(quiet, path, lambda module: module)
    for given in (None, path):
        (text,) = evaluate(LocalLearner(Steps(), "Greedy"), call, quiet, given)
        assert "3 of the 3 heads" in text
        assert "call trainer.fit first, or pass ckpt_path" in text


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_trained_heads_are_not_warned_of(call, quiet, tmp_path):
    path = tmp_path / "a.ckpt"
    learner = fitted(quiet, path, lambda module: LocalLearner(module, "Greedy"))
    fresh, by_hand = (LocalLearner(Steps(), "Greedy") for _ in range(2))
    by_hand.build(torch.zeros(2, 1, 6, 6))
    by_hand.load_state_dict(learner.state_dict())
    for each in (learner, copy.deepcopy(learner), by_hand):
        assert not evaluate(each, call, quiet)
    for _ in range(2):  # the second time they are there
        assert not evaluate(fresh, call, quiet, path)
        path = None
