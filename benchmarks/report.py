"""What every benchmark does with its rows: a JSON beside the README, and the README's table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

START, END = "<!-- table -->", "<!-- end of table -->"


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def environment() -> dict[str, Any]:
    """Commit, date, machine and versions, for a result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
    }


def write(folder: Path, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Writes `result.json` and renews the README's table.

    Args:
        folder: The benchmark's.
        rows: One mapping per row, with the same keys each.
        facts: What else belongs to the result, such as the seed.
    """
    # A path says something about the machine alone.
    given = [f"FOLDER/{Path(a).name}" if a.startswith("/") else a for a in sys.argv[1:]]
    result = {
        "command": shlex.join(["python", "-m", f"benchmarks.{folder.name}.main", *given]),
        **environment(),
        **facts,
        "rows": list(rows),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    renew_table(folder)


def renew_table(folder: Path) -> None:
    """Rewrites the table between the README's two marks from `result.json`."""
    result = json.loads((folder / "result.json").read_text())
    names = list(result["rows"][0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += [
        "| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in result["rows"]
    ]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    lines += ["", f"`{result['command']}`, {result['date']}, {result['machine']}, {versions}."]
    readme = folder / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + after)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
