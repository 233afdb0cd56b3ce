"""The picture: memory against step time."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["draw"]

# Okabe and Ito's colours, as in the other pictures.
COLOURS = {"AugLocal, d=2": "#0072B2", "AugLocal, d=6": "#D55E00"}
MARKERS = {"none": "o", "body": "s", "blocks": "^"}


def draw(folder: Path) -> None:
    """Draws `tradeoff.png` from `result.json`."""
    from matplotlib.figure import Figure

    rows = json.loads((folder / "result.json").read_text())["rows"]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for method, colour in COLOURS.items():
        own = [row for row in rows if row["method"] == method]
        for mode in ("body", "blocks"):
            line = [row for row in own if row["twice"] in ("none", mode)]
            xs, ys = [row["step, x"] for row in line], [row["peak, x"] for row in line]
            style = "--" if mode == "body" else "-"
            axes.plot(xs, ys, color=colour, linestyle=style, linewidth=1, zorder=1)
            axes.scatter(
                xs[1:], ys[1:], color=colour, marker=MARKERS[mode], zorder=2,
                label=f"{method}, {mode}",
            )  # fmt: skip
            if mode == "blocks":
                axes.scatter(xs[:1], ys[:1], color=colour, marker="o", zorder=2)
                axes.annotate(
                    "nothing twice", (xs[0], ys[0]), (6, 4), textcoords="offset points", fontsize=8
                )
                named = 0.0
                for row in sorted(line[1:], key=lambda row: row["step, x"]):
                    if row["step, x"] - named < 0.06:
                        continue  # the other's name would lie on it
                    named = row["step, x"]
                    axes.annotate(
                        f"first {row['in local modules']}", (named, row["peak, x"]),
                        (4, 5), textcoords="offset points", fontsize=8,
                    )  # fmt: skip
    axes.set_ylim(0)
    axes.set_xlabel("step time, as a multiple of the same method's without recomputation")
    axes.set_ylabel("peak, share of end to end's")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "tradeoff.png", dpi=130)
