"""What a plan found out: tables, the part of a YAML file to paste, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_local.partition import Partition
from lightning_local.plan_picture import draw_plan
from lightning_local.setting import ModuleBytes
from lightning_local.tables import in_words, short

__all__ = ["Choice", "Plan", "Rung", "Stretch"]


@dataclass(frozen=True)
class Stretch:
    """A stretch of the network: a unit, or a local module.

    Attributes:
        name: Name of the submodule after which it ends; `"(end)"` for the last.
        units: Its first and last unit.
        needs: Its bytes.
        flops: Forward FLOPs per sample of the body and of the head.
        share: Its share of the time of a step, in [0, 1].
    """

    name: str
    units: tuple[int, int]
    needs: ModuleBytes
    flops: tuple[float, float]
    share: float


@dataclass(frozen=True)
class Rung:
    """Predicted peaks, in bytes, for a number of parts.

    Attributes:
        parts: Local modules, or stretches between checkpoints.
        checkpointed: End to end, keeping activations between the stretches only; None for one.
        local: With the chosen method.
        points: Where that is cut.
    """

    parts: int
    checkpointed: int | None
    local: int
    points: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The partition that is recommended.

    Attributes:
        points: Its split points; none for end to end.
        recompute: Local modules that compute activations twice, and how.
        peak: Predicted, in bytes.
        static: Of this, what is there before a step: weights, optimizer states, the batch.
        modules: Its local modules.
        stages: Predicted peak of each stage, if stages were asked for.
        fits: Whether the peak, or that of every stage, is within the budget.
        reason: Why this one.
    """

    points: tuple[str, ...]
    recompute: dict[int, str]
    peak: int
    static: int
    modules: tuple[Stretch, ...]
    stages: tuple[int, ...] = ()
    fits: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """A plan; `print(plan)` shows its tables, `plan.yaml()` what to paste.

    Attributes:
        title: Network, method, batch.
        end_to_end: Predicted peak of plain backpropagation, in bytes.
        units: The network's units, each as a local module of its own.
        rungs: Peaks for growing numbers of parts.
        choice: What is recommended.
        budget: Bytes to stay below, if there is a limit.
        measured: Whether shares of time were measured, not counted in FLOPs.
        notes: What could not be rehearsed as it would run.
        request: What the learner was asked to cut, but for where.
    """

    title: str
    end_to_end: int
    units: tuple[Stretch, ...]
    rungs: tuple[Rung, ...]
    choice: Choice
    budget: int | None = None
    measured: bool = False
    notes: Sequence[str] = field(default_factory=tuple)
    request: Partition = field(default_factory=Partition)

    def yaml(self) -> str:
        """The lines for `model.init_args` of a LightningCLI file (arguments of `LocalLearner`)."""
        if not self.choice.points:
            return "partition: 1 # end to end\n"
        points, request = [f"- {json.dumps(p)}" for p in self.choice.points], self.request
        options = {
            "leaves": list(request.leaves),
            "granularity": request.granularity,
            "layout": request.layout,
        }
        default = {"leaves": [], "granularity": "blocks", "layout": "auto"}
        lines = ["partition:", *points]
        if options != default:
            lines = ["partition:", "  class_path: lightning_local.Partition", "  init_args:"]
            lines += ["    split_points:", *(f"    {point}" for point in points)]
            lines += [f"    {name}: {json.dumps(value)}" for name, value in options.items()]
        if self.choice.recompute:
            lines.append("recompute:")
            lines += [f"  {k}: {mode}" for k, mode in self.choice.recompute.items()]
        return "\n".join(lines) + "\n"

    def save_picture(self, path: str | Path) -> Path:
        """Draws memory against the number of parts, and the network with its cuts.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw_plan(self, Path(path))

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each table."""
        time = "time" if self.measured else "time (FLOPs)"
        header = ["cut after", "units", "activations", "+ head", "gradients", "weights", "+ head"]
        header += ["optimizer", "FLOPs", "+ head", time, "peak"]
        budget = "" if self.budget is None else f", budget {in_words(self.budget)}"
        rungs = [
            [
                str(rung.parts),
                in_words(self.end_to_end),
                "-" if rung.checkpointed is None else in_words(rung.checkpointed),
                in_words(rung.local),
            ]
            for rung in self.rungs
        ]
        parts = ["parts", "end to end", "+ checkpointing", "local learning"]
        found = [
            (f"{self.title}: each unit as a local module", header, _rows(self.units)),
            (f"Predicted peak by number of parts{budget}", parts, rungs),
        ]
        if self.choice.points:
            found.append((self.choice.reason, header, _rows(self.choice.modules)))
        return found

    def _words(self) -> list[str]:
        choice = self.choice
        words = [f"Note: {note}" for note in self.notes]
        if not choice.points:
            words.append(choice.reason)
        words += [
            f"Stage {s}: predicted peak {in_words(peak)}" for s, peak in enumerate(choice.stages)
        ]
        return [
            *words,
            f"Predicted peak {in_words(choice.peak)}, of which {in_words(choice.static)} are there "
            "before a step (weights, optimizer states, batch): live bytes, without what kernels "
            "and the device's allocator take besides.",
            "Paste below model.init_args:",
            "",
            self.yaml(),
        ]

    def __str__(self) -> str:
        """The tables and the YAML lines as plain text."""
        lines = []
        for title, header, rows in self.tables():
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            lines += ["", title]
            for row in [header, *rows]:
                cells = zip(row, widths, strict=True)
                lines.append("  ".join(cell.rjust(width) for cell, width in cells))
        return "\n".join([*lines[1:], "", *self._words()])


def _rows(stretches: Sequence[Stretch]) -> list[list[str]]:
    rows = []
    for stretch in stretches:
        needs, (first, last) = stretch.needs, stretch.units
        sizes = [needs.body_activation, needs.head_activation, needs.gradient]
        weights = [needs.body, needs.head, needs.optimizer]
        rows.append(
            [
                stretch.name,
                str(first) if first == last else f"{first}-{last}",
                *map(in_words, [*sizes, *weights]),
                *map(short, stretch.flops),
                f"{stretch.share:.1%}",
                in_words(needs.peak),
            ]
        )
    return rows
