"""Which hooks run in which process, what all processes take part in, and replicas."""

from datetime import timedelta
from functools import partial

import lightning as L
import pytest
import torch
from fleet import QUIET, differences, single, together, trainer
from parallel_modules import share, synced
from parallel_networks import Classifier, Still
from parallel_runs import Whole, left, start
from simple import Lit


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
