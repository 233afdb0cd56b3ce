"""When one process of a parallel run fails, is killed or is asked to stop, all of them end."""

import os
import signal
import time
from datetime import timedelta

import fleet
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from simple import Lit, data
from test_resume import Stateful

from lightning_local import LocalLearner, LocalParallelStrategy, alarm

pytestmark = [
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


# Place, what is done, rank: rank 0 is the last of three stages, rank 2 the first.
RAISES = {
    "forward of a middle stage": ("forward", 1),
    "validation_step": ("validation_step", 0),
    "the dataset": ("getitem", 2),
    "configure_optimizers": ("configure_optimizers", 1),
    "setup": ("setup", 2),
    "the epoch's end": ("on_train_epoch_end", 1),
}


@pytest.mark.parametrize("case", RAISES)
def test_an_exception_ends_all_with_its_traceback(case):
    place, rank = RAISES[case]
    after = 0 if "setup" in place or "configure" in place else 2
    ended = fail(3, {rank: (place, "raise", after)})
    for log in texts(ended, rank, 2 - rank):
        assert f"ValueError: {TEXT}" in log
        assert ", in act" in log  # the line that raised


@pytest.mark.parametrize(("place", "rank"), [("on_save_checkpoint", 1), ("module's on_save", 0)])
def test_an_exception_while_saving_leaves_no_file(place, rank, tmp_path):
    place = "module's on_save_checkpoint" if rank == 0 else place
    saving = ModelCheckpoint(tmp_path, save_top_k=-1)
    faults = {rank: (place, "raise", 2)}
    ended = fail(3, faults, callbacks=[saving], enable_checkpointing=True)
    for log in texts(ended, rank, 2 - rank):
        assert TEXT in log
    assert list(tmp_path.iterdir()) == []


def test_an_exception_after_the_fit_ends_only_that_process():
    ended = fail(3, {1: ("on_fit_end", "raise", 2)}, max_epochs=1)
    assert all(code != 0 for code in ended.codes)  # the others miss it at the fleet's barrier
    assert f"ValueError: {TEXT}" in ended.logs[1]
    assert ended.after < PROMISED


def test_nothing_is_saved_on_an_exception_and_it_says_why(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=1000)
    faults = {1: ("forward", "raise", 3)}
    ended = fail(3, faults, callbacks=[saving], enable_checkpointing=True)
    for log in texts(ended, 1, 1):
        assert TEXT in log
    assert "after a failure the stages are at different batches" in ended.logs[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["last", "last-{step}"])
def test_an_exception_leaves_the_last_file_as_it_was(name, tmp_path):
    saving = ModelCheckpoint(
        tmp_path,
        "{step}",
        save_on_exception=True,
        save_top_k=-1,
        save_last="link" if name == "last" else True,
    )
    saving.CHECKPOINT_NAME_LAST = name
    faults = {1: ("on_train_batch_end", "raise", 5)}
    fail(3, faults, callbacks=[saving], enable_checkpointing=True)
    # Epochs of 3 batches: the first one was saved.
    (last,) = tmp_path.glob("last*")
    assert torch.load(last, weights_only=False)["global_step"] == 3


def test_a_batch_that_cannot_be_sent():
    ended = fail(3, {}, kind="unpicklable")
    assert all(code != 0 for code in ended.codes)
    for log in ended.logs:
        assert "TypeError: A batch has to reach other processes" in log
        assert "tage 0 of 3 (rank 2)" in log


def test_a_loss_that_is_not_finite():
    ended = fail(3, {1: ("nan", None, 2)})
    assert all(code != 0 for code in ended.codes)
    for log in ended.logs:
        assert "FloatingPointError: The loss of local module 2 of 4 was NaN" in log
        assert "in batch 1 (counted from 0)" in log


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log:UserWarning")
def test_two_replicas():
    ended = fail(4, {3: ("forward", "raise", 2)}, num_stages=2, data_parallel=2)
    assert all(code != 0 for code in ended.codes)
    assert ended.after < PROMISED
    where = "tage 0 of 2, replica 1 of 2 (rank 3)"
    assert f"This was s{where}" in ended.logs[3]
    assert f"S{where} failed" in ended.logs[1]
    # Those of the other replica may know of it at second hand.
    assert all(TEXT in log or "tage " in log for log in ended.logs)


@pytest.mark.parametrize("place", ["forward", "on_train_epoch_end"])
def test_a_hung_peer(place):
    options = {"strategy": {"timeout": timedelta(seconds=1)}, "grace": 1.0}
    ended = fail(3, {1: (place, "sleep", 3)}, **options)
    assert all(code != 0 for code in ended.codes)
    assert ended.after < PROMISED
    others = ended.logs[0] + ended.logs[2]
    assert "TimeoutError: Waited 1 s for" in others
    assert "stage 1 of 3 (rank 1)" in others
    assert "LocalParallelStrategy(timeout=...)" in others


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_process_in_training(rank, tmp_path):
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    faults = {rank: ("on_train_batch_end", signal.SIGKILL, 25)}
    options = {"kind": "stateful", "max_epochs": 3}
    ended = fail(3, faults, callbacks=[saving], enable_checkpointing=True, **options)
    assert ended.after < PROMISED
    assert ended.codes[rank] == -signal.SIGKILL
    assert all(code != 0 for code in ended.codes)
    others = [log for r, log in enumerate(ended.logs) if r != rank]
    assert any(f"tage {2 - rank} of 3 (rank {rank})" in log for log in others)
    whole = train(0, 1, **options)
    files = sorted(tmp_path.iterdir())
    assert 1 <= len(files) <= 2  # the checkpoint of the second epoch may just not be there yet
    resumed = train(0, 1, ckpt_path=files[-1], **options)
    assert fleet.differences(whole, resumed) == []


@pytest.mark.parametrize("rank", [1])
def test_a_killed_process_in_validation(rank):
    ended = fail(3, {rank: ("on_validation_batch_end", signal.SIGKILL, 2)})
    assert ended.after < PROMISED
    assert all(code != 0 for code in ended.codes)
    others = [log for r, log in enumerate(ended.logs) if r != rank]
    assert any(f"tage {2 - rank} of 3 (rank {rank})" in log for log in others)


def test_a_killed_process_while_another_one_is_busy():
    def kill(started, folder):
        end = time.time() + 30
        log = folder / "log0"
        while time.time() < end and not (log.exists() and "moment" in log.read_text()):
            time.sleep(0.05)
        os.kill(started[1].pid, signal.SIGKILL)

    faults = {0: ("validation_step", "sleep", 2)}
    ended = fail(3, faults, during=kill, seconds=PROMISED, grace=2.0)
    assert all(code != 0 for code in ended.codes)


# Which ranks get the signal, after how many of their batches (10 an epoch).
STOPS = {"the last": [0], "a middle one": [1], "all": [0, 1, 2]}


@pytest.mark.parametrize("who", STOPS)
def test_sigterm_saves_what_resumes(who, tmp_path):
    if who == "a middle one":
        saving = OnExceptionCheckpoint(tmp_path)
    else:
        saving = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=1000)
    faults = {rank: ("on_train_batch_end", signal.SIGTERM, 12) for rank in STOPS[who]}
    options = {"kind": "stateful", "max_epochs": 3}
    ended = fail(3, faults, callbacks=[saving], enable_checkpointing=True, sleep=0.02, **options)
    assert ended.after < PROMISED
    assert all("SIGTERMException" in log for log in ended.logs)
    (file,) = tmp_path.iterdir()
    steps = torch.load(file, weights_only=False)["global_step"]
    assert 12 <= steps < 20
    whole = train(0, 1, **options)
    assert fleet.differences(whole, train(0, 1, ckpt_path=file, **options)) == []


class Late(L.Callback):
    """Fails in the batch in which a stop became known."""

    def on_before_zero_grad(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.received_sigterm:
            raise ValueError(TEXT)


def test_an_exception_after_sigterm(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_epochs=1000)
    faults = {2: ("on_train_batch_end", signal.SIGTERM, 2)}
    options = {"callbacks": [Late(), saving], "enable_checkpointing": True, "seconds": PROMISED}
    ended = fail(3, faults, kind="stateful", sleep=0.02, **options)
    assert ended.codes[1] != 0
    assert TEXT in ended.logs[1]
    assert list(tmp_path.iterdir()) == []


def test_a_keyboard_interrupt_in_one_process():
    ended = fail(3, {1: ("on_train_batch_end", "interrupt", 2)})
    for log in texts(ended, 1, 1):
        assert "KeyboardInterrupt" in log


def test_ctrl_c_in_all():
    faults = {rank: ("on_train_batch_end", signal.SIGINT, 3) for rank in range(3)}
    ended = fail(3, faults, sleep=0.02)
    assert ended.after < PROMISED
    assert all(code != 0 for code in ended.codes)
    assert any("KeyboardInterrupt" in log for log in ended.logs)


@pytest.mark.parametrize("options", [{"num_stages": 3}, {"num_stages": 2, "data_parallel": 2}])
def test_a_wrong_product_is_told_when_the_trainer_is_made(options):
    with pytest.raises(ValueError, match="make the products equal"):
        L.Trainer(**{**fleet.QUIET, "devices": 2, "strategy": LocalParallelStrategy(**options)})
