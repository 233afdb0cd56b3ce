"""LightningModules made of a few members, trained plain, as one module, and cut."""

from functools import partial

import lightning as L
import torch
from simple import Lit, data
from torch import optim
from torch.nn.functional import cross_entropy

from lightning_local import LocalLearner

X, Y = data().dataset.tensors
greedy = partial(LocalLearner, method="Greedy")


class Mine(Lit):
    def loss(self, batch):
        return cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        optimizer = optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, 0.9)
        return [optimizer], [optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def mine(**members):
    return type("User", (Mine,), members)


def note(what):
    return lambda self, *args: self.seen.append(what(self, *args) if callable(what) else what)


def fit(module, quiet, epochs=2, loader=data, checkpoint=None, **options):
    L.seed_everything(2, verbose=False)
    trainer = L.Trainer(max_epochs=epochs, **{**quiet, **options})
    trainer.fit(module, *((loader(), data(False)) if loader else ()), ckpt_path=checkpoint)
    return trainer


def runs(kind, quiet, wrap=greedy, only_one=False, **options):
    """(trainer, module) of the plain run, the equal one with one module, and the local one."""
    made = []
    for way in (lambda m: m, partial(LocalLearner, method="EndToEnd"), wrap)[: 3 - only_one]:
        L.seed_everything(1, verbose=False)
        module = kind()
        made.append((fit(way(module), quiet, **options), module))
    (trainer, plain), (other, one) = made[:2]
    assert plain.seen == one.seen
    metrics = [run.callback_metrics for run, _ in made]
    for a, b in ((plain.state_dict(), one.state_dict()), metrics[:2]):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert {n for n in metrics[-1] if not n.startswith("local/")} == set(metrics[0])
    assert {run.global_step for run, _ in made} == {trainer.global_step}
    return made
