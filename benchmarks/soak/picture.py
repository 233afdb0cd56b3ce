"""The picture: memory and live tensors against steps."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["draw"]

# Okabe and Ito's colours.
COLOURS = ("#000000", "#0072B2", "#D55E00")


def draw(folder: Path) -> None:
    """Draws `soak.png` from `result.json`."""
    from matplotlib.figure import Figure

    notes = json.loads((folder / "result.json").read_text())["notes"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = [
        (f"{count} process{'es' * (count != '1')}, {rank}", taken)
        for count, own in notes.items()
        for rank, taken in enumerate(own)
    ]
    for (name, taken), colour in zip(lines, COLOURS, strict=True):
        steps = [each["step"] for each in taken]
        left.plot(steps, [each["resident"] / 2**20 for each in taken], color=colour, label=name)
        right.plot(steps, [each["tensors"] for each in taken], color=colour, label=name)
    left.set_ylabel("resident memory, MiB")
    right.set_ylabel("live tensors")
    for axes in (left, right):
        axes.set_xlabel("steps")
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(folder / "soak.png", dpi=130)
