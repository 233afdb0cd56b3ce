"""Lightning's features on several stages: what one process does, in all processes."""

import csv
from datetime import timedelta
from functools import partial

import lightning as L
import pytest
import torch
from fleet import QUIET, Place, differences, single, together, trainer
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.loggers import CSVLogger
from parallel_modules import Endless, stream
from parallel_runs import Reading, Whole, left, start
from simple import METHODS, data

from lightning_local import LocalLearner, LocalParallelStrategy, LocalSummary

# Each gives back what is equal everywhere; under "writer" what rank 0 has.


def checkpoints(make, folder):
    folders = [folder / name for name in ("best", "steps", "time")]
    saving = [
        pl_callbacks.ModelCheckpoint(
            folders[0], "{epoch}-{step}", monitor="val/loss", save_top_k=2, save_last=True
        ),
        pl_callbacks.ModelCheckpoint(
            folders[1], "{step}", monitor="train/loss", save_top_k=2, every_n_train_steps=2
        ),
        pl_callbacks.ModelCheckpoint(
            folders[2], "{step}", save_top_k=-1, train_time_interval=timedelta(0)
        ),
    ]
    run = start(make, enable_checkpointing=True, callbacks=saving, max_epochs=3)
    scores = [
        (str(s.best_model_path).rpartition("/")[2], s.best_model_score, s.current_score)
        for s in saving
    ]
    files = sorted(path for inside in folders for path in inside.iterdir())
    states = {
        str(path.relative_to(folder)): dict(torch.load(path, weights_only=True)["state_dict"])
        for path in files
    }
    return left(run, scores=scores, files=states)


def early_stopping(make, folder):
    stop = pl_callbacks.EarlyStopping("val/loss", patience=1, mode="max")
    run = start(make, callbacks=[stop], max_epochs=9)
    assert 0 < stop.stopped_epoch < 8
    return left(run, stopped=stop.stopped_epoch, score=stop.best_score)


def early_stopping_by_step(make, folder):
    stop = pl_callbacks.EarlyStopping(
        "train/loss_epoch", patience=0, mode="max", check_on_train_epoch_end=True
    )
    run = start(make, callbacks=[stop], max_epochs=9)
    assert stop.stopped_epoch > 0
    return left(run, stopped=stop.stopped_epoch)


def logger(make, folder):
    rates = pl_callbacks.LearningRateMonitor()
    run = start(make, method="SGR", logger=CSVLogger(folder), callbacks=[rates])
    if not run.is_global_zero:
        return left(run)
    with open(f"{run.logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(row["local/00/loss"] for row in rows)
    return left(run, writer=rows)


def summary(make, folder):
    added = LocalSummary(head_accuracy=True, memory=True)
    run = start(make, callbacks=[added])
    assert len(added.peaks) == 4
    assert all(peak > 0 for peak in added.peaks)
    assert "local/00/val_accuracy" in run.callback_metrics
    return left(run, accuracies=added.accuracies)


def max_steps(make, folder):
    return left(start(make, max_epochs=-1, max_steps=5))


def fast_dev_run(make, folder):
    return left(start(make, fast_dev_run=True))


def val_check_interval(make, folder):
    return left(start(make, val_check_interval=2))


def val_check_across_epochs(make, folder):
    return left(start(make, val_check_interval=4, check_val_every_n_epoch=None, max_epochs=3))


def overfit(make, folder):
    return left(start(make, train=partial(data, False), overfit_batches=1))


def evaluation(make, folder):
    run = start(make)
    learner, val = run.lightning_module, data(shuffle=False)
    path = folder / "a.ckpt"
    run.save_checkpoint(path)
    found = {
        "validate": run.validate(learner, val, verbose=False),
        "test": run.test(learner, val, verbose=False),
        "predict": run.predict(learner, val),
    }
    L.seed_everything(11, verbose=False)
    fresh = LocalLearner(Whole(), METHODS["Greedy"]())
    again = make()
    found |= {
        "validate file": again.validate(fresh, val, ckpt_path=path, verbose=False),
        "test file": again.test(fresh, val, ckpt_path=path, verbose=False),
        "predict file": again.predict(fresh, val, ckpt_path=path),
    }
    assert len(found["predict"]) == 3
    return left(run, writer=found) if run.is_global_zero else left(run)


def fit_twice(make, folder):
    run = start(make)
    run.fit_loop.max_epochs = 3
    run.fit(run.lightning_module, data(), data(shuffle=False))
    again = make(max_epochs=1)
    again.fit(run.lightning_module, data(), data(shuffle=False))
    return left(again)


def send_input(make, folder):
    return left(start(make, Reading, strategy={"send_input": True}))


class Augmenting(Whole):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if not self.trainer.training:
            return batch
        self.seen.append("augmented")
        return x + 0.1 * torch.randn_like(x), y


def augmenting(make, folder):
    run = start(make, Augmenting)
    strategy = run.strategy
    first = not isinstance(strategy, LocalParallelStrategy) or strategy.global_rank == 1
    # Once more for the example that the network is cut with.
    assert len(run.lightning_module.module.seen) == (7 if first else 0)
    return left(run)


ALL = (
    checkpoints, early_stopping, early_stopping_by_step, logger, summary, max_steps, fast_dev_run,
    val_check_interval, val_check_across_epochs, overfit, evaluation, fit_twice, send_input,
    augmenting,
)  # fmt: skip
FEATURES = {function.__name__: function for function in ALL}


def in_fleet(rank, size, folder, options):
    make = partial(trainer, rank, size, QUIET, **options)
    found = {}
    for name, function in FEATURES.items():
        inside = folder / name
        inside.mkdir(exist_ok=True)
        try:
            found[name] = function(make, inside)
        except AssertionError as error:
            found[name] = error
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(2, in_fleet, 2, tmp_path_factory.mktemp("two"), {})


@pytest.mark.parametrize("name", FEATURES)
def test_as_in_one_process(name, two, tmp_path):
    wanted = FEATURES[name](single, tmp_path)
    for rank, found in enumerate(two):
        if isinstance(found[name], AssertionError):
            raise found[name]
        assert ("writer" in found[name]) == ("writer" in wanted and rank == 0)
        wrong = differences({k: wanted[k] for k in found[name]}, found[name])
        assert not wrong, f"rank {rank}\n" + "\n".join(wrong[:20])


class Skipping(Whole):
    """Leaves each epoch out from its second batch on, where the data are read."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 1 else None


class SkippingStream(Skipping, Endless):
    pass


def skip(make, module, train=None):
    run = start(make, module, train=train)
    assert run.global_step == 2
    return left(run)


def skip_in_fleet(rank, size, *args):
    return skip(partial(trainer, rank, size, QUIET), *args)


@pytest.mark.parametrize(("case", "size"), [((Skipping, None), 3), ((SkippingStream, stream), 2)])
def test_the_first_stage_leaves_out_the_rest_of_an_epoch(case, size):
    """Asked before each batch, where the data are read."""
    wanted = skip(single, *case)
    for rank, found in enumerate(together(size, skip_in_fleet, size, *case, seconds=30)):
        wrong = differences(wanted, found)
        assert not wrong, f"rank {rank}\n" + "\n".join(wrong[:20])


def test_the_strategy_has_a_name():
    made = L.Trainer(**{**QUIET, "strategy": "local_parallel"}).strategy
    assert isinstance(made, LocalParallelStrategy)
    assert Place(0, 1).creates_processes_externally
