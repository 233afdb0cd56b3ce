"""Which tensors are alive at the peak: a table for each of some rows of the benchmark.

python -m benchmarks.memory.breakdown            writes BREAKDOWN.md
"""

from __future__ import annotations

import argparse
import datetime
import platform
import warnings
from collections import Counter
from typing import Any

import lightning
import torch

from benchmarks.memory.configurations import CONFIGURATIONS
from benchmarks.memory.files import HERE
from benchmarks.memory.networks import SUBJECTS
from benchmarks.memory.predicted import predict

NETWORK = "ResNet-110"
LABELS = ("DGL", "AugLocal, d=2", "AugLocal, d=2, body", "AugLocal, d=6, blocks", "SGR")
MIB = 2**20
START = "<!-- tables -->"


def table(label: str) -> list[str]:
    """Lines of Markdown."""
    configuration = next(each for each in CONFIGURATIONS if each.label == label)
    subject = SUBJECTS[NETWORK]
    found = predict(subject, configuration, subject.batch_size, origins=True)
    counts: Counter[Any] = Counter()
    sizes: Counter[Any] = Counter()
    rest = given = 0
    for origin in found.at_peak:
        if origin.made_by == "given":
            given += origin.size
        elif origin.size < MIB:
            rest += origin.size
        else:
            operation = origin.made_by.removeprefix("aten.").partition(".")[0]
            key = origin.shape, operation, origin.place
            counts[key] += 1
            sizes[key] += origin.size
    lines = [f"## {label}: {found.peak / MIB:.0f} MiB", ""]
    lines += ["| tensors | shape | made by | in | MiB |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {counts[key]} | {' x '.join(map(str, key[0]))} | `{key[1]}` | {key[2]} | "
        f"{sizes[key] / MIB:.1f} |"
        for key in sorted(sizes, key=lambda key: -sizes[key])
    ]
    lines += [
        f"| | | | weights, gradients, optimizer states, batch | {given / MIB:.1f} |",
        f"| | | | tensors below 1 MiB | {rest / MIB:.1f} |",
    ]
    return [*lines, ""]


def main() -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    lines = [line for label in LABELS for line in table(label)]
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    versions += f", lightning {lightning.__version__}"
    lines.append(
        f"`python -m benchmarks.memory.breakdown`, {datetime.date.today().isoformat()}, {versions}."
    )
    path = HERE / "BREAKDOWN.md"
    before = path.read_text().partition(START)[0]
    path.write_text(before + START + "\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
