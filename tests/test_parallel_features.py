"""Lightning's features on several stages: what one process does, in all processes."""

import csv
from datetime import timedelta
from functools import partial

import lightning as L
import pytest
import torch
import torchmetrics
from fleet import QUIET, Place, differences, launch, single, together, trainer
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.loggers import CSVLogger
from simple import CLASSES, METHODS, Lit, data
from test_parallel import Classifier, Endless, Still, share, stream, synced
from torch.nn import functional

from lightning_local import LocalLearner, LocalParallelStrategy, LocalSummary, limits


class Whole(Lit):
    """All steps, with metric objects."""

    def __init__(self, network=None):
        super().__init__(network)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        self.confusion = torchmetrics.classification.MulticlassConfusionMatrix(CLASSES)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.accuracy(out, y)
        self.confusion.update(out, y)
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", functional.cross_entropy(out, y), sync_dist=True)

    def on_validation_epoch_end(self):
        self.log("val/most", self.confusion.compute().max().float(), sync_dist=True)
        self.confusion.reset()

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/loss", functional.cross_entropy(self(x), y), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)


def start(make, module=Whole, method="Greedy", train=None, options=None, **given):
    L.seed_everything(3, verbose=False)
    learner = LocalLearner(module(), METHODS[method](), **(options or {}))
    L.seed_everything(4, verbose=False)
    run = make(**{"max_epochs": 2, "log_every_n_steps": 1, **given})
    run.fit(learner, train() if train else data(), data(shuffle=False))
    return run


def left(run, **more):
    """What is equal in all processes."""
    return {
        "network": dict(run.lightning_module.module.state_dict()),
        "metrics": dict(run.callback_metrics),
        "step": run.global_step,
        "epoch": run.current_epoch,
        **more,
    }


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


class Reading(Lit):
    """Reads the network's input besides calling the network."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + batch[0].mean() ** 2)


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


# Without one process to compare with.


class Hooks(Lit):
    """Notes which hooks run."""


def note(name):
    def hook(self, *args, **kwargs):
        self.seen.append(name)

    return hook


ENDS = (
    "on_train_batch_end", "on_train_epoch_end", "on_validation_batch_end",
    "on_validation_epoch_end",
)  # fmt: skip
EVERYWHERE = (
    "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start",
    "on_validation_end", "on_train_end", "on_fit_end",
)  # fmt: skip
for each in (*ENDS, *EVERYWHERE):
    setattr(Hooks, each, note(each))


class Collectives(L.Callback):
    """Counts what all processes take part in, from the first batch of an epoch to its last."""

    NAMES = (
        "all_reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor", "reduce",
        "all_gather_object", "broadcast_object_list", "gather", "gather_object", "scatter",
        "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "monitored_barrier",
    )  # fmt: skip

    def __init__(self):
        self.inside = False
        self.called = []
        self.batches = 0
        for module in (torch.distributed, torch.distributed.distributed_c10d):
            for name in self.NAMES:
                setattr(module, name, self.counted(name, getattr(module, name)))

    def counted(self, name, function):
        def call(*args, **kwargs):
            group = kwargs.get("group")
            if self.inside:
                size = torch.distributed.get_world_size(group)
                self.called.append((name, size))
            return function(*args, **kwargs)

        return call

    def on_train_batch_start(self, *args):
        self.inside = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        self.inside = not trainer.is_last_batch


def others(rank, size, folder):
    """Hooks, a clock and collectives; replicas of a plain module."""
    make = partial(trainer, rank, size, QUIET)
    hooks = start(make, Hooks)
    clock = start(make, max_epochs=999, max_time=timedelta(milliseconds=300))
    found = {
        "hooks": hooks.lightning_module.module.seen,
        "clock": (clock.global_step, clock.current_epoch),
    }
    for name in ("EndToEnd", "Greedy"):
        module = synced(partial(Classifier, Still))
        options = {"num_stages": 1, "data_parallel": 2, "use_distributed_sampler": False}
        run = start(make, module, name, share, **options)
        found[name] = dict(run.lightning_module.module.state_dict())
    # The last, since it changes torch's functions.
    counting = Collectives()
    start(make, method="BackLink", callbacks=[counting])
    return {**found, "batches": counting.batches, "called": counting.called}


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return together(2, others, 2, tmp_path_factory.mktemp("rest"))


def test_ends_run_where_the_steps_do_and_starts_everywhere(rest):
    last, first = (found["hooks"] for found in rest)
    assert [name for name in last if name not in ENDS] == first
    assert set(last) == {*ENDS, *EVERYWHERE}
    assert last == start(single, Hooks).lightning_module.module.seen


def test_a_clock_stops_all_stages_after_the_same_batch(rest):
    assert rest[0]["clock"] == rest[1]["clock"]
    assert 0 < rest[0]["clock"][1] < 999


def test_no_collective_in_training_batches(rest):
    for found in rest:
        assert found["batches"] == 6
        assert found["called"] == []


@pytest.mark.parametrize("name", ["EndToEnd", "Greedy"])
def test_replicas_without_stages_equal_one_process_on_the_joined_batch(name, rest):
    one = start(single, synced(partial(Classifier, Still)), name, share)
    for found in rest:
        for key, tensor in one.lightning_module.module.state_dict().items():
            torch.testing.assert_close(found[name][key], tensor, rtol=1e-6, atol=1e-6, msg=key)


class WholeSynced(Whole):
    def log(self, *args, **options):
        super().log(*args, **{"sync_dist": True, **options})


def with_replicas(rank, size, folder):
    stages = size // 2
    make = partial(trainer, rank, size, QUIET, num_stages=stages, data_parallel=2)
    counting = Collectives()
    run = start(make, WholeSynced, "Greedy", callbacks=[counting])
    return left(run, called={n for _, n in counting.called})


def test_metric_objects_with_replicas(tmp_path):
    """Computed over the replicas of the last stage; no batch has a collective of all stages."""
    two, four = (together(size, with_replicas, size, tmp_path) for size in (2, 4))
    for rank, found in enumerate(four):
        wrong = differences(two[rank % 2], found)
        assert not wrong, f"rank {rank}\n" + "\n".join(wrong[:20])
    assert four[0]["called"] == {2}


# Refusals.


def read(rank, size):
    start(partial(trainer, rank, size, QUIET), Reading)


def test_a_step_that_reads_the_input_is_told_what_to_do():
    ended = launch(2, read, 2)
    assert all(code != 0 for code in ended.codes)
    assert all(r"pass LocalParallelStrategy(send_input=True)" in log for log in ended.logs)


def too_many(rank, size):
    start(partial(trainer, rank, size, QUIET), options={"partition": 2})


def test_fewer_local_modules_than_stages():
    ended = launch(3, too_many, 3)
    assert all(code != 0 for code in ended.codes)
    for log in ended.logs:
        assert "3 stages for 2 local modules: pass LocalParallelStrategy(num_stages=2)" in log


def alone(strategy=None, **options):
    strategy = strategy or LocalParallelStrategy(cluster_environment=Place(0, 1))
    return L.Trainer(**{**QUIET, "strategy": strategy, **options})


@pytest.mark.parametrize(
    ("options", "devices", "message"),
    [
        ((2, 2), 3, r"2 x 2 = 4 processes, and Trainer\(devices=3, num_nodes=1\) has 3 x 1 = 3"),
        ((3,), 2, r"num_stages=3, data_parallel=1\) needs 3 x 1 = 3 .* has 2 x 1 = 2"),
        (("auto", 2), 3, r"needs 1 x 2 = 2 processes, .* has 3 x 1 = 3"),
        (("auto", 4), 2, r"needs 1 x 4 = 4 processes, .* has 2 x 1 = 2"),
        (("auto", 1, [0, 0, 1, 2]), 2, r"needs 3 x 1 = 3 processes, .* has 2 x 1 = 2"),
    ],
)
def test_products_have_to_be_equal(options, devices, message):
    with pytest.raises(ValueError, match=message):
        alone(LocalParallelStrategy(*options), devices=devices)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_stages": 0}, ValueError, "num_stages=0"),
        ({"num_stages": 1.5}, ValueError, "num_stages=1.5"),
        ({"num_stages": "two"}, ValueError, "num_stages='two'"),
        ({"num_stages": True}, ValueError, "num_stages=True"),
        ({"data_parallel": 0}, ValueError, "data_parallel=0"),
        ({"data_parallel": "2"}, ValueError, "data_parallel='2'"),
        ({"in_flight": 0}, ValueError, "in_flight=0"),
        ({"in_flight": None}, ValueError, "in_flight=None"),
        ({"timeout": timedelta(0)}, ValueError, "expected a timedelta above 0"),
        ({"timeout": 30}, ValueError, "timeout=30"),
        ({"placement": "001"}, TypeError, "placement='001'"),
        ({"placement": [0, 0.5]}, TypeError, "such as"),
        ({"placement": [0, True]}, TypeError, "such as"),
        ({"placement": []}, ValueError, "such as"),
        ({"placement": [1, 2]}, ValueError, "in order"),
        ({"placement": [0, 2]}, ValueError, "in order"),
        ({"placement": [0, 1, 0]}, ValueError, "in order"),
        ({"send_input": "yes"}, TypeError, "send_input='yes'"),
        ({"process_group_backend": "mpi"}, ValueError, "process_group_backend='mpi'"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        LocalParallelStrategy(**options)


def test_a_plain_module_is_refused():
    with pytest.raises(TypeError, match=r"wrap it, LocalLearner\(Lit\(...\), method=...\)"):
        alone(max_epochs=1).fit(Lit(), data(), data(False))


def learner_with(**options):
    learner = LocalLearner(Lit(), "Greedy")
    learner.trainer = L.Trainer(**{**QUIET, **options})
    return learner


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [pl_callbacks.EMAWeightAveraging()]}, "EMAWeightAveraging does not work"),
        ({"callbacks": [pl_callbacks.BatchSizeFinder()]}, "BatchSizeFinder does not work"),
        ({"val_check_interval": timedelta(seconds=1)}, "clock decide when to validate"),
    ],
)
def test_what_stages_can_not_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        limits.check_run(learner_with(**options), 2)


def test_a_plateau_per_step_is_refused():
    class Impatient(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            config = {"scheduler": scheduler, "interval": "step", "monitor": "val/loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    learner = LocalLearner(Impatient(), "Greedy")
    learner.trainer = L.Trainer(**QUIET)
    learner.build(torch.zeros(2, 1, 6, 6))
    learner.configure_optimizers()
    with pytest.raises(ValueError, match="use interval='epoch'"):
        limits.check_schedulers(learner.configs, 2)
    limits.check_schedulers(learner.configs, 1)


def test_the_strategy_has_a_name():
    made = L.Trainer(**{**QUIET, "strategy": "local_parallel"}).strategy
    assert isinstance(made, LocalParallelStrategy)
    assert Place(0, 1).creates_processes_externally
