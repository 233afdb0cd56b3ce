"""A fit of several processes that fails, hangs, is killed or stopped where a test says so."""

import os
import signal
import time

import fleet
import lightning as L
import pytest
import torch
from simple import Lit, data
from test_resume import Stateful

from lightning_local import LocalLearner, alarm

# `pytestmark` of the files that use this.
MARKS = [
    # Lightning notes that the callback which saved the file is not there.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # And that it looks for a file of OnExceptionCheckpoint; only on rank 0, where it would raise.
    pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=:UserWarning"),
]
TEXT = "broken on purpose"
# Seconds from a failure to the end of all processes.
PROMISED = 30
LONG = 100_000


def act(what):
    """What a fault does."""
    if what == "raise":
        raise ValueError(TEXT)
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "sleep":
        time.sleep(1000)
    if isinstance(what, signal.Signals):
        os.kill(os.getpid(), what)


class Fault(L.Callback):
    """Does something at one place in one process, once so many batches were started there."""

    def __init__(self, place=None, what=None, after=2, pause=0.0):
        self.place = place
        self.what = what
        self.after = after
        self.pause = pause
        self.batches = 0
        self.moment = None

    def at(self, place):
        if place == self.place and self.batches >= self.after and self.moment is None:
            self.moment = time.time()
            print(f"moment {self.moment:f}", flush=True)
            act(self.what)

    def setup(self, trainer, pl_module, stage):
        self.at("callback's setup")

    def on_sanity_check_end(self, *_):
        self.at("on_sanity_check_end")

    def on_train_batch_start(self, *_):
        self.batches += 1

    def on_train_batch_end(self, *_):
        time.sleep(self.pause)
        self.at("on_train_batch_end")

    def on_train_epoch_end(self, *_):
        self.at("on_train_epoch_end")

    def on_validation_start(self, *_):
        self.at("on_validation_start")

    def on_validation_batch_end(self, *_):
        self.at("on_validation_batch_end")

    def on_save_checkpoint(self, *_):
        self.at("on_save_checkpoint")

    def on_train_end(self, *_):
        self.at("on_train_end")

    def on_fit_end(self, *_):
        self.at("on_fit_end")


class Fragile(Lit):
    """Fails where a fault says so."""

    def __init__(self, fault):
        super().__init__()
        self.fault = (fault,)
        for layer in self.network.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                layer.register_forward_hook(self.change)

    def change(self, layer, args, output):
        fault = self.fault[0]
        fault.at("forward")
        spoilt = fault.place == "nan" and fault.batches >= fault.after
        return output * float("nan") if spoilt else None

    def setup(self, stage):
        self.fault[0].at("setup")

    def training_step(self, batch, batch_idx):
        self.fault[0].at("training_step")
        return super().training_step(batch[:2], batch_idx)

    def validation_step(self, batch, batch_idx):
        self.fault[0].at("validation_step")
        super().validation_step(batch, batch_idx)

    def configure_optimizers(self):
        self.fault[0].at("configure_optimizers")
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    def on_save_checkpoint(self, checkpoint):
        self.fault[0].at("module's on_save_checkpoint")


class Data(torch.utils.data.Dataset):
    """The usual data, where a fault may be."""

    def __init__(self, fault):
        self.fault = fault
        self.inner = data().dataset

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        self.fault.at("getitem")
        return self.inner[i]


class Locked(list):
    """A pair that can't be sent."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle 'Locked'")


def unpicklable(rows):
    x, y = torch.utils.data.default_collate(rows)
    return [x, y, Locked()]


def first_two(batch):
    return batch[0], batch[1]


def train(
    rank, size, faults=None, *, kind="plain", ckpt_path=None, sleep=0.0, grace=None, **options
):
    """A fit, with a fault (place, what, after how many batches) in some ranks."""
    if grace is not None:
        alarm._GRACE = grace
    place, what, after = (faults or {}).get(rank, (None, None, 0))
    fault = Fault(place, what, after, sleep)
    L.seed_everything(3, verbose=False)
    unpack = first_two if kind == "unpicklable" else None
    learner = LocalLearner(Fragile(fault), "Greedy", "units", unpack=unpack)
    if ckpt_path is not None:
        L.seed_everything(99, verbose=False)
    loader = Stateful(4)
    if kind != "stateful":
        collate = unpicklable if kind == "unpicklable" else None
        loader = torch.utils.data.DataLoader(Data(fault), 16, shuffle=True, collate_fn=collate)
    options = {"max_epochs": LONG, "log_every_n_steps": 1, **options}
    options["callbacks"] = [fault, *options.get("callbacks", [])]
    if size == 1:
        trainer = fleet.single(**options)
    else:
        trainer = fleet.trainer(rank, size, fleet.QUIET, **options)
    trainer.fit(learner, loader, data(shuffle=False), ckpt_path=ckpt_path)
    whole = {"weights": learner.module.state_dict(), "heads": learner.local_modules.state_dict()}
    return {**whole, "step": trainer.global_step, "epoch": trainer.current_epoch}


def _train(rank, size, faults, options):
    return train(rank, size, faults, **options)


class Ended(fleet.Ended):
    """How a failing run ended.

    Attributes:
        after: Seconds from the first fault to the end of all processes.
    """


def fail(size, faults, during=None, seconds=60, **options):
    """A fit that doesn't end well: all processes end soon, and nothing is left of them."""
    known, gone = [], []

    def watch(started, folder):
        known.extend(process.pid for process in started)
        if during is not None:
            during(started, folder)
        end = time.time() + seconds
        while any(process.is_alive() for process in started) and time.time() < end:
            time.sleep(0.02)
        gone.append(time.time())

    ended = fleet.launch(size, _train, size, faults, options, during=watch, seconds=seconds)
    lines = [line for log in ended.logs for line in log.splitlines() if line.startswith("moment ")]
    moments = [float(line.split()[1]) for line in lines]
    ended.after = gone[0] - min(moments) if moments else float("nan")
    for pid in known:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return ended


def texts(ended, failing, stage, stages=3):
    """The failing rank tells its error, the others that error and whose it was."""
    assert all(code != 0 for code in ended.codes), ended.logs
    assert ended.after < PROMISED
    where = f"tage {stage} of {stages} (rank {failing})"
    for rank, log in enumerate(ended.logs):
        assert (f"This was s{where}." if rank == failing else f"S{where} failed") in log
        yield log
