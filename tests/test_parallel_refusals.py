"""What a run on several stages refuses, and what it says to do instead."""

from datetime import timedelta
from functools import partial

import fleet
import lightning as L
import pytest
import torch
from fleet import QUIET, Place, launch, trainer
from lightning.pytorch import callbacks as pl_callbacks
from parallel_runs import Reading, start
from simple import Lit, data

from lightning_local import LocalLearner, LocalParallelStrategy, limits


def read(rank, size):
    start(partial(trainer, rank, size, QUIET), Reading)


def test_a_step_that_reads_the_input_is_told_what_to_do():
    ended = launch(2, read, 2)
    assert all(code != 0 for code in ended.codes)
    assert all(r"pass LocalParallelStrategy(send_input=True)" in log for log in ended.logs)


class Twice(Lit):
    def validation_step(self, batch, batch_idx):
        self.log("val/changed", (self(batch[0]).argmax(1) != self(batch[0]).argmax(1)).sum())


def validate(rank, size):
    start(partial(trainer, rank, size, QUIET), Twice)


def test_a_validation_that_calls_the_network_twice_is_told_what_to_do():
    ended = launch(2, validate, 2)
    assert all(code != 0 for code in ended.codes)
    for log in ended.logs:
        assert "validation_step called the network twice for one batch" in log
        assert "keep its output in a variable; else run the validation without" in log


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


@pytest.mark.parametrize("options", [{"num_stages": 3}, {"num_stages": 2, "data_parallel": 2}])
def test_a_wrong_product_is_told_when_the_trainer_is_made(options):
    with pytest.raises(ValueError, match="make the products equal"):
        L.Trainer(**{**fleet.QUIET, "devices": 2, "strategy": LocalParallelStrategy(**options)})


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
