"""The picture of a plan: memory against the number of parts, and the network with its cuts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_local.plan import Plan

__all__ = ["draw_plan"]

_MIB = 2**20


def draw_plan(plan: Plan, path: Path) -> Path:
    """Saves the picture; see `Plan.save_picture`."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.4])
    _peaks(left, plan)
    _network(right, plan, matplotlib.colormaps["tab10"])
    figure.suptitle(plan.title)
    figure.savefig(path, dpi=120)
    return path


def _peaks(axes: Any, plan: Plan) -> None:
    parts = [rung.parts for rung in plan.rungs]
    axes.axhline(plan.end_to_end / _MIB, color="#555555", linestyle="--", label="end to end")
    pairs = [(r.parts, r.checkpointed / _MIB) for r in plan.rungs if r.checkpointed is not None]
    if pairs:
        axes.plot(*zip(*pairs, strict=True), color="#e69f00", marker="s", label="+ checkpointing")
    axes.plot(
        parts,
        [rung.local / _MIB for rung in plan.rungs],
        color="#0072b2",
        marker="o",
        label="local learning",
    )
    chosen = len(plan.choice.points) + 1
    axes.plot(
        chosen, plan.choice.peak / _MIB, marker="*", markersize=14, color="#d55e00", linestyle="",
        label="recommended",
    )  # fmt: skip
    if plan.budget is not None:
        axes.axhline(plan.budget / _MIB, color="#d55e00", linewidth=1, label="budget")
    axes.set_xscale("log", base=2)
    axes.set_xticks(parts, [str(part) for part in parts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("local modules, or stretches between checkpoints")
    axes.set_ylabel("predicted peak (MiB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _network(axes: Any, plan: Plan, colors: Any) -> None:
    names = [unit.name for unit in plan.units]
    ends = [names.index(point) for point in plan.choice.points if point in names]
    sizes = [unit.needs.body_activation / _MIB for unit in plan.units]
    members = [sum(end < u for end in ends) for u in range(len(sizes))]
    axes.bar(range(len(sizes)), sizes, color=[colors(member % 10) for member in members])
    for end in ends:
        axes.axvline(end + 0.5, color="#333333", linewidth=0.8)
    step = max(1, len(names) // 16)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("activations of each unit (MiB)")
    axes.set_xlabel("units in order; lines are the recommended cuts")
