"""What keeps stages in step without waiting: metrics, clocks and signals."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_local.distributed_links import DistributedLinks
from lightning_local.processes import Processes
from lightning_local.publisher import share_metrics

__all__ = ["InStep", "say_nothing_is_saved", "where"]


def where(trainer: pl.Trainer) -> tuple[str, int, int]:
    """Which batch of the run comes next: phase, epoch, number."""
    loop: Any = trainer._active_loop
    loop = getattr(loop, "epoch_loop", loop)
    stage = trainer.state.stage
    phase = stage.value if stage is not None else ""
    return phase, trainer.current_epoch, loop.batch_progress.current.ready


@rank_zero_only
def say_nothing_is_saved(where: Any) -> None:
    """Says why there is no checkpoint of a failed run."""
    print(
        f"No checkpoint in {where}: after a failure the stages are at different batches. Resume "
        "from the last one that was written.",
        file=sys.stderr,
        flush=True,
    )


class InStep(pl.Callback):
    """The first callback of a run on several processes.

    Validation metrics exist on the last stage, and callbacks and schedulers decide by them on all.
    Clocks differ: the first stage's counts, and it does not wait for the others to hear of it. A
    signal ends all stages after the same batch, so that what is saved then is whole.

    Args:
        links: Of this process.
        processes: Who is where.

    Attributes:
        deciding: The first stage's clock decides what is broadcast.
        agreed: The run ended by a signal, after the same batch on all stages, or there is one
            process alone.
    """

    def __init__(self, links: DistributedLinks, processes: Processes) -> None:
        self._links = links
        self._processes = processes
        self._timers: list[Timer] = []
        self._filters: list[Any] = []
        self.deciding = False
        self.agreed = False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Notes whether all stages end here, or one of them failed; then nothing is saved."""
        stopped = self._links.stop and isinstance(exception, SIGTERMException)
        self.agreed = stopped or self._links.alone
        if self.agreed:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
                # It would go on as if the file were there: link to it, and remove the one before.
                callback._last_global_step_saved = trainer.global_step
                say_nothing_is_saved(callback.dirpath)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Brings the trained network to all, for callbacks that export it."""
        strategy: Any = trainer.strategy
        strategy.share_weights()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares what the last stage has logged, for callbacks that read it here."""
        share_metrics(trainer, self._links)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares what the last stage has logged."""
        share_metrics(trainer, self._links)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares what the last stage's hooks have logged since."""
        share_metrics(trainer, self._links)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shares what the last stage has logged."""
        share_metrics(trainer, self._links)

    @contextmanager
    def _decided_first(self) -> Iterator[None]:
        self.deciding = True
        try:
            yield
        finally:
            self.deciding = False

    def attach(self, trainer: pl.Trainer) -> None:
        """Takes its place, until `detach`."""
        # Lightning's connectors set them, out of mypy's sight.
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, self)
        self._timers = [callback for callback in callbacks if isinstance(callback, Timer)]
        for timer in self._timers:
            timer.__dict__["_check_time_remaining"] = self._first_clock(timer)
        if self._processes.num_replicas == 1:
            # What one process logs, no other one has: there is nothing to accumulate.
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
            self._filters = list(warnings.filters[:1])
        # Lightning would let all processes wait for rank 0 before each batch.
        trainer.fit_loop.epoch_loop.__dict__["_broadcast_sigterm_tensor"] = lambda: None
        trainer._signal_connector.__dict__["_sigterm_notifier_fn"] = self._on_sigterm(trainer)

    def _first_clock(self, timer: Timer) -> Callable[[pl.Trainer], None]:
        own = timer._check_time_remaining

        def check(trainer: pl.Trainer) -> None:
            with self._decided_first():
                own(trainer)

        return check

    def _on_sigterm(self, trainer: pl.Trainer) -> Callable[[int, FrameType | None], Any]:
        processes, asked = self._processes, False

        def notify(signum: int, frame: FrameType | None) -> None:
            nonlocal asked
            if asked:
                return
            asked = True
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signum)
            processes.alarm.ask_to_stop(processes.rank_of(0, processes.replica))

        return notify

    def detach(self, trainer: pl.Trainer) -> None:
        """Leaves everything as it was."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # see attach
        if self in callbacks:
            callbacks.remove(self)
        for each in self._filters:
            if each in warnings.filters:
                # A list, though typed as a Sequence; Python has no call to take one out.
                list.remove(warnings.filters, each)  # type: ignore[arg-type]
        for timer in self._timers:
            timer.__dict__.pop("_check_time_remaining", None)
        trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)
        trainer._signal_connector.__dict__.pop("_sigterm_notifier_fn", None)
