"""A fit of a module with all steps, and what it leaves that is equal in all processes."""

import lightning as L
import torchmetrics
from simple import CLASSES, METHODS, Lit, data
from torch.nn import functional

from lightning_local import LocalLearner


class Whole(Lit):
    """All steps, with metric objects."""

    def __init__(self, network=None):
        super().__init__(network)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.confusion = torchmetrics.classification.MulticlassConfusionMatrix(CLASSES)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.accuracy(out, y)
        self.confusion.update(out, y)
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", functional.cross_entropy(out, y), sync_dist=True)

    def on_validation_epoch_end(self):
        self.log("val/most", self.confusion.compute().max().float(), sync_dist=True)
        self.confusion.reset()

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/loss", functional.cross_entropy(self(x), y), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)


class Reading(Lit):
    """Reads the network's input besides calling the network."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + batch[0].mean() ** 2)


def start(make, module=Whole, method="Greedy", train=None, options=None, **given):
    L.seed_everything(3, verbose=False)
    learner = LocalLearner(module(), METHODS[method](), **(options or {}))
    L.seed_everything(4, verbose=False)
    run = make(**{"max_epochs": 2, "log_every_n_steps": 1, **given})
    run.fit(learner, train() if train else data(), data(shuffle=False))
    return run


def left(run, **more):
    """What is equal in all processes."""
    return {
        "network": dict(run.lightning_module.module.state_dict()),
        "metrics": dict(run.callback_metrics),
        "step": run.global_step,
        "epoch": run.current_epoch,
        **more,
    }
