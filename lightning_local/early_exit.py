"""Early exit: in test and prediction, easy samples leave at the first head that is sure of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_local.exits import ExitRecord, Exits, largest_probability
from lightning_local.objectives import ignored_index
from lightning_local.ranges import number
from lightning_local.substitute import in_order, replaced
from lightning_local.tables import print_table

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["EarlyExit", "ExitPoint"]

_MATPLOTLIB = RequirementCache("matplotlib")
_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class ExitPoint:
    """What a threshold gives.

    Attributes:
        threshold: The threshold.
        accuracy: In [0, 1]; None where targets are no class indices.
        mean_units: Units of the network that a sample passes, on average.
        flops: FLOPs of these units and of the heads that a sample meets, on average, relative to
            the network without heads.
    """

    threshold: float
    accuracy: float | None
    mean_units: float
    flops: float


class EarlyExit(pl.Callback):
    """Ends the network, sample by sample, at the first head whose confidence is above a threshold.

    In `Trainer.predict` what a sample does not need is not computed. In `Trainer.test` all heads
    run on all samples, so that a table shows accuracy and mean units for other thresholds too,
    drawn as `early_exit.png` in the log folder; the step sees the outputs of this threshold.
    Validation and training don't change.

    The network has to return `(N, C)`, and to compute samples independently, as networks in eval
    mode do. Several stages (`LocalParallelStrategy`) can't exit early.

    Args:
        threshold: From 0 to 1; 1 runs the whole network, and its output is that of a plain run, bit
            for bit.
        confidence: Maps logits `(N, C)` to `(N,)` in [0, 1]; default the largest softmax
            probability.
        pictures: Draw.

    Attributes:
        counts: How many samples left at each local module in the last run, K numbers.
        mean_units: Units that a sample passed on average.
        curve: For growing thresholds what a test found.

    Raises:
        ValueError: The threshold is out of its range.

    Example:
        >>> EarlyExit(threshold=0.95).threshold
        0.95
    """

    def __init__(
        self,
        threshold: float = 0.9,
        confidence: Callable[[torch.Tensor], torch.Tensor] | None = None,
        pictures: bool = True,
    ) -> None:
        self.threshold = number("EarlyExit", "threshold", threshold, 1.0, what="a confidence")
        self.confidence = confidence
        self.pictures = pictures
        self.counts: list[int] = []
        self.mean_units = 0.0
        self.curve: tuple[ExitPoint, ...] = ()
        self._exits: Exits | None = None
        self._stack = ExitStack()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the chain of bodies and heads in the network's place."""
        self._start(pl_module, record=True)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the chain of bodies and heads in the network's place."""
        self._start(pl_module, record=False)

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the target, for the table."""
        assert self._exits is not None
        self._exits.target = _learner(pl_module).unpack(batch)[1]

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the mean number of units."""
        self._sum_up(_learner(pl_module))
        pl_module.log("local/mean_units", self.mean_units)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints and draws what thresholds give."""
        learner, exits = _learner(pl_module), self._exits
        assert exits is not None
        assert exits.record is not None
        self._stop()
        self.curve = _curve(learner, exits.record, self.threshold)
        if not self.curve:
            return
        print_table(
            f"Early exit: accuracy and mean number of the {_units(learner)[-1]} units",
            ["threshold", "accuracy", "mean units", "FLOPs, x"],
            [
                [
                    f"{point.threshold:g}",
                    "-" if point.accuracy is None else f"{point.accuracy:.2%}",
                    f"{point.mean_units:.2f}",
                    f"{point.flops:.3f}",
                ]
                for point in self.curve
            ],
        )
        if self.pictures and trainer.logger is not None and trainer.log_dir is not None:
            if not _MATPLOTLIB:
                rank_zero_info("Install matplotlib to see accuracy against units drawn.")
            elif trainer.is_global_zero and self.curve[0].accuracy is not None:
                os.makedirs(trainer.log_dir, exist_ok=True)
                self._draw(learner, exits.record, Path(trainer.log_dir) / "early_exit.png")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says how much was computed."""
        learner = _learner(pl_module)
        self._sum_up(learner)
        self._stop()
        rank_zero_info(
            f"Early exit at {self.threshold:g}: {self.mean_units:.2f} of {_units(learner)[-1]} "
            "units on average."
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """The network is itself again."""
        self._stop()

    def _start(self, module: pl.LightningModule, record: bool) -> None:
        learner = _learner(module)
        _check(learner, self.confidence is not None)
        self._exits = exits = Exits(
            learner.modules_in_order(),
            learner.cutting.output.shape[1],
            self.threshold,
            self.confidence or largest_probability,
            record,
            ignored_index(learner._criterion[0]),
        )
        network = learner.network
        forward = network.forward

        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            return exits(*in_order(forward, args, kwargs))

        self._stack.enter_context(replaced(network, "forward", call))

    def _stop(self) -> None:
        self._stack.close()
        self._exits = None

    def _sum_up(self, learner: LocalLearner) -> None:
        assert self._exits is not None
        self.counts = list(self._exits.counts)
        passed = sum(n * u for n, u in zip(self.counts, _units(learner), strict=True))
        self.mean_units = passed / max(1, sum(self.counts))

    def _draw(self, learner: LocalLearner, record: ExitRecord, path: Path) -> None:
        """Accuracy against mean units, with that of each head by itself."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        units = [_units(learner)[k] for k in record.exits]
        alone = [
            record.accuracy(torch.full((record.samples,), e)) for e in range(len(record.exits))
        ]
        percent = [100 * (value or 0.0) for value in alone]
        axes.plot(units, percent, "o--", color="#999999", markersize=4, label="all leave there")
        xs = [point.mean_units for point in self.curve]
        ys = [100 * (point.accuracy or 0.0) for point in self.curve]
        axes.plot(xs, ys, "o-", color="#0072b2", label="leave when sure")
        named = -1.0
        for point, x, y in zip(self.curve, xs, ys, strict=True):
            if x - named > 0.04 * units[-1]:  # names of others would lie on it
                axes.annotate(
                    f"{point.threshold:g}", (x, y), (3, 6), textcoords="offset points", fontsize=8
                )
                named = x
        axes.set_xlabel("units that a sample passes, on average")
        axes.set_ylabel("test accuracy (%)")
        axes.set_title(f"{type(learner.method).__name__}, early exit by threshold")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, dpi=120)


def _learner(module: pl.LightningModule) -> LocalLearner:
    from lightning_local.learner import LocalLearner

    if not isinstance(module, LocalLearner):
        raise TypeError(
            f"EarlyExit is for a LocalLearner, but the Trainer runs a {type(module).__name__}: "
            "wrap the module, or leave the callback out."
        )
    return module


def _check(learner: LocalLearner, own_confidence: bool) -> None:
    """Raises before the first batch if nothing can leave."""
    if not learner.links.alone:
        raise ValueError(
            "EarlyExit can't run over several stages or replicas, whose numbers of samples would "
            "differ: test and predict with one device, from a checkpoint."
        )
    modules = learner.modules_in_order()
    if not any(module.predicts and module.head is not None for module in modules):
        raise ValueError(
            f"EarlyExit needs heads that predict, and {type(learner.method).__name__} with "
            f"{learner.num_modules} local modules has none: use a method such as AugLocal, or "
            "leave the callback out."
        )
    if modules[-1].behind:
        raise ValueError(
            f"EarlyExit ends the network that is cut, {learner.network_name!r}, and other layers "
            "make the prediction from its output: wrap the module with network='.', or leave the "
            "callback out."
        )
    output = learner.cutting.output
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else None
    if shape is None or len(shape) != 2:
        raise ValueError(
            f"EarlyExit needs a network that returns one prediction per sample, (N, C); this one "
            f"returns {shape or type(output).__name__}: leave the callback out."
        )
    if shape[1] == 1 and not own_confidence:
        raise ValueError(
            "EarlyExit's default confidence is the largest of several probabilities, and this "
            "network has one output: pass confidence=..., a function from (N, 1) to (N,)."
        )


def _units(learner: LocalLearner) -> list[int]:
    """Units that a sample has passed behind each local module."""
    return [last + 1 for last in learner.cutting.last_unit]


def _curve(learner: LocalLearner, record: ExitRecord, threshold: float) -> tuple[ExitPoint, ...]:
    if not record.samples:
        return ()
    modules = learner.modules_in_order()
    # Heads that predict nothing are not run.
    flops = [m.body_flops + m.predict_flops * m.predicts for m in modules]
    spent = torch.tensor(flops, dtype=torch.float64).cumsum(0)
    spent /= max(1, sum(module.body_flops for module in modules))
    exits = torch.tensor(record.exits)
    units = torch.tensor(_units(learner), dtype=torch.float64)
    points = []
    for each in sorted({*_THRESHOLDS, threshold}):
        taken = record.taken(each)
        left = exits[taken]
        points.append(
            ExitPoint(
                each, record.accuracy(taken), float(units[left].mean()), float(spent[left].mean())
            )
        )
    return tuple(points)
