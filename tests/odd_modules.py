"""Modules, loaders and callbacks that do what projects do, for runs on several stages."""

import lightning as L
import torch
import torchmetrics
from simple import CLASSES, Lit
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader


class Refills:
    """Every batch is in the memory of the one before."""

    def __init__(self):
        self.x, self.y = torch.empty(8, 1, 6, 6), torch.empty(8, 400)

    def __len__(self):
        return 8

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(8):
            self.x.normal_(generator=generator)
            self.y.normal_(generator=generator)
            yield self.x, self.y


class Regression(Lit):
    def __init__(self):
        super().__init__(Layers([nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 8)], 400))

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/mean", self(batch[0]).mean())


class Layers(nn.Module):
    def __init__(self, layers, classes=CLASSES):
        super().__init__()
        self.layers, self.fc = nn.ModuleList(layers), nn.Linear(8, classes)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.fc(x)


class Edits(Lit):
    """Steps change their batch, after and before they call the network."""

    def training_step(self, batch, batch_idx):
        batch[1][::2] = -100
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        y = batch.pop().add_(1).remainder_(CLASSES)
        self.log("val/loss", functional.cross_entropy(self(batch[0]), y))


class Query(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return self.query.expand(x.shape[0], -1, -1)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.out = nn.Linear(36, 8), nn.Linear(8, 8)

    def forward(self, hidden, x):
        return hidden + self.out(hidden + self.key(x)[:, None]).relu()


class Queries(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.blocks = Query(), nn.ModuleList([Reads() for _ in range(3)])
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        hidden = self.query(x)
        for block in self.blocks:
            hidden = block(hidden, x)
        return self.fc(hidden.mean(1))


class Lazy(nn.Linear):
    """Makes a table in its first forward."""

    def __init__(self, width, value):
        super().__init__(width, 8)
        self.value = value
        self.register_buffer("table", None)

    def forward(self, x):
        if self.table is None:
            self.table = torch.full((x.shape[1],), self.value)
        return super().forward(x + self.table)


class Bank(nn.Linear):
    """Remembers what it has seen."""

    def __init__(self, width):
        super().__init__(width, 8)
        self.register_buffer("bank", torch.zeros(0, 8), persistent=False)

    def forward(self, x):
        x = super().forward(x)
        if self.training:
            self.bank = torch.cat([self.bank, x.detach()])[-30:]
        return x - self.bank.sum(0) / 30


class Odd(nn.Linear):
    """Has a sparse buffer, and one with the same number everywhere."""

    def __init__(self, width):
        super().__init__(width, 8)
        self.register_buffer("sparse", torch.eye(8).to_sparse())
        self.register_buffer("wide", torch.ones(1, 1).expand(1, 8))

    def forward(self, x):
        return torch.sparse.mm(self.sparse, super().forward(x).T).T * self.wide


class Stops(Lit):
    def __init__(self, where="on_validation_epoch_end"):
        super().__init__()
        self.where = where

    def _stop(self, where):
        if self.where == where and self.current_epoch == 1 and not self.trainer.sanity_checking:
            self.trainer.should_stop = True

    def training_step(self, batch, batch_idx):
        self._stop("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        self._stop("on_train_batch_end")

    def on_validation_epoch_end(self):
        self._stop("on_validation_epoch_end")

    def on_train_epoch_end(self):
        self._stop("on_train_epoch_end")


class StopsLater(Stops):
    def __init__(self):
        super().__init__("on_train_epoch_end")


class Unregistered(Lit):
    """Metrics that are no submodules."""

    def __init__(self):
        super().__init__()
        self.metrics = {"a": torchmetrics.classification.MulticlassAccuracy(CLASSES)}

    def on_validation_epoch_start(self):
        self.metrics["b"] = torchmetrics.classification.MulticlassAccuracy(CLASSES)

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        for metric in self.metrics.values():
            metric.update(out, batch[1])

    def on_validation_epoch_end(self):
        for name, metric in self.metrics.items():
            self.log(f"val/{name}", metric.compute(), sync_dist=True)
            metric.reset()


class Fewer(DataLoader):
    """Yields less than it says."""

    def __iter__(self):
        yield from list(super().__iter__())[:-1]


class History(L.Callback):
    """Reads metrics where Lightning's own callbacks do, and exports at the end."""

    def __init__(self):
        self.rows, self.weights = [], {}

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows.append(float(trainer.callback_metrics["train/loss_epoch"]))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.rows.append(float(trainer.callback_metrics["val/loss"]))

    def on_train_end(self, trainer, pl_module):
        state = pl_module.module.state_dict()
        self.weights = {name: tensor.clone() for name, tensor in state.items()}


class Meter(nn.Module):
    """A running mean, without parameters."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


class Metered(nn.Module):
    """Uses one such layer everywhere."""

    def __init__(self):
        super().__init__()
        self.meter, self.layers = Meter(), nn.ModuleList([nn.Linear(w, 8) for w in (36, 8, 8)])
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers:
            x = self.meter(layer(x)).relu()
        return self.fc(x)


class Scaled(Metered):
    """Changes a buffer early, and reads it later."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        x = x.flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 0 and self.training:
                self.scale.mul_(0.9).add_(x.detach().abs().mean() / 10)
            x = (x / self.scale).relu()
        return self.fc(x)
