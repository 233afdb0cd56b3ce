"""Steps leave nothing behind; the long form is `benchmarks/soak`."""

import gc

import lightning as L
import pytest
import torch
from fleet import QUIET, together, trainer
from simple import METHODS, Lit, data

from lightning_local import LocalLearner, LocalSummary


class Count(L.Callback):
    """Live tensors and all objects that Python tracks, at the same place of several epochs."""

    def __init__(self, epochs):
        self.epochs = epochs
        self.tensors, self.objects = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch in self.epochs:
            gc.collect()
            found = gc.get_objects()
            self.objects.append(len(found))
            self.tensors.append(sum(issubclass(type(each), torch.Tensor) for each in found))


def counted(method, make):
    """Counts in three epochs of 3 steps each, once caches are filled."""
    count = Count((10, 18, 26))
    learner = LocalLearner(Lit(), METHODS[method]())
    callbacks = [count, LocalSummary(pictures=False)]
    make(max_epochs=27, log_every_n_steps=1, callbacks=callbacks).fit(
        learner, data(), data(shuffle=False)
    )
    return count.tensors, count.objects


@pytest.mark.parametrize("method", ["SGR"])
def test_tensors_and_objects_do_not_grow(method, quiet):
    tensors, objects = counted(method, lambda **options: L.Trainer(**quiet, **options))
    assert len(set(tensors)) == 1
    assert objects[2] - objects[1] < 20


def in_two(rank, method):
    return counted(method, lambda **options: trainer(rank, 2, QUIET, **options))


def test_nor_in_two_processes():
    for tensors, objects in together(2, in_two, "BackLink"):
        assert len(set(tensors)) == 1
        assert objects[2] - objects[1] < 20
