"""Works through a list of runs, several at a time, and goes on where it was cut.

    python -m benchmarks.accuracy.queue cpu --data data/cifar10.npz --jobs 2 --max-minutes 60

A list is a file in `lists/` with the arguments of one run per line; what stands on the command line
goes to all of them. Runs that are finished are left out, and those that were begun come first.
Tables and pictures are renewed whenever a run ends.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time

from benchmarks.accuracy import table
from benchmarks.accuracy.configuration import RECIPES, name_of
from benchmarks.accuracy.main import HERE, parser_of_a_run

LISTS = HERE / "lists"


def runs_of(text: str) -> list[list[str]]:
    """The arguments of each run of a list; `#` begins a comment."""
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [line for line in lines if line]


def _order(arguments: list[str]) -> tuple[bool, bool]:
    """Finished, or not yet begun: False goes first."""
    options = parser_of_a_run().parse_args(arguments)
    options.epochs = options.epochs or RECIPES[options.recipe].epochs
    name = name_of(options)
    result = options.results / f"{name}.json"
    finished = result.exists() and json.loads(result.read_text())["finished"]
    return finished, not (options.checkpoints / f"{name}.ckpt").exists()


def main() -> None:
    """Runs what is left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("list", choices=sorted(p.stem for p in LISTS.glob("*.txt")))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    options, common = parser.parse_known_args()
    stop = time.monotonic() + 60 * options.max_minutes
    every = [[*line, *common] for line in runs_of((LISTS / f"{options.list}.txt").read_text())]
    waiting = [run for run in sorted(every, key=_order) if not _order(run)[0]]
    print(f"{len(every) - len(waiting)} of {len(every)} runs are finished", flush=True)
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    while waiting or running:
        while waiting and len(running) < options.jobs and time.monotonic() < stop:
            minutes = (stop - time.monotonic()) / 60
            command = [sys.executable, "-m", "benchmarks.accuracy.main", *waiting.pop(0)]
            running.append(subprocess.Popen([*command, "--max-minutes", str(minutes)]))
        if not running:
            break
        time.sleep(1)
        ended = [process for process in running if process.poll() is not None]
        failed += sum(process.returncode != 0 for process in ended)
        running = [process for process in running if process not in ended]
        if ended:
            table.main()
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
