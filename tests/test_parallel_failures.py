"""When one process of a parallel run raises an error, all of them end and say whose it was."""

import pytest
import torch
from faults import MARKS, PROMISED, TEXT, fail, texts
from lightning.pytorch.callbacks import ModelCheckpoint

pytestmark = MARKS

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
