"""The pictures: relative peaks as bars, and what a step adds against depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.memory.files import HERE, read

__all__ = ["draw"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "end to end": "#000000",
    "Greedy": "#999999",
    "DGL": "#56B4E9",
    "PredSim": "#F0E442",
    "InfoPro": "#CC79A7",
    "AugLocal": "#0072B2",
    "BackLink": "#009E73",
    "SGR": "#D55E00",
}
# Networks that differ in their depth alone.
DEPTHS = {"ResNet-32": 32, "ResNet-110": 110, "ResNet-1202": 1202}
# Label and marker of a line.
LINES = {
    ("end to end", "none"): "o",
    ("end to end", "blocks"): "s",
    ("Greedy", "none"): "v",
    ("DGL", "none"): "^",
    ("AugLocal, d=2", "none"): "D",
    ("AugLocal, d=6", "none"): "P",
    ("BackLink", "none"): "X",
    ("SGR", "none"): "*",
}


def _colour(method: str) -> str:
    return COLOURS[method.partition(",")[0]]


def _label(method: str, recompute: str) -> str:
    return method if recompute == "none" else f"{method}, recomputing {recompute}"


def draw() -> None:
    """Draws what the table has the rows for."""
    found = read("result")
    rows = [row for row in found.get("rows", ()) if row["peak, x"] != ""]
    panels = {}
    for network in ("ResNet-110", "resnet50"):
        own = [row for row in rows if row["network"] == network]
        if own:
            panels[network] = own
    if panels:
        _bars(panels, HERE / "methods.png")
    exact = found.get("exact", {})
    if any(row["network"] == "ResNet-1202" for row in rows):
        _depths(rows, exact, HERE / "depth.png")


def _bars(panels: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel a network, one bar a method; checkpointing is a line across."""
    from matplotlib.figure import Figure

    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(11, 0.8 + 0.3 * longest), layout="constrained")
    found = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (network, rows) in zip(found, panels.items(), strict=True):
        shown = [row for row in rows if _label(row["method"], row["recompute"]) != "end to end"]
        lines = [row["peak, x"] for row in shown if row["method"] == "end to end"]
        shown = [row for row in shown if row["method"] != "end to end"]
        names = [_label(row["method"], row["recompute"]) for row in shown]
        values = [row["peak, x"] for row in shown]
        colours = [_colour(row["method"]) for row in shown]
        hatches = ["" if row["recompute"] == "none" else "///" for row in shown]
        heights = range(len(shown))
        axes.barh(heights, values, color=colours, hatch=hatches, edgecolor="white", height=0.7)
        others = [(row["others, x"], i) for i, row in enumerate(shown) if row["others, x"] != ""]
        ends = {i: max(x, values[i]) for x, i in others}
        for height, value in zip(heights, values, strict=True):
            axes.text(
                ends.get(height, value) + 0.02,
                height,
                f"{value:.3g}",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        if others:
            axes.scatter(
                [x for x, _ in others],
                [i for _, i in others],
                facecolors="none",
                edgecolors="black",
                zorder=3,
                label="others, see README",
            )
        for value in lines:
            axes.axvline(
                value,
                color="black",
                linestyle="--",
                label=f"checkpointing every block: {value:.3g}",
            )
        axes.set_yticks(heights, names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, max(1.0, 1.15 * max(values)))
        axes.set_xlabel("peak, share of end to end's")
        axes.set_title(f"{network}, batch {rows[0]['batch']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def _depths(rows: list[dict[str, Any]], exact: dict[str, dict[str, int]], path: Path) -> None:
    """What a step adds to weights, optimizer states and batch, per image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    whole, local = figure.subplots(1, 2)
    for (method, recompute), marker in LINES.items():
        points = []
        for row in rows:
            if (row["method"], row["recompute"]) != (method, recompute):
                continue
            if row["network"] not in DEPTHS:
                continue
            place = (row["network"], row["batch"], method, recompute)
            own = exact[" | ".join(map(str, place))]
            size = (own["peak"] - own["static"]) / row["batch"] / 2**20
            points.append((DEPTHS[row["network"]], size))
        if not points:
            continue
        for axes in (whole, local):
            if axes is local and method == "end to end":
                continue
            axes.plot(
                *zip(*sorted(points), strict=True),
                color=_colour(method),
                marker=marker,
                linestyle="--" if recompute != "none" else "-",
                label=_label(method, recompute),
            )
    whole.set_title("all", fontsize=10)
    local.set_title("the local methods alone", fontsize=10)
    for axes in (whole, local):
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.set_xticks(list(DEPTHS.values()))
        axes.set_xlabel("layers of the ResNet")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    whole.set_ylabel("MiB per image that a step adds")
    whole.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
