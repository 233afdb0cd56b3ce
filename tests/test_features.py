"""The Trainer's features, row by row of the table in docs/lightning.md, against the plain run."""

import csv
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as cbs
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler
from simple import Lit, data, run, wrap
from torch.optim import lr_scheduler as schedulers

BOTH = (lambda module: module, wrap("units"))


class Events(L.Callback):
    """Batches, validations and learning rates, in order."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append(("batch", trainer.global_step, batch_idx, rate))

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(("validation", trainer.global_step, trainer.current_epoch))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("epoch", trainer.global_step, trainer.current_epoch))


def both(quiet, callbacks=lambda: (), module=Lit, **options):
    """The plain and the local run, with the events of each."""
    found = []
    for make in BOTH:
        events = Events()
        made = list(callbacks())
        trainer, model = run(make, quiet, module, callbacks=[*made, events], **options)
        found.append((trainer, model, made, events.seen))
    assert found[0][3] == found[1][3]
    assert len(found[0][3]) > 0
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_steps": 5, "max_epochs": -1},
        {"min_steps": 4, "max_epochs": 2},
        {"val_check_interval": 2, "max_epochs": 2},
        {"val_check_interval": 0.5, "max_epochs": 2},
        {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": 3},
        {"check_val_every_n_epoch": 2, "max_epochs": 4},
        {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 2},
        {"accumulate_grad_batches": 2, "val_check_interval": 2, "max_epochs": 2},
        {"num_sanity_val_steps": 0, "max_epochs": 1},
        {"fast_dev_run": 2},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
    ],
    ids=lambda o: ",".join(o),
)
def test_when_things_happen(options, quiet):
    epochs = options.pop("max_epochs", 1)
    plain, local = both(quiet, epochs=epochs, **options)
    assert plain[0].global_step == local[0].global_step
    assert plain[0].current_epoch == local[0].current_epoch


def test_max_time(quiet):
    for make in BOTH:
        trainer, _ = run(make, quiet, epochs=-1, max_time=timedelta(seconds=0), max_steps=50)
        assert trainer.global_step <= 3
    timer = cbs.Timer(timedelta(hours=1))
    trainer, _ = run(wrap("units"), quiet, callbacks=[timer], epochs=1)
    assert timer.time_elapsed("train") > 0


def test_early_stopping(quiet):
    def stopping():
        return [cbs.EarlyStopping("const", patience=1)]

    class Constant(Lit):
        def validation_step(self, batch, batch_idx):
            self.log("const", 1.0)

    plain, local = both(quiet, stopping, Constant, epochs=6)
    assert plain[2][0].stopped_epoch == local[2][0].stopped_epoch == 1
    stop = cbs.EarlyStopping("local/03/loss_epoch", patience=0, divergence_threshold=-1.0)
    trainer, _ = run(wrap("units"), quiet, callbacks=[stop], epochs=5)
    assert trainer.current_epoch == 1


class Counted(Lit):
    """Logs what does not depend on the weights, so that plain and local rank alike."""

    def training_step(self, batch, batch_idx):
        self.log("count", float(self.global_step % 3))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("score", float((self.global_step * 7) % 5))


SAVING = {
    "every epoch": {"every_n_epochs": 1, "save_top_k": -1},
    "every second epoch": {"every_n_epochs": 2, "save_top_k": -1},
    "best two": {"monitor": "score", "save_top_k": 2, "mode": "max"},
    "best by step": {"monitor": "score", "save_top_k": 2, "every_n_train_steps": 2},
    "best by training": {"monitor": "count", "save_top_k": 1, "every_n_train_steps": 1},
    "every second step": {"every_n_train_steps": 2, "save_top_k": -1},
    "by time": {"train_time_interval": timedelta(seconds=0), "save_top_k": -1},
    "by time, best": {
        "train_time_interval": timedelta(seconds=0), "monitor": "score", "save_top_k": 2,
    },
    "at the epoch's end": {"save_on_train_epoch_end": True, "save_last": True},
    "last": {"save_last": True, "every_n_train_steps": 2},
    "weights only": {"save_weights_only": True},
}  # fmt: skip


@pytest.mark.parametrize("case", SAVING)
def test_checkpoints_are_the_same_files(case, tmp_path, quiet):
    names, scores = [], []
    for folder, make in zip(("plain", "local"), BOTH, strict=True):
        saving = cbs.ModelCheckpoint(tmp_path / folder, "{epoch}-{step}", **SAVING[case])
        options = {**quiet, "enable_checkpointing": True}
        run(make, options, Counted, callbacks=[saving], epochs=3)
        names.append(sorted(p.name for p in (tmp_path / folder).iterdir()))
        scores.append((saving.best_model_score, saving.best_model_path[-16:]))
        assert "on_train_batch_end" not in vars(saving)
    assert names[0] == names[1]
    assert len(names[0]) > 0
    assert scores[0] == scores[1]


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("logged", ["training", "validation"])
def test_plateau_schedulers(interval, frequency, logged, quiet):
    class Waits(Lit):
        def training_step(self, batch, batch_idx):
            if logged == "training":
                self.log("const", 1.0)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if logged == "validation":
                self.log("const", 1.0)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            config = {
                "scheduler": schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.9),
                "monitor": "const",
                "interval": interval,
                "frequency": frequency,
            }
            return {"optimizer": optimizer, "lr_scheduler": config}

    found = both(quiet, module=Waits, epochs=6, val_check_interval=1)
    rates = {event[3] for event in found[0][3] if event[0] == "batch"}
    assert len(rates) > 1


def test_a_missing_metric_is_an_error_or_a_warning(quiet):
    class Waits(Lit):
        strict = True

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            scheduler = schedulers.ReduceLROnPlateau(optimizer)
            config = {"scheduler": scheduler, "monitor": "absent", "strict": self.strict}
            return {"optimizer": optimizer, "lr_scheduler": config}

    class Lenient(Waits):
        strict = False

    with pytest.raises(MisconfigurationException, match="waits for the metric 'absent'"):
        run(wrap("units"), quiet, Waits)
    with pytest.warns(RuntimeWarning, match="waits for the metric 'absent'"):
        run(wrap("units"), quiet, Lenient, epochs=1)


def test_the_users_lr_scheduler_step_runs(quiet):
    calls = []

    class Steps(Lit):
        def lr_scheduler_step(self, scheduler, metric):
            calls.append(type(scheduler).__name__)
            scheduler.step()

    run(wrap("units"), quiet, Steps, epochs=1)
    assert calls == ["OneCycleLR"] * 12


def test_averaged_weights(quiet):
    """The callback's average equals one by hand over the weights after each batch."""

    class ByHand(L.Callback):
        def __init__(self):
            self.average = None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights = {k: v.detach().clone() for k, v in pl_module.named_parameters()}
            if self.average is None:
                self.average = weights
            else:
                for name, value in weights.items():
                    self.average[name].lerp_(value, 0.5)

    for kind in (cbs.EMAWeightAveraging(decay=0.5, use_buffers=True),):
        by_hand = ByHand()
        _, learner = run(wrap("units"), quiet, callbacks=[by_hand, kind])
        found = dict(learner.named_parameters())
        assert set(found) == set(by_hand.average)
        for name, value in by_hand.average.items():
            torch.testing.assert_close(found[name].data, value, rtol=1e-6, atol=1e-7)
        assert any("local_modules" in name for name in found)


def test_profilers_name_every_module(tmp_path, quiet):
    simple = SimpleProfiler()
    run(wrap("units"), quiet, profiler=simple, epochs=1)
    names = {f"local/0{k}" for k in range(4)}
    assert names <= set(simple.recorded_durations)
    assert all(len(simple.recorded_durations[name]) == 3 for name in names)
    profiler = PyTorchProfiler(tmp_path, "trace", schedule=None, export_to_chrome=False)
    run(wrap("units"), quiet, profiler=profiler, epochs=1)
    assert names <= {event.key for event in profiler.function_events.key_averages()}


@pytest.mark.parametrize("every", [1, 2])
def test_loggers_get_what_the_plain_run_logs_at_the_same_steps(every, tmp_path, quiet):
    class Logged(Lit):
        def __init__(self, width=6):
            super().__init__()
            self.save_hyperparameters()

    tables, hparams = [], []
    for folder, make in zip(("plain", "local"), BOTH, strict=True):
        loggers = [
            CSVLogger(tmp_path, folder, flush_logs_every_n_steps=1),
            TensorBoardLogger(tmp_path / "board", folder),
        ]
        options = {**quiet, "logger": loggers, "log_every_n_steps": every}
        run(make, options, Logged, callbacks=[cbs.LearningRateMonitor()])
        with open(loggers[0].experiment.metrics_file_path) as file:
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        tables.append([{k for k in row if not k.startswith(("local/", "lr"))} for row in rows])
        hparams.append(loggers[0].experiment.hparams)
    steps = [[row for row in table if "train/loss_step" in row] for table in tables]
    assert len(steps[0]) == len(steps[1]) > 0
    names = [set().union(*table) for table in tables]
    assert names[0] == names[1]
    assert hparams[0] == hparams[1] == {"width": 6}


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 1},
        {"detect_anomaly": True},
        {"inference_mode": False},
        {"deterministic": True},
        {"benchmark": False},
    ],
    ids=lambda o: next(iter(o)),
)
def test_other_options_run_with_one_module_as_plain(options, quiet):
    loader = data(shuffle=False)
    _, plain = run(BOTH[0], quiet, loader=loader, **options)
    _, local = run(wrap(1), quiet, loader=loader, **options)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, local.module.state_dict()[name]), name
    trainer, _ = run(wrap("units"), quiet, loader=loader, **options)
    torch.use_deterministic_algorithms(False)
    assert trainer.global_step == 2 * len(loader) or "overfit_batches" in options


@pytest.mark.parametrize("kind", [cbs.RichProgressBar, cbs.TQDMProgressBar])
def test_progress_bars_and_summaries(kind, quiet, capsys):
    options = {**quiet, "enable_progress_bar": True, "enable_model_summary": True}
    for summary in (cbs.RichModelSummary(), cbs.ModelSummary(max_depth=2)):
        run(wrap("units"), options, callbacks=[kind(), summary], epochs=1)
    assert "3/3" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_barebones():
    trainer = L.Trainer(max_epochs=1, barebones=True, accelerator="cpu", devices=1)
    trainer.fit(wrap("units")(Lit()), data(), data(shuffle=False))
    assert trainer.global_step == 3
