"""One Trainer or one learner used again, also after a run that failed; and what a run leaves."""

import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as cbs
from lightning.pytorch.demos.boring_classes import DemoModel
from lightning.pytorch.plugins import MixedPrecision
from simple import CLASSES, Lit, Net, data, run, wrap
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_local import LocalLearner, LocalSummary, methods


class Steady(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Counts(L.Callback):
    def __init__(self):
        self.samples = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.samples += len(batch[0])


def left(trainer):
    """Names of what hangs on a Trainer's parts besides their own."""
    loops = (trainer.fit_loop, trainer.validate_loop, trainer.test_loop)
    places = [trainer.strategy, trainer._logger_connector, *(loop._data_source for loop in loops)]
    places += [trainer.fit_loop.epoch_loop, *trainer.checkpoint_callbacks]
    return [n for place in places for n, v in vars(place).items() if callable(v) and "on_" in n[:3]
            or n in ("dataloader", "load_checkpoint", "update_lr_schedulers", "log_metrics",
                     "update_train_step_metrics")]  # fmt: skip


@pytest.mark.parametrize("then", ["learner", "plain"])
@pytest.mark.parametrize("fails", ["setup", "step"])
def test_a_failed_run_leaves_nothing(fails, then, quiet):
    class Breaks(Lit):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mine")

    counts = Counts()
    trainer = L.Trainer(max_epochs=1, callbacks=[counts], **quiet)
    bad = wrap(50)(Lit()) if fails == "setup" else wrap("units")(Breaks())
    with pytest.raises((ValueError, RuntimeError), match="mine|50 local modules"):
        trainer.fit(bad, data(n=40), data(False))
    assert left(trainer) == []
    counts.samples = 0
    second = wrap("units")(Lit()) if then == "learner" else Lit()
    trainer.fit(second, data(n=80), data(False))
    assert counts.samples == 80
    assert left(trainer) == []


def test_a_plain_module_after_a_learner_raises_its_own_errors(quiet):
    class Breaks(Lit):
        def on_fit_start(self):
            raise RuntimeError("mine")

    trainer = L.Trainer(max_epochs=1, **{**quiet, "enable_model_summary": True})
    trainer.fit(wrap("units")(Lit()), data(), data(False))
    trainer.fit(Lit(), data(), data(False))
    with pytest.raises(RuntimeError, match="mine"):
        trainer.fit(Breaks(), data(), data(False))


def test_flags_of_a_refused_run_stay_its_trainers(quiet):
    learner = wrap("units")(Lit())
    swa = cbs.StochasticWeightAveraging(0.1)
    options = {"gradient_clip_val": 0.001, "accumulate_grad_batches": 4}
    first = L.Trainer(max_epochs=1, callbacks=[swa], **options, **quiet)
    with pytest.raises(ValueError, match="does not work with LocalLearner"):
        first.fit(learner, data(), data(False))
    assert (first.gradient_clip_val, first.accumulate_grad_batches) == (0.001, 4)
    second = L.Trainer(max_epochs=1, **quiet)
    second.fit(learner, data(), data(False))
    assert (second.gradient_clip_val, second.global_step) == (None, 3)


def test_a_copy_of_a_fitted_learner(quiet):
    class Scheduled(Lit):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            rule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
            return [optimizer], [rule]

    _, learner = run(wrap("units"), quiet, Scheduled)
    copied = copy.deepcopy(learner)
    assert copied.configs == []
    assert copied.loop is None
    for a, b in zip(learner.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
    L.Trainer(max_epochs=1, **quiet).fit(copied, data(), data(False))
    assert copied.validation_step.__wrapped__.__self__ is copied.module
    assert learner.network is not copied.network
    again = pickle.loads(pickle.dumps(LocalLearner(DemoModel(), "EndToEnd")))
    assert again.state_dict().keys() == LocalLearner(DemoModel(), "EndToEnd").state_dict().keys()


@pytest.mark.parametrize("window", [2, 3])
def test_an_abandoned_window_is_forgotten(window, quiet):
    class Stops(Steady):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    options = {"accumulate_grad_batches": window, "epochs": 3}
    _, plain = run(lambda m: m, quiet, Stops, **options)
    _, local = run(wrap(1), quiet, Stops, **options)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, local.module.state_dict()[name]), name


class Types(torch.optim.SGD):
    """Notes the type of a product and of a new tensor in its step."""

    found = None

    def step(self, closure=None):
        result = super().step(closure)
        weight = next(p for g in self.param_groups for p in g["params"] if p.ndim == 2)
        type(self).found.add(((weight @ weight.T).dtype, torch.tensor(0.0).dtype))
        return result


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_optimizers_step_outside_of_the_steps_precision(precision, quiet):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(36, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.b(torch.relu(self.a(x.flatten(1))))

    class Noting(Lit):
        def configure_optimizers(self):
            return Types(self.parameters(), 0.01)

    seen = []
    for make in (lambda m: m, wrap(1), wrap("units")):
        Types.found = set()
        run(make, quiet, lambda: Noting(Flat()), precision=precision, epochs=1)
        seen.append(Types.found)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("window", [1, 4])
def test_loggers_are_called_as_often_as_in_the_plain_run(window, quiet):
    from lightning.pytorch.loggers.logger import DummyLogger

    class Calls(DummyLogger):
        def __init__(self):
            super().__init__()
            self.calls = []

        def log_metrics(self, metrics, step=None):
            self.calls.append((step, sorted(k for k in metrics if "local/" not in k)))

    found = []
    for make in (lambda m: m, wrap("units")):
        logger = Calls()
        options = {**quiet, "logger": logger, "log_every_n_steps": 1}
        run(make, options, accumulate_grad_batches=window, loader=data(n=160))
        found.append(logger.calls)
    assert found[0] == found[1]


def test_ignored_targets_are_not_counted(quiet):
    class Tokens(Lit):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)))

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self(batch[0]).transpose(1, 2), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    x = torch.randint(9, (64, 6))
    y = x.clone()
    y[:, 3:] = -100
    loader = DataLoader(TensorDataset(x, y), 16)
    learner = LocalLearner(Tokens(), "Greedy")
    summary = LocalSummary(head_accuracy=True)
    trainer = L.Trainer(max_epochs=12, callbacks=[summary], **quiet)
    trainer.fit(learner, loader, loader)
    assert trainer.callback_metrics["local/01/accuracy_epoch"] == 1.0
    assert summary.accuracies[-1] == 1.0


@pytest.mark.parametrize("case", ["skips", "frozen", "frozen linked"])
def test_fp16_without_gradients(case, quiet):
    class Frozen(Steady):
        def __init__(self):
            super().__init__(Net())
            self.network.fc.requires_grad_(False)
            self.network.blocks[2].requires_grad_(False)

    class Skips(Steady):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    kind, make = {
        "skips": (Skips, wrap(1)),
        "frozen": (Frozen, wrap("units")),
        "frozen linked": (Frozen, lambda m: LocalLearner(m, methods.BackLink())),
    }[case]
    trainer, _ = run(make, quiet, kind, plugins=[plugin])
    assert trainer.global_step == 6


def test_lbfgs_is_refused(quiet):
    class Lbfgs(Lit):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="LBFGS evaluates the loss again and again"):
        run(wrap("units"), quiet, Lbfgs)


def test_an_optimizers_own_attributes_are_copied(quiet):
    class Mine(torch.optim.SGD):
        def __init__(self, params, lr, rho):
            super().__init__(params, lr)
            self.rho = rho

        def step(self, closure=None):
            assert self.rho == 0.3
            return super().step(closure)

    class Uses(Lit):
        def configure_optimizers(self):
            return Mine(self.parameters(), 0.01, 0.3)

    assert run(wrap("units"), quiet, Uses)[0].global_step == 6


def test_a_learner_with_head_accuracy_predicts_and_validates_unfitted(quiet):
    class Data(L.LightningDataModule):
        def setup(self, stage):
            self.stage = stage

        def train_dataloader(self):
            raise AssertionError("nobody trains")

        def val_dataloader(self):
            return DataLoader(data().dataset, batch_size=16)

        predict_dataloader = val_dataloader

    class Predicts(Lit):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    def trainer():
        return L.Trainer(callbacks=[LocalSummary(head_accuracy=True)], **quiet)

    trainer().predict(wrap("units")(Predicts()), datamodule=Data())
    with pytest.warns(UserWarning, match="3 of the 3 heads have not been trained"):
        trainer().validate(wrap("units")(Predicts()), datamodule=Data())


def test_a_missing_network_is_an_error_not_another_one():
    learner = wrap("units")(Lit())
    learner.network_name = "gone"
    with pytest.raises(AttributeError):
        learner.network  # noqa: B018  # the access is the test
