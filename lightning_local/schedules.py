"""Learning-rate schedulers: stepped at the moments, and by the rules, of automatic optimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from lightning_utilities.core.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["Schedules"]


class Schedules:
    """The schedulers of all local modules during one fit.

    Lightning's epoch loop asks for updates under manual optimization too, and then does nothing
    with them; this answers in its place, until `close`.

    Args:
        learner: Its `lr_scheduler_step` makes the steps.
        configs: Complete configs, with the keys that Lightning drops under manual optimization.
    """

    def __init__(self, learner: LocalLearner, configs: Sequence[LRSchedulerConfig]) -> None:
        self._learner = learner
        self._configs = list(configs)
        self._epoch_waits = False
        learner.trainer.fit_loop.epoch_loop.__dict__["update_lr_schedulers"] = self.update

    def close(self) -> None:
        """Gives the loop its own answer back."""
        self._learner.trainer.fit_loop.epoch_loop.__dict__.pop("update_lr_schedulers", None)

    def update(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Steps the schedulers that are due.

        Args:
            interval: `"step"` or `"epoch"`.
            update_plateau_schedulers: Only those that wait for a metric, or only the others.

        Raises:
            MisconfigurationException: A strict config's metric was not logged.
        """
        trainer = self._learner.trainer
        loop = trainer.fit_loop.epoch_loop
        if interval == "step" and loop._should_accumulate():
            return
        if interval == "epoch":
            self._epoch_waits = not update_plateau_schedulers
        self._step(self._due(interval, update_plateau_schedulers))

    def _step(self, configs: Sequence[LRSchedulerConfig], late: bool = False) -> None:
        trainer = self._learner.trainer
        monitors = sorted({str(config.monitor) for config in configs if config.reduce_on_plateau})
        metrics: dict[str, Any] = {name: trainer.callback_metrics.get(name) for name in monitors}
        if metrics:  # replicas have logged other values, and must not part
            metrics = self._learner.links.share(metrics)
        for config in configs:
            metric = None
            if config.reduce_on_plateau:
                metric = metrics[str(config.monitor)]
                if metric is None:
                    message = (
                        f"ReduceLROnPlateau waits for the metric {config.monitor!r}, which was not "
                        f"logged; there are {sorted(trainer.callback_metrics)}."
                    )
                    if config.strict and not late:
                        raise MisconfigurationException(message)
                    rank_zero_warn(f"{message} The learning rate stays.", category=RuntimeWarning)
                    continue
            self._learner.lr_scheduler_step(config.scheduler, metric)

    def catch_up(self) -> None:
        """Steps what the last epoch's end has left, when a new epoch starts.

        Lightning leaves out metric schedulers at the end of an epoch that a run was resumed in.
        """
        if self._epoch_waits:
            self._epoch_waits = False
            # Late: in a resumed epoch the metric may have been logged before it was saved.
            self._step(self._due("epoch", plateau=True, behind=1), late=True)

    def _due(self, interval: str, plateau: bool, behind: int = 0) -> list[LRSchedulerConfig]:
        trainer = self._learner.trainer
        done = (
            trainer.fit_loop.epoch_loop.batch_idx if interval == "step" else trainer.current_epoch
        )
        return [
            config
            for config in self._configs
            if config.interval == interval
            and config.reduce_on_plateau == plateau
            and (done - behind + 1) % config.frequency == 0
        ]

    def save(self) -> dict[str, float]:
        """Metrics that the schedulers of this epoch's end still wait for.

        Checkpoints of an epoch's end are written before `ReduceLROnPlateau` steps, and a resumed
        run never comes back to that moment.
        """
        trainer = self._learner.trainer
        connector = trainer._logger_connector
        if not self._epoch_waits:
            return {}
        if trainer.validating:
            # Metrics of training are means over the epoch only later.
            found = connector.metrics["callback"]
        elif connector._first_loop_iter is None:
            found = trainer.callback_metrics
        else:
            return {}  # after the last batch, but before validation
        waiting: Any = {config.monitor for config in self._due("epoch", plateau=True)}
        return {name: float(found[name]) for name in sorted(waiting) if name in found}

    def known(self) -> dict[str, float]:
        """The newest values of all metrics that schedulers wait for."""
        found = self._learner.trainer.callback_metrics
        names = sorted(
            {str(config.monitor) for config in self._configs if config.reduce_on_plateau}
        )
        return {name: float(found[name]) for name in names if name in found}

    def know(self, metrics: dict[str, float]) -> None:
        """Goes on with them, until they are logged again."""
        found = self._learner.trainer._logger_connector._callback_metrics
        found.update({name: torch.tensor(value) for name, value in metrics.items()})

    def load(self, metrics: dict[str, float]) -> None:
        """Makes the steps that a run was saved ahead of."""
        for config in self._configs:
            if config.reduce_on_plateau and config.monitor in metrics:
                self._learner.lr_scheduler_step(config.scheduler, metrics[config.monitor])
