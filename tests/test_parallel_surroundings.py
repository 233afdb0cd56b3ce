"""What a user's project does around a module, on two stages: as in one process, or refused."""

from functools import partial

import pytest
import torch
from fleet import QUIET, differences, launch, single, together, trainer
from odd_modules import (
    Bank,
    Edits,
    Fewer,
    History,
    Layers,
    Lazy,
    Metered,
    Odd,
    Queries,
    Refills,
    Regression,
    Scaled,
    Stops,
    StopsLater,
    Unregistered,
)  # fmt: skip
from parallel_runs import left, start
from simple import Lit, data
from torch import nn


def refilled_memory(make, folder):
    run = start(make, Regression, train=Refills, options={"criterion": nn.MSELoss()})
    return left(run)


def learned_queries(make, folder):
    """The first hidden state is a view of a weight, which then steps."""
    options = {"partition": ["query", "blocks.1"]}
    make = partial(make, strategy={"placement": [0, 1, 1]})
    return left(start(make, lambda: Lit(Queries()), options=options))


def buffers(make, folder, layers):
    def module():
        return Lit(Layers(layers()))

    run = start(make, module)
    learner = run.lightning_module
    run.save_checkpoint(folder / "it.ckpt")
    make(max_epochs=1).fit(learner, data(), data(shuffle=False))
    private = {n: b.to_dense() for n, b in learner.module.named_buffers()}
    state = {n: t.to_dense() for n, t in learner.module.state_dict().items()}
    found = {"state": state, "buffers": private}
    if run.is_global_zero:
        saved = torch.load(folder / "it.ckpt", weights_only=False)["state_dict"]
        found["writer"] = {name: tensor.to_dense() for name, tensor in saved.items()}
    return found


LAZY = partial(buffers, layers=lambda: [Lazy(w, i / 9) for i, w in enumerate((36, 8, 8))])
BANK = partial(buffers, layers=lambda: [Bank(36), Bank(8), Bank(8)])
ODD = partial(buffers, layers=lambda: [Odd(36), Odd(8), Odd(8)])


def stopped(make, folder, module):
    run = start(make, module, max_epochs=5)
    assert run.current_epoch == 2
    return left(run)


def fewer_batches(make, folder):
    loader = data().dataset
    return left(start(make, train=lambda: Fewer(loader, 16)))


def history(make, folder):
    read = History()
    run = start(make, Lit, callbacks=[read])
    return left(run, rows=read.rows, weights=read.weights)


CASES = {
    "refilled memory": refilled_memory,
    "edited batches": lambda make, folder: left(start(make, Edits)),
    "learned queries": learned_queries,
    "lazy": LAZY,
    "bank": BANK,
    "odd": ODD,
    "stop": partial(stopped, module=Stops),
    "stop later": partial(stopped, module=StopsLater),
    "metrics": lambda make, folder: left(start(make, Unregistered)),
    "fewer batches": fewer_batches,
    "history": history,
}


def in_fleet(rank, size, folder):
    found = {}
    for name, function in CASES.items():
        inside = folder / name
        inside.mkdir(exist_ok=True)
        found[name] = function(partial(trainer, rank, size, QUIET), inside)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(2, in_fleet, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_as_in_one_process(name, two, tmp_path):
    wanted = CASES[name](single, tmp_path)
    for rank, found in enumerate(two):
        wrong = differences({k: wanted[k] for k in found[name]}, found[name])
        assert not wrong, f"rank {rank}\n" + "\n".join(wrong[:20])


def built(network):
    return Lit(network())


def fails(rank, module):
    start(partial(trainer, rank, 2, QUIET), module)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (partial(built, Metered), "`meter.mean` changes in local module 0 on stage 0, and is used"),
        (partial(built, Scaled), "`scale` changes in local module 0 on stage 0, and is used by"),
        (partial(Stops, "training_step"), "training_step set trainer.should_stop"),
        (partial(Stops, "on_train_batch_end"), "on_train_batch_end set trainer.should_stop"),
    ],
)
def test_what_would_part_is_refused(module, words):
    ended = launch(2, fails, module, seconds=60)
    assert ended.codes == [1, 1]
    assert any(words in log for log in ended.logs), ended.logs[0]
