"""What every benchmark does with its rows: a JSON beside the README, and the README's table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
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


def kept(folder: Path, replaced: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """What `write` takes to add to the result that is there, made by other commands.

    Args:
        folder: The benchmark's.
        replaced: Whether a row is measured anew.

    Raises:
        ValueError: It was measured elsewhere, or with other versions.
    """
    result = json.loads((folder / "result.json").read_text())
    now = environment()
    for name in ("machine", "versions"):
        if result[name] != now[name]:
            raise ValueError(
                f"--add: {folder.name}/result.json is of {result[name]}, and this is {now[name]}: "
                "measure all of it again."
            )
    return {
        "before": [row for row in result["rows"] if not replaced(row)],
        "commands": result.get("commands", [result["command"]]),
    }


def write(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    before: Sequence[Mapping[str, Any]] = (),
    commands: Sequence[str] = (),
    **facts: Any,
) -> None:
    """Writes `result.json` and renews the README's table.

    Args:
        folder: The benchmark's.
        rows: One mapping per row, with the same keys each.
        before: Rows that are kept, see `kept`.
        commands: What they were made by.
        facts: What else belongs to the result, such as the seed.
    """
    # A path says something about the machine alone.
    given = [f"FOLDER/{Path(a).name}" if a.startswith("/") else a for a in sys.argv[1:]]
    command = shlex.join(["python", "-m", f"benchmarks.{folder.name}.main", *given])
    rows = [*before, *rows]
    result = {
        "command": command,
        **({"commands": [*commands, command]} if commands else {}),
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
    commands = ", ".join(f"`{each}`" for each in result.get("commands", [result["command"]]))
    lines += ["", f"{commands}, {result['date']}, {result['machine']}, {versions}."]
    readme = folder / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + START + "\n" + "\n".join(lines) + "\n" + END + after)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
