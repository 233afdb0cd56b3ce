"""Learners on tiny networks, and the bytes that are alive while they fit."""

import lightning as L
import torch
from networks import ResNet
from settings import batches, make
from torch.utils.data import DataLoader

from lightning_local import LocalLearner
from lightning_local.meter import LiveBytes, existing

SAMPLES = 32


def learner_of(network=ResNet, method="Greedy", partition="units", **options):
    L.seed_everything(0, verbose=False)
    return LocalLearner(make(network, torch.float32), method, partition, **options)


def batch_of(network=ResNet, samples=SAMPLES):
    (x, y), *_ = batches(network, dtype=torch.float32)
    repeats = -(-samples // len(x))
    return torch.cat([x] * repeats)[:samples].clone(), torch.cat([y] * repeats)[:samples].clone()


class Peak(L.Callback):
    """Live bytes in the second batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            self.live = LiveBytes(existing(module, trainer.optimizers, batch))
            self.live.__enter__()

    def on_train_batch_end(self, trainer, module, *args):
        if args[-1] == 1:
            self.live.__exit__(None, None, None)


def measured(learner, batch, quiet, **options):
    peak = Peak()
    trainer = L.Trainer(**quiet, max_epochs=1, callbacks=[peak], **options)
    trainer.fit(learner, DataLoader([batch] * 2, batch_size=None))
    return peak.live.peak
