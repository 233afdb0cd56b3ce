"""Pictures of a fit: each local module's loss and accuracy, over depth and over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["draw"]

_CURVES = {"loss": "training loss (mean of the epoch)", "accuracy": "training accuracy (%)"}


def draw(
    folder: str | Path,
    title: str,
    curves: Mapping[str, Sequence[torch.Tensor]],
    accuracies: Sequence[Sequence[float]],
) -> list[Path]:
    """Saves `local_loss.png`, and `local_accuracy.png` where there are accuracies.

    Args:
        folder: Where to.
        title: What was trained, and how.
        curves: `"loss"` and, where targets are classes, `"accuracy"` of training: for each epoch
            a tensor `(K,)`.
        accuracies: For each validation the K heads' accuracies in [0, 1]; may be empty.

    Returns:
        The files that were written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    def over_depth(axes: Any, rows: Sequence[Sequence[float]], name: str) -> None:
        colors = matplotlib.colormaps["viridis"]
        for i, row in enumerate(rows):
            last = i == len(rows) - 1
            percent = [100 * value for value in row]
            axes.plot(
                range(len(row)),
                percent,
                color="#d55e00" if last else colors(i / max(1, len(rows) - 1)),
                marker="o" if last else None,
                markersize=4,
                linewidth=2 if last else 0.8,
                alpha=1.0 if last else 0.5,
                label=f"{name} {i + 1}" if last or i == 0 else None,
            )
        axes.set_xlabel("local module")
        axes.set_ylabel("validation accuracy of its head (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()

    def over_epochs(figure: Any, axes: Any, values: torch.Tensor, label: str) -> None:
        colors, k = matplotlib.colormaps["viridis"], values.shape[1]
        epochs = range(1, len(values) + 1)
        for i in range(k):
            axes.plot(
                epochs,
                values[:, i].tolist(),
                color=colors(i / max(1, k - 1)),
                marker="o" if len(values) == 1 else None,
                linewidth=1.2,
            )
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, k - 1), colors)
        bar = figure.colorbar(scale, ax=axes, label="local module")
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)

    written = []
    kinds = [kind for kind in _CURVES if len(curves.get(kind, ()))]
    if kinds:
        figure = Figure(figsize=(5.2 * len(kinds), 3.8), layout="constrained")
        for i, kind in enumerate(kinds):
            values = torch.stack(list(curves[kind])) * (100 if kind == "accuracy" else 1)
            over_epochs(figure, figure.add_subplot(1, len(kinds), i + 1), values, _CURVES[kind])
        figure.suptitle(title)
        written.append(Path(folder) / "local_loss.png")
        figure.savefig(written[-1], dpi=120)
    if accuracies:
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        over_depth(axes, accuracies, "validation")
        axes.set_title(title)
        written.append(Path(folder) / "local_accuracy.png")
        figure.savefig(written[-1], dpi=120)
    return written
