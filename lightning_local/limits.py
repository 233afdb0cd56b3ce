"""What Lightning offers and several stages can't do: refused before the training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_local.callbacks import callbacks_of

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["check_learner", "check_run", "check_schedulers"]

_CALLBACKS: dict[type[pl.Callback], str] = {
    pl_callbacks.WeightAveraging: "it averages the weights of one process, and each stage trains "
    "others; average the weights of checkpoints, after the fit",
    pl_callbacks.BatchSizeFinder: "it runs the training again and again in one process; find the "
    "batch size with Trainer(devices=1)",
}


def check_learner(learner: object) -> None:
    """Refuses anything but a `LocalLearner`.

    Raises:
        TypeError: Says how to wrap the module.
    """
    if not hasattr(learner, "local_modules") or not hasattr(learner, "links"):
        raise TypeError(
            f"LocalParallelStrategy places the local modules of a LocalLearner, and the Trainer "
            f"got a {type(learner).__name__}: wrap it, "
            f"LocalLearner({type(learner).__name__}(...), method=...)."
        )


def check_run(learner: LocalLearner, num_stages: int) -> None:
    """Refuses what one process alone can do.

    Raises:
        ValueError: Names the feature, the reason and what to do instead.
    """
    trainer = learner.trainer
    callbacks = callbacks_of(trainer)
    for callback in callbacks:
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(
                    f"{type(callback).__name__} does not work with LocalParallelStrategy: {reason}."
                )
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        raise ValueError(
            "SLURM's automatic requeueing saves in the middle of a batch, where stages are at "
            "different ones: pass Trainer(plugins=[SLURMEnvironment(auto_requeue=False)]); SIGTERM "
            "ends all stages after the same batch, and ModelCheckpoint(save_on_exception=True) "
            "saves then."
        )
    if num_stages == 1:
        return
    if any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
        raise ValueError(
            "A BasePredictionWriter wants samples' indices and predictions in one place, and the "
            "first stage has the ones, the last the others: use what trainer.predict returns on "
            "rank 0."
        )
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        raise ValueError(
            "Trainer(val_check_interval=...) as a time lets each stage's own clock decide when to "
            "validate: give a number of batches or a fraction of the epoch."
        )


def check_schedulers(configs: list[LRSchedulerConfig], num_stages: int) -> None:
    """Refuses schedulers that every stage would have to wait for in every batch.

    Raises:
        ValueError: A metric is asked for in every step.
    """
    for config in configs:
        if num_stages > 1 and config.reduce_on_plateau and config.interval == "step":
            raise ValueError(
                f"ReduceLROnPlateau with interval='step' waits for {config.monitor!r} in every "
                "batch, which only the last stage knows: use interval='epoch'."
            )
