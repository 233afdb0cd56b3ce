"""Checkpoints within an epoch, written as the plain module's are, and read so that runs go on."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_local.links import Links
from lightning_local.publisher import share_metrics

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["SavingByStep", "load_waiting_loaders"]


def load_waiting_loaders(trainer: pl.Trainer) -> None:
    """Gives stateful loaders the state that Lightning still holds when training starts.

    Who asks for `estimated_stepping_batches` in `configure_optimizers`, as one does for OneCycleLR,
    has the loaders made before the file is read, and Lightning then never loads them (its issue
    20550).
    """
    loop = trainer.fit_loop
    waiting, loaders = loop._combined_loader_states_to_load, loop._combined_loader
    if waiting and loaders is not None and loop._data_fetcher is not None:
        loaders._load_state_dicts(waiting)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)  # the iterator that is there may be where the old state was


class _Automatic:
    """The learner, as it looks to a callback that asks how it optimizes."""

    automatic_optimization = True

    def __init__(self, learner: pl.LightningModule) -> None:
        self._learner = learner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_learner") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._learner, name)


class SavingByStep:
    """Lets `ModelCheckpoint` treat each batch as under automatic optimization.

    Under manual optimization it ignores `train_time_interval`, ranks by metrics of the validation
    before the coming one, and asks for the weights before the step (Lightning issues 20947, 21842).
    Once a batch counts one step it can do for the learner what it does for the plain module.
    """

    def __init__(self, learner: LocalLearner) -> None:
        self._callbacks = [
            callback
            for callback in learner.trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint)
        ]
        for callback in self._callbacks:
            callback.__dict__["on_train_batch_end"] = self._as_automatic(callback, learner)

    @staticmethod
    def _as_automatic(callback: ModelCheckpoint, learner: LocalLearner) -> Any:
        own, module = callback.on_train_batch_end, _Automatic(learner)

        def on_train_batch_end(trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            interval = callback._train_time_interval
            if not learner.links.alone:
                if not _is_due(callback, trainer, learner.links):
                    return
                share_metrics(trainer, learner.links)
                if interval is not None:
                    callback._train_time_interval = timedelta(0)
            try:
                own(trainer, module, *args)  # type: ignore[arg-type]  # it stands in for the learner
            finally:
                callback._train_time_interval = interval

        return on_train_batch_end

    def close(self) -> None:
        """Gives the callbacks their own method back."""
        for callback in self._callbacks:
            callback.__dict__.pop("on_train_batch_end", None)


def _is_due(callback: ModelCheckpoint, trainer: pl.Trainer, links: Links) -> bool:
    """Whether a batch may be saved, as all stages see it without waiting for each other."""
    every, interval = callback._every_n_train_steps, callback._train_time_interval
    if interval is None:
        return every > 0 and trainer.global_step % every == 0
    last = callback._last_time_checked
    return links.decide(last is not None and time.monotonic() - last >= interval.total_seconds())
