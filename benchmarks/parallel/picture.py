"""The timeline: which stage works on which batch, and when it waits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.parallel.recording import HANDING_OVER

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "link": "#CC79A7",
    "step": "#009E73",
    "waiting": "#FFFFFF",
}
# Seconds; a shorter "wait" is the handing over itself.
SHORTEST = 5e-4


def drawn(stages: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Of spans by stage those that are drawn; without local modules, from time 0 on."""
    begin = min(span[3] for spans in stages for span in spans)
    return [
        [
            (kind, t, round(start - begin, 6), round(end - begin, 6))
            for kind, _, t, start, end in spans
            if kind in COLOURS or (kind in HANDING_OVER and end - start >= SHORTEST)
        ]
        for spans in stages
    ]


def _lane(axes: Any, spans: Sequence[Any], height: float, begin: float, end: float) -> None:
    """Bars of one stage, and the numbers of its batches below them."""
    shown = [
        (kind, t, max(start, begin) - begin, min(stop, end) - begin)
        for kind, t, start, stop in spans
        if start < end and stop > begin
    ]
    for kind, _, start, stop in shown:
        waits = kind in HANDING_OVER
        axes.barh(
            height,
            1000 * (stop - start),
            left=1000 * start,
            height=0.56,
            color=COLOURS["waiting" if waits else kind],
            hatch="////" if waits else None,
            edgecolor="#999999" if waits else "white",
            linewidth=0.3 if waits else 0.2,
        )
    for t in sorted({span[1] for span in shown if span[0] in COLOURS}):
        marks = [span for span in shown if span[1] == t and span[0] in COLOURS]
        left, right = min(span[2] for span in marks), max(span[3] for span in marks)
        colour = "#444444" if t % 2 else "#AAAAAA"
        axes.barh(height + 0.36, 1000 * (right - left), left=1000 * left, height=0.08, color=colour)
        if right - left > 0.06 * (end - begin):
            middle = 500 * (left + right)
            axes.text(middle, height + 0.54, f"batch {t}", ha="center", fontsize=7)


def draw(timeline: dict[str, Any], path: Path) -> None:
    """Draws one panel per run, one lane per stage, all on the same scale of time.

    Args:
        timeline: The panels' spans by stage, and the network's name.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = timeline["panels"]
    windows = {}
    for name, stages in panels.items():
        # From the moment on when all stages are in the batches that were recorded.
        begin = max(min(span[2] for span in spans) for spans in stages)
        windows[name] = (begin, min(max(span[3] for span in spans) for spans in stages))
    width = min(end - begin for begin, end in windows.values())
    lanes = sum(map(len, panels.values()))
    figure = Figure(figsize=(11, 0.6 + 0.55 * len(panels) + 0.75 * lanes), layout="constrained")
    heights = [len(stages) for stages in panels.values()]
    found = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (name, stages) in zip(found[:, 0], panels.items(), strict=True):
        begin = windows[name][0]
        for s, spans in enumerate(stages):
            _lane(axes, spans, s, begin, begin + width)
        axes.set_yticks(range(len(stages)), [f"stage {s}" for s in range(len(stages))])
        axes.set_ylim(len(stages) - 0.35, -0.45)
        axes.set_xlim(0, 1000 * width)
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    found[-1, 0].set_xlabel(f"time, ms ({timeline['network']}, one thread per process)")
    marks = [
        Patch(
            facecolor=colour,
            hatch="////" if kind == "waiting" else None,
            edgecolor="#999999" if kind == "waiting" else colour,
            label="link (the successor's error)" if kind == "link" else kind,
        )
        for kind, colour in COLOURS.items()
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    figure.savefig(path, dpi=130)
