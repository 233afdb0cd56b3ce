"""Modules and loaders of many kinds, for runs on several stages and in replicas."""

import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from simple import CLASSES, Lit, data
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset


class Named(Lit):
    """Dicts with names and weights of the samples."""

    def loss(self, batch):
        assert all(name.startswith("sample") for name in batch["names"])
        losses = functional.cross_entropy(self(batch["x"]), batch["y"], reduction="none")
        return (losses * batch["weight"]).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, on_epoch=True, batch_size=len(batch["y"]))
        return {"loss": loss, "names": batch["names"]}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), batch_size=len(batch["y"]))


class Names(Dataset):
    def __init__(self):
        self.tensors = data().dataset.tensors

    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = self.tensors[0][i], self.tensors[1][i]
        # Long ones, so that a header does not fit into the first part of a message.
        return {"x": x, "y": y, "names": f"sample {i} " * 200, "weight": torch.tensor(i / 40)}


def named(shuffle=True):
    return DataLoader(Names(), 16, shuffle=shuffle)


class Endless(Lit):
    """Does not know how many batches there are."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Stream(IterableDataset):
    """Batches without a length; each draws from the process's generators."""

    def __init__(self, batches, noise=0.1):
        self.batches = batches
        self.noise = noise

    def __iter__(self):
        x, y = data().dataset.tensors
        for i in range(self.batches):
            rows = slice(16 * i, 16 * (i + 1))
            noise = torch.randn(x[rows].shape) + float(np.random.rand())
            yield x[rows] + self.noise * noise, y[rows]


def stream(batches=3, **options):
    return DataLoader(Stream(batches, **options), batch_size=None)


class SeveralVal(Lit):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log(f"val/loss{dataloader_idx}", functional.cross_entropy(self(x), y))


def several_val():
    return [data(shuffle=False), stream(2, noise=0), data(shuffle=False, n=10, size=4)]


class Joined(Lit):
    """Batches of two loaders, joined."""

    def __init__(self):
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def training_step(self, batch, batch_idx):
        x, y = join(batch)
        loss = functional.cross_entropy(self(x), y)
        self.log("train/loss", loss, on_epoch=True, batch_size=len(y))
        return loss


class JoinedEndless(Joined, Endless):
    pass


def join(batch):
    return tuple(torch.cat([batch["a"][i], batch["b"][i]]) for i in range(2))


def combined():
    return CombinedLoader({"a": data(n=40, size=8), "b": data(n=10, size=4)}, "max_size_cycle")


def two_streams():
    return CombinedLoader({"a": stream(3), "b": stream(2)}, "min_size")


class Augmented(Lit):
    """Augments where the data are read."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if self.trainer.training:
            x = x + 0.1 * torch.randn_like(x)
            self.seen.append(float(x.sum()))
        return x, y


class Noise(Dataset):
    """Draws in the workers."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        x = torch.randn(1, 6, 6) + float(np.random.rand())
        return x, i % CLASSES


def in_workers():
    # A process of the fleet would start a server of its own for them.
    return DataLoader(Noise(), 8, num_workers=1, shuffle=True, multiprocessing_context="fork")


def share():
    """Of each batch of 16 this process's share."""
    inside = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), 2) if inside else (0, 1)
    tensors = data(n=32).dataset.tensors
    return DataLoader(TensorDataset(*(t[rank::size] for t in tensors)), 16 // size)


class Synced(Lit):
    """Logs means over the replicas."""

    def log(self, *args, **options):
        super().log(*args, **{"sync_dist": True, **options})


def synced(make):
    return lambda: Synced(make())
