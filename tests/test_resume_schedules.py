"""Schedulers that wait for a metric go on, after a resume, as in the uninterrupted run."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from simple import Lit, data
from test_resume import Stateful
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_local import LocalLearner

# Lightning notes that the callback which saved the file is not there.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


class Falls(Lit):
    """A metric that always gets better, so that no rate falls unless a stale value is used."""

    falls = True
    monitor = "v"

    def training_step(self, batch, batch_idx):
        self.log("t", self.value(), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("v", self.value())

    def value(self):
        return 0.1 / (1 + self.current_epoch) if self.falls else 1.0

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": self.monitor}


class Rates(L.Callback):
    def __init__(self):
        self.rates = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]


def rates(kind, quiet, path=None, callbacks=(), loader=None, **given):
    L.seed_everything(3, verbose=False)
    seen = Rates()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {**quiet, "enable_checkpointing": saves, "callbacks": [seen, *callbacks], **given}
    trainer = L.Trainer(max_epochs=4, **options)
    module = LocalLearner(kind(), "Greedy")
    trainer.fit(module, loader or data(), data(False), ckpt_path=path)
    return seen.rates


@pytest.mark.parametrize("falls", [True, False])
@pytest.mark.parametrize("monitor", ["v", "t"])
@pytest.mark.parametrize(
    "saves",
    [{}, {"save_on_train_epoch_end": False}, {"every_n_train_steps": 3}],
    ids=["epoch", "validation", "last batch"],
)
def test_at_an_epochs_end(saves, monitor, falls, tmp_path, quiet):
    kind = type("Kind", (Falls,), {"falls": falls, "monitor": monitor})
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **saves)
    whole = rates(kind, quiet, callbacks=[saving])
    assert len(set(whole.values())) == (1 if falls else 3)
    exact = not saves or (monitor == "v" and "every_n_train_steps" not in saves)
    for step in (3, 6):
        resumed = rates(kind, quiet, tmp_path / f"step={step}.ckpt")
        assert min(resumed) == step
        late = {s: r for s, r in whole.items() if s >= step}
        # A file that is older than the metric can't know it: the step is left out, as in plain
        # Lightning, and never made with another value.
        assert resumed == late if exact or falls else max(resumed.values()) <= 0.05


@pytest.mark.parametrize("step", [4, 8])
def test_in_an_epoch(step, tmp_path, quiet):
    kind = type("Kind", (Falls,), {"falls": False})
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    whole = rates(kind, quiet, callbacks=[saving], loader=Stateful())
    resumed = rates(kind, quiet, tmp_path / f"step={step}.ckpt", loader=Stateful())
    assert resumed == {s: r for s, r in whole.items() if s >= step}
    assert len(set(whole.values())) == 3


@pytest.mark.parametrize("known", [True, False])
def test_behind_an_epochs_last_validation(known, tmp_path, quiet):
    """The metric was logged before the file was written; one that has none keeps the rate."""
    kind = type("Kind", (Falls,), {"falls": False})
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    given = {"val_check_interval": 2}
    whole = rates(kind, quiet, callbacks=[saving], loader=Stateful(), **given)
    path = tmp_path / "step=9.ckpt"
    if not known:
        file = torch.load(path, weights_only=True)
        del file["lightning_local"]["monitored"]
        torch.save(file, path)
        with pytest.warns(RuntimeWarning, match="'v', which was not logged.*rate stays"):
            rates(kind, quiet, path, loader=Stateful(), **given)
        return
    resumed = rates(kind, quiet, path, loader=Stateful(), **given)
    assert resumed == {s: r for s, r in whole.items() if s >= 9}
    assert len(set(resumed.values())) == 3


def test_an_empty_epoch_has_no_local_metrics(tmp_path, quiet):
    """The rest of an epoch after its validation: means over nothing would stop a run."""
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    rates(Falls, quiet, callbacks=[saving])
    stop = EarlyStopping("local/00/loss_epoch", patience=9, strict=False)
    resumed = rates(Falls, quiet, tmp_path / "step=3.ckpt", callbacks=[stop])
    assert set(resumed) == set(range(3, 12))
