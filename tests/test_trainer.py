"""What the Trainer counts, schedules, clips, logs and saves: as for the plain module."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from simple import Lit, data, run, wrap

from lightning_local import LocalLearner


class Rates(L.Callback):
    """Learning rate of the last optimizer at each batch."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers])


@pytest.mark.parametrize("partition", [1, 2, "units"])
@pytest.mark.parametrize("window", [1, 2])
def test_steps_count_as_in_the_plain_run(partition, window, quiet):
    options = {"accumulate_grad_batches": window, "gradient_clip_val": 0.5}
    plain, _ = run(lambda module: module, quiet, **options)
    local, _ = run(wrap(partition), quiet, **options)
    assert local.global_step == plain.global_step
    assert local.estimated_stepping_batches == plain.estimated_stepping_batches
    a, b = (t.fit_loop.epoch_loop._batches_that_stepped for t in (plain, local))
    assert a == b
    assert (local.accumulate_grad_batches, local.gradient_clip_val) == (window, 0.5)


@pytest.mark.parametrize("partition", [1, 2, "units"])
def test_max_steps_stops_on_the_same_batch(partition, quiet):
    plain, _ = run(lambda module: module, quiet, epochs=-1, max_steps=5)
    local, _ = run(wrap(partition), quiet, epochs=-1, max_steps=5)
    assert local.global_step == plain.global_step == 5
    assert local.fit_loop.total_batch_idx == plain.fit_loop.total_batch_idx


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, (0.1, "norm"), (0.01, "value")])
def test_clipping_and_accumulation_equal_the_plain_run(window, clip, quiet):
    options = {"accumulate_grad_batches": window}
    if clip:
        options |= {"gradient_clip_val": clip[0], "gradient_clip_algorithm": clip[1]}
    _, plain = run(lambda module: module, quiet, **options)
    _, local = run(wrap(1), quiet, **options)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, local.module.state_dict()[name]), name


class Scheduled(Lit):
    kind = "epoch"

    def configure_optimizers(self):
        schedulers = torch.optim.lr_scheduler
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": decay, "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        configs = {
            "onecycle": {
                "scheduler": schedulers.OneCycleLR(optimizer, [0.1, 0.2], total_steps=steps),
                "interval": "step",
            },
            "every second batch": {
                "scheduler": schedulers.ExponentialLR(optimizer, 0.9),
                "interval": "step",
                "frequency": 2,
            },
            "epoch": {"scheduler": schedulers.StepLR(optimizer, 1, 0.5)},
            "every second epoch": {
                "scheduler": schedulers.LambdaLR(optimizer, lambda e: 0.3**e),
                "frequency": 2,
            },
            "sequential": {
                "scheduler": schedulers.SequentialLR(
                    optimizer,
                    [
                        schedulers.LinearLR(optimizer, 0.1, total_iters=3),
                        schedulers.CosineAnnealingLR(optimizer, 6),
                    ],
                    [3],
                ),
                "interval": "step",
            },
            "plateau": {
                "scheduler": schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
                "monitor": "const",
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": configs[self.kind]}

    def validation_step(self, batch, batch_idx):
        self.log("const", 1.0)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize(
    "kind",
    ["onecycle", "every second batch", "epoch", "every second epoch", "sequential", "plateau"],
)
def test_learning_rates_per_batch_equal_the_plain_run(kind, quiet):
    class Kind(Scheduled):
        pass

    Kind.kind = kind
    curves = []
    for make in (lambda module: module, wrap(1), wrap("units")):
        rates = Rates()
        run(make, quiet, Kind, epochs=4, callbacks=[rates])
        curves.append(rates.rates)
    plain = [r[0] for r in curves[0]]
    assert len(set(plain)) > 1
    for curve in curves[1:]:
        for k in range(len(curve[0])):
            assert [r[k] for r in curve] == plain


def test_groups_of_the_user_reach_every_module(quiet):
    _, learner = run(wrap("units"), quiet, Scheduled, epochs=1)
    optimizers = learner.trainer.optimizers
    assert len(optimizers) == 4
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in found
                found[id(parameter)] = group["weight_decay"]
    for name, parameter in learner.module.named_parameters():
        assert found[id(parameter)] == (0.01 if parameter.ndim > 1 else 0.0), name
    assert {id(p) for p in learner.local_modules.parameters()} <= set(found)


def test_own_optimizer_and_scheduler_per_module(quiet):
    def make(module):
        return LocalLearner(
            module,
            "Greedy",
            optimizer=lambda params: torch.optim.AdamW(params, 1e-3),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1),
        )

    trainer, _ = run(make, quiet, epochs=2)
    assert len(trainer.optimizers) == 4
    assert {type(o) for o in trainer.optimizers} == {torch.optim.AdamW}
    assert {o.param_groups[0]["lr"] for o in trainer.optimizers} == {1e-3 * 0.1 * 0.1}

    def drops(module):
        return LocalLearner(
            module, "Greedy", optimizer=lambda params: torch.optim.SGD(list(params)[:1], 0.1)
        )

    with pytest.raises(ValueError, match="left out . of the . parameters of local module 0"):
        run(drops, quiet)


def test_bf16_with_one_module_equals_the_plain_run(quiet):
    _, plain = run(lambda module: module, quiet, precision="bf16-mixed")
    _, local = run(wrap(1), quiet, precision="bf16-mixed")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, local.module.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_smoke_of_options(tmp_path, quiet):
    from lightning.pytorch.loggers import CSVLogger

    options = {**quiet, "logger": CSVLogger(tmp_path)}
    monitor = LearningRateMonitor()
    run(wrap("units"), options, callbacks=[monitor], log_every_n_steps=1, profiler="simple")
    assert {f"lr/0{k}" for k in range(4)} == set(monitor.lrs)
    run(wrap("units"), quiet, fast_dev_run=True)
    run(wrap("units"), quiet, overfit_batches=1, loader=data(shuffle=False))
    run(wrap("units"), quiet, detect_anomaly=True, epochs=1)
    L.Trainer(max_epochs=1, barebones=True, accelerator="cpu").fit(
        wrap("units")(Lit()), data(), data(shuffle=False)
    )


def test_plain_data_parallel_is_refused(quiet):
    from lightning_local.hooks import check_trainer

    check_trainer(L.Trainer(**quiet))
    for strategy, devices in (("ddp", 1), ("ddp", 2)):
        trainer = L.Trainer(**{**quiet, "devices": devices}, strategy=strategy)
        with pytest.raises(ValueError, match="which DDPStrategy on . processes does not expect"):
            check_trainer(trainer)
