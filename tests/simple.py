"""A small network in a plain LightningModule, data for it, and a quiet fit."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_local import LocalLearner, methods

CLASSES = 4
# Name: makes the preset, with arguments that fit the small network.
METHODS = {
    "EndToEnd": methods.EndToEnd,
    "Greedy": methods.Greedy,
    "AugLocal": lambda: methods.AugLocal(depth=1),
    "BackLink": methods.BackLink,
    "SGR": methods.SGR,
    "DGL": methods.DGL,
    "PredSim": methods.PredSim,
    # The data are normal: nearly all of them lie within 5 standard deviations of the mean.
    "InfoPro": lambda: methods.InfoPro(denormalize=([0.5], [0.1])),
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return functional.relu(x + self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self, blocks=3, width=6):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = functional.dropout(self.stem(x), 0.1, self.training)
        return self.fc(self.blocks(x).mean((2, 3)))


class Lit(L.LightningModule):
    def __init__(self, network=None):
        super().__init__()
        self.network = network or Net()
        self.seen = []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y, label_smoothing=0.1)
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data(shuffle=True, n=40, size=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), size, shuffle=shuffle)


def fit(module, quiet, epochs=3, loader=None, **options):
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(max_epochs=epochs, **{**quiet, **options})
    trainer.fit(module, loader or data(), data(shuffle=False))
    return trainer


def greedy(module, **options):
    return LocalLearner(module, methods.Greedy(), **options)


def wrap(partition):
    return lambda module: LocalLearner(
        module,
        "EndToEnd" if partition == 1 else "Greedy",
        "units" if partition == 1 else partition,
    )


def run(make, quiet, module=Lit, epochs=2, callbacks=(), seed=3, loader=None, **options):
    L.seed_everything(seed, verbose=False)
    model = make(module())
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options})
    trainer.fit(model, loader or data(), data(shuffle=False))
    return trainer, model
