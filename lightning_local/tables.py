"""What `LocalSummary` says in words and tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

from lightning_local.build import step_flops

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = [
    "flops_of_a_step",
    "in_words",
    "print_results",
    "print_summary",
    "print_table",
    "say",
    "short",
]

_RICH = RequirementCache("rich")


def flops_of_a_step(learner: LocalLearner) -> tuple[float, float]:
    """FLOPs per sample of one training step, end to end and with the learner's method.

    Forwards are counted, backwards by formula (`Coupling.backward_flops`).
    """
    modules = learner.modules_in_order()
    return 3.0 * sum(module.body_flops for module in modules), sum(step_flops(learner))


def print_summary(learner: LocalLearner) -> None:
    """The local modules: where they are, where they are cut, what they hold, what they cost."""
    cutting, modules = learner.cutting, learner.modules_in_order()
    bodies, heads = learner.parameters_per_module()
    sizes = [[sum(p.numel() for p in each) for each in group] for group in (bodies, heads)]
    rows, first = [], 0
    for k, module in enumerate(modules):
        last = cutting.last_unit[k]
        shape = cutting.boundaries[k].shape if k < len(modules) - 1 else ()
        rows.append(
            [
                *(f"{k:02d}", _name(learner, k)),
                str(last) if last <= first else f"{first}-{last}",
                *(f"{sizes[0][k]:,}", f"{sizes[1][k]:,}"),
                *(short(module.body_flops), short(module.head_flops)),
                "x".join(map(str, shape)) or "output",
            ]
        )
        first = last + 1
    flops = [sum(m.body_flops for m in modules), sum(m.head_flops for m in modules)]
    rows.append(["all", "", "", *(f"{sum(s):,}" for s in sizes), *map(short, flops), ""])
    print_table(
        f"{type(learner.method).__name__}: {len(cutting.unit_points) + 1} units in "
        f"{learner.num_modules} local modules",
        ["module", "cut after", "units", "params", "+ head", "FLOPs", "+ head", "hidden"],
        rows,
    )
    plain, local = flops_of_a_step(learner)
    if plain:
        say(
            "FLOPs: forward, per sample. A training step takes about "
            f"{short(local)} per sample, {local / plain:.2f} times end-to-end backpropagation "
            "(backward by formula)."
        )
    if len(learner.links.stages) > 1:
        shares = [sum(step_flops(learner)[k] for k in owned) for owned in learner.links.stages]
        say(
            "\n".join(
                f"Stage {s}: local modules {owned[0]:02d} to {owned[-1]:02d}, "
                f"{share / max(sum(shares), 1.0):.0%} of a training step's FLOPs"
                for s, (owned, share) in enumerate(zip(learner.links.stages, shares, strict=True))
            )
        )


def print_results(
    learner: LocalLearner, accuracies: Sequence[float], peaks: Sequence[int], device: str
) -> None:
    """What a fit found out about each local module.

    Args:
        learner: Whose local modules.
        accuracies: Of the heads in the last validation, in [0, 1], NaN for a head that predicts
            nothing; empty without.
        peaks: Peak memory while each trained, in bytes; empty without.
        device: What was measured, in a word.
    """
    header, columns = ["module", "cut after"], []
    if accuracies:
        header.append("validation accuracy")
        columns.append(["-" if math.isnan(a) else f"{a:.2%}" for a in accuracies])
    if peaks:
        header.append(f"peak memory ({device})")
        columns.append([in_words(peak) for peak in peaks])
    if columns:
        rows = [
            [f"{k:02d}", _name(learner, k), *(column[k] for column in columns)]
            for k in range(learner.num_modules)
        ]
        print_table("Each local module after the fit", header, rows)


def _name(learner: LocalLearner, k: int) -> str:
    return learner.split_points[k] if k < len(learner.split_points) else "(end)"


def in_words(size: int) -> str:
    """A number of bytes in MiB; of small networks, where that would be nothing, in KiB."""
    kib, mib = size / 2**10, size / 2**20
    if mib < 1:
        return f"{kib:,.0f} KiB" if kib >= 10 else f"{kib:.1f} KiB"
    return f"{mib:.1f} MiB" if mib < 10 else f"{mib:,.0f} MiB"


def short(number: float) -> str:
    """A count with three digits and a unit."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5:
            return f"{number:.3g}{' ' if unit else ''}{unit}"
        number /= 1000
    return f"{number:.3g} P"


@rank_zero_only
def say(text: str) -> None:
    """Tells the user, once for all processes."""
    if _RICH:
        from rich.console import Console

        Console().print(text, highlight=False)
    else:
        rank_zero_info(text)


@rank_zero_only
def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Shows a table, once for all processes; numbers stand on the right.

    Nothing is cut off: a narrow terminal folds cells, the widest first, and a file gets the width
    that the table needs.
    """
    if _RICH:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for name in header:
            justify: Literal["left", "right"] = "left" if name == "cut after" else "right"
            table.add_column(name, justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console = Console()
        if not console.is_terminal:
            unbounded = console.options.update(max_width=sys.maxsize)
            needed = console.measure(table, options=unbounded).maximum
            console = Console(width=max(console.width, needed, len(title)))
        console.print(title, highlight=False)
        console.print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in [header, *rows]]
    rank_zero_info("\n".join([title, *lines]))
