"""Several stages are one process bit for bit: weights, optimizers, metrics and random states."""

from functools import partial

import lightning as L
import pytest
import torch
from fleet import QUIET, differences, single, together, trainer
from parallel_modules import (
    Augmented,
    Endless,
    Joined,
    JoinedEndless,
    Named,
    SeveralVal,
    Synced,
    combined,
    in_workers,
    join,
    named,
    several_val,
    share,
    stream,
    synced,
    two_streams,
)
from parallel_networks import (
    ChannelsLast,
    Classifier,
    Counting,
    Gate,
    InPlace,
    InPlaceFirst,
    Masked,
    Still,
)
from simple import METHODS, Lit, data

from lightning_local import LocalLearner, couplings, heads, methods


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def fit(make, method="Greedy", module=Lit, train=None, val=None, learner=None, **options):
    L.seed_everything(3, verbose=False, workers=True)
    method = METHODS[method]() if isinstance(method, str) else method()
    learner = LocalLearner(module(), method, **(learner or {}))
    L.seed_everything(4, verbose=False, workers=True)
    trainer = make(**{"max_epochs": 2, "log_every_n_steps": 2, **options})
    trainer.fit(learner, train() if train else data(), val() if val else data(shuffle=False))
    return trainer


def network(make):
    return lambda: Lit(make())


PRESETS = {name: partial(fit, method=name) for name in METHODS if name != "EndToEnd"}

SEVERAL_UNITS = {
    "augmented-link": partial(
        fit, method=lambda: methods.AugLocal(depth=1, coupling=couplings.BackwardLink())
    ),
    "sgr-every-2": partial(fit, method=lambda: methods.SGR(every=2, warmup=3)),
    "in-place": partial(fit, module=network(partial(Classifier, InPlace)), method="BackLink"),
    "in-place-first": partial(fit, module=network(partial(InPlaceFirst, InPlace)), method="SGR"),
    "channels-last": partial(fit, module=network(partial(ChannelsLast, InPlace))),
    "mask": partial(fit, module=network(partial(Masked, Gate)), method="BackLink"),
    "extra-state": partial(fit, module=network(partial(Classifier, Counting))),
    "in-flight-1": partial(fit, strategy={"in_flight": 1}, method="BackLink"),
    "in-flight-3": partial(fit, strategy={"in_flight": 3}, method="SGR"),
    "two-modules": partial(fit, learner={"partition": 2}),
    "own-optimizer": partial(
        fit,
        learner={
            "optimizer": partial(torch.optim.Adam, lr=0.01),
            "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1),
        },
    ),
    "accumulate": partial(fit, accumulate_grad_batches=2, method="BackLink"),
    "accumulate-clip": partial(
        fit, accumulate_grad_batches=2, gradient_clip_val=0.05, method="SGR"
    ),
    "clip-value": partial(fit, gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "bf16": partial(fit, precision="bf16-mixed", method="SGR"),
    "limit": partial(fit, limit_train_batches=2, limit_val_batches=1),
}
DATA = {
    "dicts": partial(fit, module=Named, train=named, val=partial(named, False), method="InfoPro"),
    "stream": partial(fit, module=Endless, train=stream, val=partial(stream, 2)),
    "stream-limit": partial(fit, module=Endless, train=stream, limit_train_batches=2),
    "several-val": partial(fit, module=SeveralVal, val=several_val),
    "combined": partial(fit, module=Joined, train=combined, learner={"unpack": join}),
    "two-streams": partial(fit, module=JoinedEndless, train=two_streams, learner={"unpack": join}),
    "one-batch": partial(fit, train=partial(data, n=10), method="BackLink"),
    "augmented": partial(fit, module=Augmented),
    "workers": partial(fit, train=in_workers),
}


REPLICAS = {
    name: partial(fit, method=name, module=Synced) for name in ("Greedy", "BackLink", "SGR")
}
STILL = {
    f"still {name}": partial(
        fit,
        method=method,
        module=synced(partial(Classifier, Still)),
        train=share,
        use_distributed_sampler=False,
    )
    for name, method in {
        "Greedy": methods.Greedy,
        "BackLink": lambda: methods.BackLink(head=heads.Linear()),
    }.items()
}
CASES = PRESETS | SEVERAL_UNITS | DATA | REPLICAS | STILL


def outcome(name, make, folder):
    """All that a run leaves; the file on the rank that writes it."""
    path = folder / "a.ckpt"
    run = CASES[name](lambda **options: make(callbacks=[Save(path)], **options))
    left = {
        "network": run.lightning_module.module.state_dict(),
        "metrics": dict(run.callback_metrics),
        "step": run.global_step,
    }
    if run.is_global_zero:
        left["file"] = torch.load(path, weights_only=True)
    return left


def in_fleet(rank, size, names, folder, options):
    found = {}
    for name in names:
        inside = folder / f"{name}{size}"
        inside.mkdir(exist_ok=True)
        found[name] = outcome(name, partial(trainer, rank, size, QUIET, **options), inside)
    return found


def check(names, size, folder, **options):
    several = together(size, in_fleet, size, names, folder, options)
    wrong = []
    for name in names:
        one = outcome(name, single, folder)
        for rank, found in enumerate(several):
            got = found[name]
            wanted = {key: one[key] for key in got}
            wrong += [f"{name}, rank {rank}: {text}" for text in differences(wanted, got)]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("size", [2, 3])
def test_every_method_equals_one_process(size, tmp_path):
    check(list(PRESETS), size, tmp_path)


def test_networks_and_options_equal_one_process(tmp_path):
    check(list(SEVERAL_UNITS), 2, tmp_path)


def test_data_of_all_kinds_equal_one_process(tmp_path):
    check([name for name in DATA if name != "two-streams"], 2, tmp_path)


def test_batches_pass_a_stage_in_the_middle(tmp_path):
    check(["dicts", "stream"], 3, tmp_path)


def test_two_streams_equal_one_process(tmp_path):
    """Both iterators are made before the first batch of either; making one draws a number."""
    check(["two-streams"], 2, tmp_path)


def test_a_placement_of_ones_own_equals_one_process(tmp_path):
    names = ["Greedy", "BackLink"]
    check(names, 2, tmp_path, strategy={"placement": [0, 1, 1, 1]})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One stage in two replicas."""
    folder = tmp_path_factory.mktemp("pair")
    options = {"data_parallel": 2, "num_stages": 1}
    return together(2, in_fleet, 2, [*REPLICAS, *STILL], folder, options)


def test_stages_in_replicas_equal_one_stage_in_replicas(pair, tmp_path):
    options = {"data_parallel": 2, "num_stages": 2}
    four = together(4, in_fleet, 4, list(REPLICAS), tmp_path, options)
    wrong = []
    for rank, found in enumerate(four):
        for name in REPLICAS:
            wanted = {key: pair[rank % 2][name][key] for key in found[name]}
            wrong += [f"{name}, rank {rank}: {t}" for t in differences(wanted, found[name])]
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("name", STILL)
def test_replicas_equal_one_process_on_the_joined_batch(name, pair, tmp_path):
    """To 1e-6: a mean of two means."""
    one = outcome(name, single, tmp_path)
    for found in pair:
        assert found[name]["step"] == one["step"] == 4
        for key, tensor in one["network"].items():
            got = found[name]["network"][key]
            torch.testing.assert_close(got, tensor, rtol=1e-6, atol=1e-6, msg=key)
