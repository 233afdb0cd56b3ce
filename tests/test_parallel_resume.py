"""A run saved with some number of stages goes on with any other one, bit for bit."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
from fleet import QUIET, differences, single, together, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from simple import METHODS, Lit, data
from test_resume import Stateful, half
from torch.optim import lr_scheduler

from lightning_local import LocalLearner

# Lightning notes that the callback which saved the file is not there.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "lightning_local", "global_step")


class Scheduled(Lit):
    """Noise in the step, and a schedule that waits for a metric."""

    kind = "plateau"

    def log(self, *args, **options):
        super().log(*args, **{"sync_dist": True, **options})

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + 0.1 * torch.rand(()))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        if self.kind == "step":
            return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.5)]
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val/loss"}


class Stepwise(Scheduled):
    kind = "step"


def train(make, method, ckpt=None, module=Scheduled, stateful=False, fp16=False, **options):
    """The trainer after a fit that was resumed, if there is a file."""
    L.seed_everything(3, verbose=False)
    learner = LocalLearner(module(), METHODS[method]())
    L.seed_everything(4, verbose=False)
    if ckpt:  # not the seed that Lightning's sampler for replicas shuffles with
        torch.manual_seed(99)
    if fp16:
        options["plugins"] = [half(init_scale=2.0**8)]
    run = make(**{"max_epochs": 3, **options})
    run.fit(learner, Stateful() if stateful else data(), data(shuffle=False), ckpt_path=ckpt)
    return run


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def saving(folder, **options):
    """Writes its files, and those at the end."""
    files = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", **options)
    return {"enable_checkpointing": True, "callbacks": [files, Save(folder / "end.ckpt")]}


# What is trained, and how often it is saved.
RUNS = {
    "epochs": ({"method": "BackLink"}, {}, "epoch=0-*"),
    "fp16": ({"method": "SGR", "fp16": True, "module": Stepwise}, {}, "epoch=1-*"),
    "mid-epoch": (
        {"method": "BackLink", "stateful": True, "module": Stepwise},
        {"every_n_train_steps": 3},
        "*step=6.ckpt",
    ),
}


def whole(make, name, folder):
    folder.mkdir(parents=True, exist_ok=True)
    train(make, **RUNS[name][0], **saving(folder, **RUNS[name][1]))


def resumed(make, name, source, folder):
    folder.mkdir(parents=True, exist_ok=True)
    callbacks = [Save(folder / "end.ckpt")]
    (file,) = source.glob(RUNS[name][2])
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", message="You're resuming from a checkpoint that ended")
        run = train(make, **RUNS[name][0], ckpt=file, callbacks=callbacks)
    return run.lightning_module.module.state_dict(), [str(warning.message) for warning in said]


def write_and_resume(rank, size, tmp):
    """Runs of two stages, and the same from files of one process."""
    make = partial(trainer, rank, size, QUIET)
    said = []
    for name in RUNS:
        whole(make, name, tmp / f"{size}" / name)
        said += resumed(make, name, tmp / "1" / name, tmp / f"1to{size}" / name)[1]
    return said


def resume(rank, size, tmp, source):
    make = partial(trainer, rank, size, QUIET)
    return {
        name: resumed(make, name, tmp / source / name, tmp / f"{source}to{size}" / name)[0]
        for name in RUNS
    }


def state(path):
    checkpoint = torch.load(path, weights_only=True)
    return {key: checkpoint[key] for key in COMPARED}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Files of one process, two stages, and of runs resumed from either."""
    tmp = tmp_path_factory.mktemp("runs")
    for name in RUNS:
        whole(single, name, tmp / "1" / name)
    return tmp, together(2, write_and_resume, 2, tmp)


@pytest.fixture
def folder(runs):
    return runs[0]


def test_nobody_warns_of_a_loader_that_can_go_on(runs):
    assert runs[1] == [[], []]


def same(folder, name, other):
    wanted, got = (state(folder / f / name / "end.ckpt") for f in ("1", other))
    wrong = differences(wanted, got)
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("name", RUNS)
def test_two_stages_write_the_files_of_one_process(name, folder):
    one, two = (sorted(p.name for p in (folder / s / name).iterdir()) for s in "12")
    assert one == two
    assert len(one) > 3
    for file in one:
        wrong = differences(*(state(folder / s / name / file) for s in "12"))
        assert not wrong, f"{file}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("name", RUNS)
def test_one_process_then_two_stages(name, folder):
    same(folder, name, "1to2")


@pytest.mark.parametrize("name", RUNS)
def test_two_stages_then_one_process(name, folder):
    resumed(single, name, folder / "2" / name, folder / "2to1" / name)
    same(folder, name, "2to1")


def test_two_stages_then_three(folder):
    networks = together(3, resume, 3, folder, "2")
    for name in RUNS:
        same(folder, name, "2to3")
        written = state(folder / "2to3" / name / "end.ckpt")["state_dict"]
        for found in networks:
            assert not differences(dict(written), dict(found[name])), name


def test_scalers_of_all_stages_are_saved(folder):
    file = torch.load(folder / "2" / "fp16" / "end.ckpt", weights_only=True)
    assert len(file["lightning_local"]["scalers"]) == 4
    assert all(scaler["scale"] > 2.0**8 for scaler in file["lightning_local"]["scalers"])


def test_the_plain_class_loads_the_file(folder):
    path = folder / "2" / "epochs" / "end.ckpt"
    loaded = Scheduled.load_from_checkpoint(path, weights_only=True)
    assert not differences(dict(state(path)["state_dict"]), dict(loaded.state_dict()))


def save_after(rank, size, folder):
    make = partial(trainer, rank, size, QUIET) if size > 1 else single
    options = {"callbacks": [Save(folder / f"during{size}.ckpt")], "max_epochs": 1}
    run = train(make, "BackLink", **options)
    run.save_checkpoint(folder / f"after{size}.ckpt")


def test_a_file_saved_after_the_fit_is_whole(tmp_path):
    """It has the optimizers and random states of all stages, too."""
    together(2, save_after, 2, tmp_path)
    save_after(0, 1, tmp_path)
    for moment in ("during", "after"):
        wrong = differences(*(state(tmp_path / f"{moment}{size}.ckpt") for size in (1, 2)))
        assert not wrong, f"{moment}:\n" + "\n".join(wrong[:20])


def replicas(rank, size, folder):
    make = partial(trainer, rank, size, QUIET, num_stages=2, data_parallel=2)
    whole(make, "epochs", folder / "whole")
    return resumed(make, "epochs", folder / "whole", folder / "again")[0]


def fewer(rank, size, folder):
    make = partial(trainer, rank, size, QUIET)
    resumed(make, "epochs", folder / "whole", folder / "three")


def test_stages_in_replicas_go_on(tmp_path):
    """Bit for bit with as many replicas; with another number the run goes on."""
    networks = together(4, replicas, 4, tmp_path)
    wrong = differences(*(state(tmp_path / f / "end.ckpt") for f in ("whole", "again")))
    assert not wrong, "\n".join(wrong[:20])
    written = state(tmp_path / "again" / "end.ckpt")["state_dict"]
    for found in networks:
        assert not differences(dict(written), dict(found))
    together(3, fewer, 3, tmp_path)
    assert state(tmp_path / "three" / "end.ckpt")["global_step"] > 2
