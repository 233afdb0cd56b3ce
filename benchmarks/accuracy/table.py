"""Tables and pictures of all results, with the published numbers beside them.

python -m benchmarks.accuracy.table
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import END, START

__all__ = ["rendered", "results"]

HERE = Path(__file__).parent
INFOPRO, AUGLOCAL = "InfoPro, table of arXiv 2101.10832", "AugLocal, table of arXiv 2402.17318"
# Test error in % of the best epoch: (data, network, recipe, number of local modules, method).
PUBLISHED = {
    ("cifar10", "resnet32", "160", 1, "EndToEnd"): (7.37, INFOPRO),
    ("cifar10", "resnet32", "160", 16, "Greedy"): (24.59, INFOPRO),
    ("cifar10", "resnet32", "160", 16, "DGL"): (16.21, INFOPRO),
    ("cifar10", "resnet32", "160", 16, "InfoPro"): (14.23, INFOPRO),
    ("cifar10", "resnet32", "160", 16, "InfoPro(task='contrast')"): (12.75, INFOPRO),
    ("cifar10", "resnet110", "160", 1, "EndToEnd"): (6.50, INFOPRO),
    ("cifar10", "resnet110", "400", 1, "EndToEnd"): (5.39, AUGLOCAL),
    ("cifar10", "resnet110", "400", 55, "PredSim"): (25.05, AUGLOCAL),
    ("cifar10", "resnet110", "400", 55, "InfoPro"): (13.05, AUGLOCAL),
    # K is AugLocal's nominal 55 with the last seven units joined.
    ("cifar10", "resnet110", "400", 49, "AugLocal(depth=6)"): (6.04, AUGLOCAL),
}
HEAD = (
    "method", "K", "head parameters", "FLOPs, x", "peak, x", "time, x", "accuracy, last epoch, %",
    "best epoch, %", "published error, %", "note",
)  # fmt: skip


def results(folder: Path = HERE / "results") -> list[dict[str, Any]]:
    """All results, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _group(result: dict[str, Any]) -> tuple[Any, ...]:
    names = ("dataset", "network", "recipe", "batch", "epochs_planned", "precision", "val_size")
    return (*(result[name] for name in names), result.get("train_size", 0))


def _groups(found: Iterable[dict[str, Any]]) -> Iterable[tuple[tuple[Any, ...], list[Any]]]:
    for group, members in itertools.groupby(sorted(found, key=_group), _group):
        yield group, sorted(members, key=lambda r: (r["flops"], r["method"], r["seed"]))


def _title(group: tuple[Any, ...]) -> str:
    dataset, network, recipe, batch, epochs, precision, held_out, used = group
    where = f"{held_out} training images held out" if held_out else "test images"
    epochs = f"{epochs} epochs" + (f" of {used} training images" if used else "")
    return f"{dataset}, {network}, recipe {recipe}: {epochs}, batch {batch}, {precision}, {where}"


def _row(result: dict[str, Any], reference: dict[str, Any] | None) -> tuple[str, ...]:
    def times(name: str) -> str:
        same = reference is not None and reference["machine"] == result["machine"]
        same = same and reference["epoch"] == result["epoch"] and reference[name]
        return f"{result[name] / reference[name]:.3g}" if same else ""

    key = tuple(result[n] for n in ("dataset", "network", "recipe", "num_modules", "method"))
    error, source = PUBLISHED.get(key, ("", ""))
    parts = [] if result["finished"] else [f"epoch {result['epoch']} of {result['epochs_planned']}"]
    parts += [f"seed {result['seed']}"] * (result["seed"] != 1) + [source] * bool(source)
    return (
        f"`{result['method']}`",
        str(result["num_modules"]),
        str(result["head_parameters"]),
        f"{result['flops']:.3g}",
        times("peak_bytes"),
        times("process_seconds"),
        f"{100 * result['last']:.2f}",
        f"{100 * result['best']:.2f}",
        str(error),
        "; ".join(parts),
    )


def rendered(found: list[dict[str, Any]]) -> str:
    """The tables, in Markdown."""
    lines = []
    for group, members in _groups(found):
        reference = next((r for r in members if r["method"] == "EndToEnd"), None)
        lines += [f"**{_title(group)}**", "", "| " + " | ".join(HEAD) + " |"]
        lines += ["| " + " | ".join("---" for _ in HEAD) + " |"]
        lines += ["| " + " | ".join(_row(each, reference)) + " |" for each in members]
        ran = {f"{r['machine']}, torch {r['versions']['torch']}" for r in members}
        dates = sorted(r["date"] for r in members)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        lines += ["", f"{'; '.join(sorted(ran))}; {when}.", ""]
        if _drawn(members):
            lines += [f"![{_title(group)}]({_picture(group)})", ""]
    return "\n".join(lines).rstrip()


def _picture(group: tuple[Any, ...]) -> str:
    return "_".join(str(part) for part in group) + ".png"


def _drawn(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is in a group's picture: finished runs, if there is one to compare with."""
    done = [each for each in members if each["finished"]]
    compared = len(done) > 1 and any(each["method"] == "EndToEnd" for each in done)
    return done if compared else []


def _draw(found: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for group, members in _groups(found):
        done = _drawn(members)
        if not done:
            continue
        reference = next(r for r in done if r["method"] == "EndToEnd")
        figure, (memory, cost, depth) = plt.subplots(1, 3, figsize=(16, 4.8))
        # One look per method, whatever the seed; colors and shapes repeat after different numbers.
        looks = {method: i for i, method in enumerate(dict.fromkeys(r["method"] for r in done))}
        for each in done:
            number = looks[each["method"]]
            color, shape = f"C{number % 10}", "os^DvP*Xd"[number % 9]
            at = (each["peak_bytes"] / reference["peak_bytes"], each["flops"])
            for axes, x in zip((memory, cost), at, strict=True):
                axes.plot(x, 100 * each["last"], shape, color=color, label=each["method"])
            heads = each["epochs"][-1]["heads"]
            if heads:
                along = [(k + 1) / len(heads) for k in range(len(heads))]
                depth.plot(along, [100 * a for a in heads], shape + "-", color=color, markersize=3)
        memory.set_xlabel("peak memory, relative to end to end")
        cost.set_xlabel("FLOPs of a step, relative to end to end")
        memory.set_xlim(left=0)
        cost.set_xlim(left=0)
        depth.set_xlabel("depth: share of the local modules")
        depth.axhline(100 * reference["last"], color="0.6", linestyle=":")
        for axes in (memory, cost, depth):
            axes.set_ylabel("accuracy in the last epoch, %")
            axes.grid(alpha=0.3)
        handles, labels = memory.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))
        figure.legend(named.values(), named, loc="lower center", ncols=4, fontsize=8, frameon=False)
        figure.suptitle(_title(group))
        figure.tight_layout(rect=(0, 0.04 * (1 + len(named) // 4), 1, 1))
        figure.savefig(HERE / _picture(group), dpi=110)
        plt.close(figure)


def main() -> None:
    """Rewrites the README's tables and the pictures."""
    found = results()
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n{rendered(found)}\n{END}{after}")
    _draw(found)


if __name__ == "__main__":
    main()
