"""Callbacks: what is printed about the local modules, and cleaning up after an exception."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

from lightning_local.metrics import HeadAccuracy

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["LocalSummary", "Restore", "with_ours"]

_RICH = RequirementCache("rich")


class LocalSummary(pl.Callback):
    """Prints the local modules at the start of a fit and, if asked, their accuracy at its end.

    The learner adds one when none is given.

    Args:
        head_accuracy: In validation and test, run the chain of bodies and all heads on every batch
            (without gradients), log `local/<k>/val_accuracy` and print the table after `fit`.

    Example:
        >>> LocalSummary(head_accuracy=True).head_accuracy
        True
    """

    def __init__(self, head_accuracy: bool = False) -> None:
        self.head_accuracy = head_accuracy
        self.accuracies: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints units, sizes and shapes of the local modules."""
        learner = _learner(pl_module)
        self.accuracies = []
        if learner.num_modules > 1:
            _print_table(
                f"{type(learner.method).__name__}: {len(learner.cutting.unit_points) + 1} units in "
                f"{learner.num_modules} local modules",
                [
                    "module",
                    "cut after",
                    "units",
                    "parameters",
                    "head parameters",
                    "input",
                    "output",
                ],
                _rows(learner),
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts counting."""
        self._start(_learner(pl_module))

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts counting."""
        self._start(_learner(pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the heads' accuracies."""
        self._stop(_learner(pl_module), "val", log=not trainer.sanity_checking)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the heads' accuracies."""
        self._stop(_learner(pl_module), "test", log=True)

    def _start(self, learner: LocalLearner) -> None:
        if self.head_accuracy and learner.num_modules > 1:
            learner.head_accuracy = HeadAccuracy(learner.num_modules, learner.device)

    def _stop(self, learner: LocalLearner, stage: str, *, log: bool) -> None:
        if learner.head_accuracy is None:
            return
        values = learner.head_accuracy.compute()
        learner.head_accuracy = None
        if log:
            self.accuracies = values.tolist()
            learner.log_dict(
                {f"local/{k:02d}/{stage}_accuracy": v.float() for k, v in enumerate(values)}
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the last validation's accuracy of every head."""
        if self.accuracies:
            names = [row[1] for row in _rows(_learner(pl_module))]
            _print_table(
                "Validation accuracy of each local module",
                ["module", "cut after", "accuracy"],
                [[f"{k:02d}", names[k], f"{a:.2%}"] for k, a in enumerate(self.accuracies)],
            )


class Restore(pl.Callback):
    """Takes what a run needs around the user's module off it, however the run ends."""

    def __init__(self) -> None:
        self._filter: Any = None

    def silence(self) -> None:
        """Drops a warning of sharded layers that is not for us.

        Weight averaging gives it on calling `configure_model`, which the learner has so that the
        heads are there by then.
        """
        warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with")
        self._filter = warnings.filters[0]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The run ended well."""
        self._undo()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Undoes what `setup` and `teardown` undo in a run that ends well."""
        learner = _learner(pl_module)
        learner.flags.give_back(trainer)
        learner.release()
        self._undo()

    def _undo(self) -> None:
        if self._filter in warnings.filters:
            # A list, though typed as a Sequence; Python has no call to take one out.
            list.remove(warnings.filters, self._filter)  # type: ignore[arg-type]
        self._filter = None


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
        added.append(LocalSummary())
    restore = next((callback for callback in every if isinstance(callback, Restore)), None)
    if restore is None:
        restore = Restore()
        added.append(restore)
    restore.silence()
    return added


def _learner(module: pl.LightningModule) -> LocalLearner:
    # Here, since the learner imports this file: it adds a summary where none is given.
    from lightning_local.learner import LocalLearner

    if not isinstance(module, LocalLearner):
        raise TypeError(
            f"LocalSummary is for a LocalLearner, but the Trainer runs a {type(module).__name__}: "
            "wrap the module, or leave the callback out."
        )
    return module


def _rows(learner: LocalLearner) -> list[list[str]]:
    bodies, heads = learner.parameters_per_module()
    cutting = learner.cutting
    shapes = ["x".join(map(str, form.shape)) for form in cutting.boundaries]
    first = 0
    rows = []
    for k in range(learner.num_modules):
        last = cutting.last_unit[k]
        rows.append(
            [
                f"{k:02d}",
                learner.split_points[k] if k < len(learner.split_points) else "(end)",
                str(last) if last <= first else f"{first}-{last}",
                f"{sum(p.numel() for p in bodies[k]):,}",
                f"{sum(p.numel() for p in heads[k]):,}",
                shapes[k - 1] if k else "batch",
                shapes[k] if k < len(shapes) else "output",
            ]
        )
        first = last + 1
    total = [sum(p.numel() for group in groups for p in group) for groups in (bodies, heads)]
    return [*rows, ["all", "", "", f"{total[0]:,}", f"{total[1]:,}", "", ""]]


@rank_zero_only
def _print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    if _RICH:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for name in header:
            table.add_column(name, justify="left" if name == "cut after" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console = Console()
        console.print(title, highlight=False)
        console.print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in [header, *rows]]
    rank_zero_info("\n".join([title, *lines]))
