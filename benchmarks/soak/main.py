"""Ten thousand steps with flat memory, and random kills with exact resumption."""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import renew_table, write
from benchmarks.soak.picture import draw

HERE = Path(__file__).parent


def _start(folder: str, processes: int, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """A run's processes, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "GROUP_RANK": 0}
        place |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"TORCHELASTIC_RUN_ID": "soak", "OMP_NUM_THREADS": 1}
        own = {name: str(value) for name, value in place.items()} if processes > 1 else {}
        command = [sys.executable, "-m", "benchmarks.soak.worker", "--folder", folder]
        command += ["--processes", str(processes), *arguments]
        with open(Path(folder) / f"log{rank}", "ab") as log:
            started.append(
                subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)
            )
    return started


def _finished(folder: str, started: list[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait() for process in started]
    if any(codes):
        sys.exit(f"exit codes {codes}:\n" + (Path(folder) / "log0").read_text())


def soak(processes: int, steps: int, every: int) -> list[list[dict[str, int]]]:
    """The notes of each process of a long run."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("--steps", str(steps), "--every", str(every))
        _finished(folder, _start(folder, processes, *arguments))
        return [
            json.loads((Path(folder) / f"notes{rank}.json").read_text())
            for rank in range(processes)
        ]


def _weights(folder: str) -> dict[str, Any]:
    content = torch.load(Path(folder) / "final.ckpt", weights_only=True)
    return {**content["state_dict"], **content["lightning_local"]["heads"]}


def kills(count: int, steps: int, seed: int) -> dict[str, Any]:
    """A run whose processes are killed again and again, against one that is left alone.

    Args:
        count: How many kills.
        steps: Of the whole run.
        seed: Of when, and of which process.
    """
    draws = random.Random(seed)
    arguments = ("--steps", str(steps), "--every", "100000", "--save")
    places = [0, 0]
    longest = 0.0
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as folder:
        _finished(alone, _start(alone, 2, *arguments))
        done = 0
        while done < count:
            started = _start(folder, 2, *arguments)
            mark = Path(folder) / "last.ckpt"
            before = mark.stat().st_mtime if mark.exists() else 0.0
            # Once the run has got further, at any moment of the next steps.
            while not (mark.exists() and mark.stat().st_mtime > before):
                if any(process.poll() is not None for process in started):
                    sys.exit("the run ended before it could be killed:\n" + _log(folder))
                time.sleep(0.01)
            time.sleep(draws.random())
            victim = draws.randrange(2)
            started[victim].kill()
            killed = time.monotonic()
            codes = [process.wait() for process in started]
            if 0 in codes:
                sys.exit(f"the run had ended before kill {done}: more --kill-steps")
            longest = max(longest, time.monotonic() - killed)
            places[victim] += 1
            done += 1
            print(f"kill {done}: process {victim}, codes {codes}", flush=True)
        _finished(folder, _start(folder, 2, *arguments))
        one, other = _weights(alone), _weights(folder)
        same = one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    return {
        "kills": count,
        "of process 0 / 1": f"{places[0]} / {places[1]}",
        "until the other had ended, s": longest,
        "weights as without kills": same,
    }


def _log(folder: str) -> str:
    return "".join((Path(folder) / f"log{rank}").read_text()[-3000:] for rank in range(2))


def main() -> None:
    """Runs both parts and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=200, help="steps between two notes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill-steps", type=int, default=5_000, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only rewrite table and picture")
    options = parser.parse_args()
    if options.table:
        renew_table(HERE)
        draw(HERE)
        return
    notes = {count: soak(count, options.steps, options.every) for count in (1, 2)}
    rows = []
    for count, own in notes.items():
        for rank, taken in enumerate(own):
            # The first tenth fills caches.
            first, last = taken[len(taken) // 10], taken[-1]
            rows.append(
                {
                    "processes": count,
                    "process": rank,
                    "steps": last["step"],
                    "resident at a tenth, MiB": first["resident"] / 2**20,
                    "at the end, MiB": last["resident"] / 2**20,
                    "growth per 1000 steps, KiB": (last["resident"] - first["resident"])
                    / (last["step"] - first["step"])
                    * 1000
                    / 2**10,
                    "tensors at a tenth": first["tensors"],
                    "tensors at the end": last["tensors"],
                }
            )
    found = kills(options.kills, options.kill_steps, options.seed)
    write(HERE, rows, kills=found, notes=notes, seed=options.seed)
    draw(HERE)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
