"""How the local metrics reach loggers and callbacks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_local.links import Links

__all__ = ["Publisher", "share_metrics"]

_STOP = "trainer.should_stop"


class Publisher:
    """Hands values to loggers and callbacks in Lightning's next call, as one more part of it.

    `self.log` costs 0.2 ms and more per value, since it goes through all earlier ones; K local
    modules would make it the largest part of a step.

    Args:
        trainer: Whose loggers and callbacks.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._connector = connector = trainer._logger_connector
        update = type(connector).update_train_step_metrics.__get__(connector)

        def update_train_step_metrics() -> None:
            # As under automatic optimization: nothing within an accumulation window.
            if not trainer.fit_loop._should_accumulate():
                update()

        connector.__dict__["update_train_step_metrics"] = update_train_step_metrics

    def publish(self, values: dict[str, torch.Tensor]) -> None:
        """Callbacks see the values at once, loggers with what the user logs in this step."""
        if not values:
            return
        connector = self._connector
        connector._callback_metrics.update(values)
        connector._logged_metrics.update(values)
        log = type(connector).log_metrics.__get__(connector)

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            connector.__dict__.pop("log_metrics", None)
            log({**metrics, **values}, step)

        connector.__dict__["log_metrics"] = log_metrics

    def close(self) -> None:
        """Gives the connector its own methods back."""
        for name in ("log_metrics", "update_train_step_metrics"):
            self._connector.__dict__.pop(name, None)


def share_metrics(trainer: pl.Trainer, links: Links) -> None:
    """Lets callbacks and schedulers in all processes see what rank 0 has logged.

    And whether one of the user's hooks there has ended the training.
    """
    mine: dict[str, Any] = {
        n: value.detach().cpu() for n, value in trainer.callback_metrics.items()
    }
    shared = links.share({**mine, _STOP: trainer.should_stop})
    trainer.should_stop |= shared.pop(_STOP)
    trainer._logger_connector._callback_metrics.update(shared)
