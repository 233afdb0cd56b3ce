"""Callbacks: what is printed about the local modules, and cleaning up after an exception."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

from lightning_local.early_exit import EarlyExit
from lightning_local.head_accuracy import HeadAccuracy, warn_of_untrained
from lightning_local.meter import Meter
from lightning_local.pictures import draw
from lightning_local.tables import print_results, print_summary

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["LocalSummary", "Restore", "callbacks_of", "wants_heads", "with_ours"]

_MATPLOTLIB = RequirementCache("matplotlib")


class LocalSummary(pl.Callback):
    """Prints the local modules at the start of a fit, and what they reached at its end.

    The learner adds one when none is given. The table at the start has units, parameters, forward
    FLOPs and shapes. With a logger, the curves of the epochs' local losses are drawn in its folder
    (`local_loss.png`, needs matplotlib).

    Args:
        head_accuracy: In validation and test, run the chain of bodies and all heads on every batch
            (without gradients), log `local/<k>/val_accuracy`, print the last ones after `fit` and
            draw them over depth (`local_accuracy.png`).
        memory: Measure the peak memory of each local module in the second optimizer step of a fit
            (which becomes slower, and on CUDA resets the device's peak statistics) and print it.
        pictures: Draw.

    Attributes:
        accuracies: Of the heads, in the last validation or test; in [0, 1], NaN for a local module
            that has none. Empty where none has one, as in regression.
        peaks: Bytes, one number per local module.

    Example:
        >>> LocalSummary(head_accuracy=True).head_accuracy
        True
    """

    def __init__(
        self, head_accuracy: bool = False, memory: bool = False, pictures: bool = True
    ) -> None:
        self.head_accuracy = head_accuracy
        self.memory = memory
        self.pictures = pictures
        self.added = False  # by a learner; then a fit of something else does without
        self.accuracies: list[float] = []
        self.peaks: list[int] = []
        self._validations: list[list[float]] = []
        self._curves: dict[str, list[torch.Tensor]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints units, sizes, FLOPs and shapes of the local modules."""
        learner = self._learner(pl_module)
        self.accuracies, self.peaks, self._validations = [], [], []
        self._curves = {"loss": [], "accuracy": []}
        if learner is not None:
            print_summary(learner)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the last epoch's curves."""
        self._keep(trainer, self._learner(pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the last epoch's curves, and what every stage has measured."""
        self._keep(trainer, self._learner(pl_module))
        learner = self._learner(pl_module, one=True)
        if learner is None or learner.loop is None or not self.memory:
            return
        if (meter := learner.loop.watch.meter) is not None:
            self.peaks, learner.loop.watch.meter = meter.peaks, None
        peaks = torch.tensor(self.peaks or [0] * learner.num_modules)
        peaks = learner.links.add_up(peaks, largest=True)
        self.peaks = peaks.tolist() if peaks.any() else []

    def _keep(self, trainer: pl.Trainer, learner: LocalLearner | None) -> None:
        if learner is None or not self.pictures:
            return
        for kind, rows in self._curves.items():
            names = [f"local/{k:02d}/{kind}_epoch" for k in range(learner.num_modules)]
            # A module that has none leaves a gap.
            found = [trainer.callback_metrics.get(n, torch.tensor(torch.nan)) for n in names]
            values = torch.stack(found)
            if len(rows) < trainer.current_epoch and not values.isnan().all():
                rows.append(values)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measures the second step, when the optimizers have their states."""
        learner = self._learner(pl_module, one=True)
        if not self.memory or learner is None or learner.loop is None:
            return
        done = learner.loop.stepping.steps
        if done == 1 and learner.loop.watch.meter is None:
            learner.loop.watch.meter = Meter(learner.num_modules, learner.device)
        elif done > 1 and learner.loop.watch.meter is not None:
            self.peaks, learner.loop.watch.meter = learner.loop.watch.meter.peaks, None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts counting."""
        self._start(self._learner(pl_module))

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts counting."""
        self._start(self._learner(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the heads' accuracies."""
        self._stop(self._learner(pl_module), "val", log=not trainer.sanity_checking)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.accuracies and self.pictures:
            self._validations.append(self.accuracies)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the heads' accuracies."""
        self._stop(self._learner(pl_module), "test", log=True)

    def _start(self, learner: LocalLearner | None) -> None:
        if self.head_accuracy and learner is not None and learner.num_modules > 1:
            learner.head_accuracy = HeadAccuracy(
                learner.num_modules, learner.device, learner._criterion[0]
            )

    def _stop(self, learner: LocalLearner | None, stage: str, *, log: bool) -> None:
        if learner is None or learner.head_accuracy is None:
            return
        values = learner.head_accuracy.compute(learner.links)
        learner.head_accuracy = None
        if log:
            self.accuracies = [] if values.isnan().all() else values.tolist()
            learner.log_dict(
                {
                    f"local/{k:02d}/{stage}_accuracy": value.float()
                    for k, value in enumerate(values)
                    if not value.isnan()
                },
                sync_dist=not learner.links.alone,
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints and draws what each local module reached."""
        learner = self._learner(pl_module, one=self.memory)
        if learner is None:
            return
        where = "CUDA" if learner.device.type == "cuda" else "live tensors"
        print_results(learner, self.accuracies, self.peaks, where)
        if self.pictures and trainer.logger is not None and trainer.log_dir is not None:
            self._draw(learner, trainer.log_dir)

    def _learner(self, module: pl.LightningModule, one: bool = False) -> LocalLearner | None:
        """The learner, if it has local modules; None for what is no learner, if that is fine.

        Args:
            module: The Trainer's.
            one: One local module is enough.
        """
        learner = _learner_or_none(module)
        if learner is None and not self.added:
            raise TypeError(
                f"LocalSummary is for a LocalLearner, but the Trainer runs a "
                f"{type(module).__name__}: wrap the module, or leave the callback out."
            )
        return learner if learner is not None and (one or learner.num_modules != 1) else None

    @rank_zero_only
    def _draw(self, learner: LocalLearner, folder: str) -> None:
        title = f"{type(learner.method).__name__}, {learner.num_modules} local modules"
        if not _MATPLOTLIB:
            rank_zero_info("Install matplotlib to see the local modules' curves in the log folder.")
        elif self._curves["loss"] or self._validations:
            os.makedirs(folder, exist_ok=True)
            draw(folder, title, self._curves, self._validations)


class Restore(pl.Callback):
    """In every run: takes what it needs around the user's module off it, however the run ends.

    At the start of an evaluation it warns of heads that were never trained, once for all who ask.
    """

    def __init__(self) -> None:
        self._filter: Any = None

    def silence(self) -> None:
        """Drops a warning of sharded layers that is not for us.

        Weight averaging gives it on calling `configure_model`, which the learner has so that the
        heads are there by then.
        """
        warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with")
        self._filter = warnings.filters[0]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the heads."""
        self._look(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the heads."""
        self._look(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the heads."""
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        learner, stage = _learner_or_none(module), trainer.state.fn or "fit"
        if learner is not None and stage != "fit" and wants_heads(callbacks_of(trainer), stage):
            warn_of_untrained(learner)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The run ended well."""
        self._undo()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Undoes what `setup` and `teardown` undo in a run that ends well."""
        learner = _learner_or_none(pl_module)
        if learner is not None:
            learner.release()
        self._undo()

    def _undo(self) -> None:
        if self._filter in warnings.filters:
            # A list, though typed as a Sequence; Python has no call to take one out.
            list.remove(warnings.filters, self._filter)  # type: ignore[arg-type]
        self._filter = None


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The Trainer's callbacks."""
    # Lightning's connectors set it, out of mypy's sight.
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def wants_heads(present: Sequence[pl.Callback], stage: str) -> bool:
    """Whether somebody asks for the heads in `"validate"`, `"test"` or `"predict"`."""
    return any(
        (isinstance(each, LocalSummary) and each.head_accuracy and stage != "predict")
        or (isinstance(each, EarlyExit) and stage != "validate")
        for each in present
    )


def with_ours(present: Sequence[pl.Callback], own: Any) -> list[pl.Callback]:
    """The callbacks of the user's module, with those of ours that are not there yet.

    Args:
        present: The Trainer's callbacks.
        own: What the user's `configure_callbacks` returned; None without one.
    """
    added = list(own) if isinstance(own, Sequence) else [own] if own is not None else []
    every = [*present, *added]
    if not any(isinstance(callback, LocalSummary) for callback in every) and any(
        isinstance(callback, pl.callbacks.ModelSummary) for callback in every
    ):
        summary = LocalSummary()
        summary.added = True
        added.append(summary)
    restore = next((callback for callback in every if isinstance(callback, Restore)), None)
    if restore is None:
        restore = Restore()
        added.append(restore)
    restore.silence()
    return added


def _learner_or_none(module: pl.LightningModule) -> LocalLearner | None:
    # Here, since the learner imports this file: it adds a summary where none is given.
    from lightning_local.learner import LocalLearner

    return module if isinstance(module, LocalLearner) else None
