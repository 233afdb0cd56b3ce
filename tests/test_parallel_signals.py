"""When a process of a parallel run hangs, is killed or is asked to stop, all of them end."""

import os
import signal
import time
from datetime import timedelta

import fleet
import lightning as L
import pytest
import torch
from faults import MARKS, PROMISED, TEXT, fail, texts, train
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

pytestmark = MARKS


@pytest.mark.parametrize("place", ["forward", "on_train_epoch_end"])
def test_a_hung_peer(place):
    # Long enough for what processes wait for on a busy machine.
    options = {"strategy": {"timeout": timedelta(seconds=3)}, "grace": 1.0}
    ended = fail(3, {1: (place, "sleep", 3)}, **options)
    assert all(code != 0 for code in ended.codes)
    assert ended.after < PROMISED
    others = ended.logs[0] + ended.logs[2]
    assert "TimeoutError: Waited 3 s for" in others
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
