"""A resumed run equals our uninterrupted one, bit for bit."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from simple import METHODS, Lit, data
from torch.optim import lr_scheduler as schedulers

from lightning_local import LocalLearner

# Lightning notes that the callback which saved the file is not there.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


class Scheduled(Lit):
    """Dropout in the network, noise in the step, and a schedule that waits for a metric."""

    kind = "plateau"

    def training_step(self, batch, batch_idx):
        self.seen.append((torch.rand(1), random.random(), np.random.rand()))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        if self.kind == "step":
            return [optimizer], [schedulers.StepLR(optimizer, 1, 0.5)]
        if self.kind == "onecycle":
            steps = self.trainer.estimated_stepping_batches  # makes the loaders
            scheduler = schedulers.OneCycleLR(optimizer, 0.04, steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        scheduler = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val/loss"}


def train(quiet, method, path=None, seed=3, kind="plateau", loader=None, **options):
    L.seed_everything(seed, verbose=False)
    module = Scheduled()
    module.kind = kind
    learner = LocalLearner(module, METHODS[method]())
    if path is not None:
        L.seed_everything(99, verbose=False)
    options = {"max_epochs": 3, **quiet, **options}
    if "epochs" in options:
        options["max_epochs"] = options.pop("epochs")
    trainer = L.Trainer(**options)
    trainer.fit(learner, loader or data(), data(shuffle=False), ckpt_path=path)
    return trainer, learner


def same(a, b):
    assert a[0].global_step == b[0].global_step
    rates = [[g["lr"] for o in t.optimizers for g in o.param_groups] for t in (a[0], b[0])]
    assert rates[0] == rates[1]
    assert max(rates[0]) < 0.05
    for name, tensor in a[1].state_dict().items():
        assert torch.equal(tensor, b[1].state_dict()[name]), name
    drawn = a[1].module.seen[-len(b[1].module.seen) :]
    assert drawn == b[1].module.seen
    assert len(drawn) > 0


@pytest.mark.parametrize("kind", ["plateau", "step"])
@pytest.mark.parametrize("method", METHODS)
def test_after_the_fit_with_shuffle_and_dropout(method, kind, tmp_path, quiet):
    whole = train(quiet, method, kind=kind)
    first = train(quiet, method, epochs=1, kind=kind)
    first[0].save_checkpoint(tmp_path / "a.ckpt")
    same(whole, train(quiet, method, tmp_path / "a.ckpt", kind=kind))


# When the file is written, and how the Trainer runs.
SAVES = {
    "after the epoch": ({}, {}),
    "after validation": ({"save_on_train_epoch_end": False}, {}),
    "every second validation": ({"every_n_epochs": 2}, {"check_val_every_n_epoch": 2}),
    "max_steps": ({}, {"max_steps": 12, "max_epochs": -1}),
}


@pytest.mark.parametrize("when", SAVES)
@pytest.mark.parametrize("method", ["EndToEnd", "BackLink"])
def test_from_a_file_of_an_epochs_end(when, method, tmp_path, quiet):
    saves, runs = SAVES[when]
    options = {**quiet, "enable_checkpointing": True, "max_epochs": 4, **runs}
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, **saves)
    # In an epoch without validation nothing that a plateau could wait for is logged.
    kind = "step" if "check_val_every_n_epoch" in runs else "plateau"
    whole = train(options, method, callbacks=[saving], kind=kind)
    files = sorted(tmp_path.iterdir())
    assert len(files) == (2 if "second" in when else 4)
    for file in files[:-1]:
        same(whole, train({**quiet, "max_epochs": 4, **runs}, method, file, kind=kind))


class Stateful:
    """A shuffling loader that can go on where it was; at an epoch's end with the next one."""

    def __init__(self, size=8):
        self.dataset = data().dataset
        self.size = size
        self.order, self.position, self.loaded = [], 0, False

    def __len__(self):
        return len(self.dataset) // self.size

    def __iter__(self):
        if not self.loaded or self.position == len(self):
            self.order, self.position = torch.randperm(len(self.dataset)).tolist(), 0
        self.loaded = False
        while self.position < len(self):
            rows = self.order[self.position * self.size : (self.position + 1) * self.size]
            self.position += 1
            yield tuple(t[rows] for t in self.dataset.tensors)

    def state_dict(self):
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state):
        self.order, self.position, self.loaded = state["order"], state["position"], True


@pytest.mark.parametrize("kind", ["step", "onecycle"])
@pytest.mark.parametrize("method", ["EndToEnd", "BackLink", "SGR"])
def test_in_an_epoch_with_a_stateful_loader(method, kind, tmp_path, quiet):
    options = {**quiet, "enable_checkpointing": True}
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    whole = train(options, method, callbacks=[saving], loader=Stateful(), kind=kind)
    assert len(Stateful()) == 5
    assert whole[0].global_step == 15
    for step in (2, 4, 6, 10, 12):  # an epoch has 5
        resumed = train(quiet, method, tmp_path / f"step={step}.ckpt", loader=Stateful(), kind=kind)
        assert len(resumed[1].module.seen) == 15 - step
        same(whole, resumed)


def half(init_scale=2.0**15, interval=4):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=interval)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("method", ["BackLink", "SGR"])
def test_the_scaler_of_every_module_comes_back(method, tmp_path, quiet):
    whole = train(quiet, method, plugins=[half()], kind="step")
    first = train(quiet, method, epochs=1, plugins=[half()], kind="step")
    first[0].save_checkpoint(tmp_path / "a.ckpt")
    resumed = train(quiet, method, tmp_path / "a.ckpt", plugins=[half()], kind="step")
    same(whole, resumed)
    states = [run[1].loop.scalers.save() for run in (whole, resumed)]
    assert len(states[0]) == 4
    assert states[0] == states[1]


def test_averaged_weights_come_back(tmp_path, quiet):
    whole = train(quiet, "Greedy", callbacks=[EMAWeightAveraging(decay=0.5)])
    options = {**quiet, "enable_checkpointing": True}
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    train(options, "Greedy", epochs=1, callbacks=[EMAWeightAveraging(decay=0.5), saving])
    resumed = train(
        quiet, "Greedy", tmp_path / "epoch=0.ckpt", callbacks=[EMAWeightAveraging(decay=0.5)]
    )
    same(whole, resumed)
