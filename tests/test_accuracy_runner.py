"""benchmarks/accuracy: a run that is killed ends with the weights of one that was not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy.configuration import DATA, method_of
from benchmarks.accuracy.main import main
from benchmarks.accuracy.table import rendered, results
from lightning_local import heads, methods

ROOT = Path(__file__).parent.parent


@pytest.fixture
def arguments(tmp_path):
    draw = np.random.default_rng(0)
    parts = {}
    for name, count in (("train", 96), ("test", 20)):
        parts[f"x_{name}"] = draw.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
        parts[f"y_{name}"] = draw.integers(0, 10, count)
    np.savez(tmp_path / "tiny.npz", **parts)
    common = ["--data", str(tmp_path / "tiny.npz"), "--dataset", "fashion", "--network", "resnet8"]
    common += [
        "--recipe",
        "short",
        "--epochs",
        "2",
        "--batch",
        "16",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    common += ["--save-seconds", "0", "--method", "BackLink(head=Linear())"]
    return lambda folder: [
        *common, "--results", str(tmp_path / folder), "--checkpoints", str(tmp_path / folder),
    ]  # fmt: skip


def result(folder):
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_killed_twice_it_ends_with_the_same_weights(arguments, tmp_path):
    main(arguments("whole"))
    expected = result(tmp_path / "whole")
    assert expected["finished"]
    assert len(expected["epochs"]) == 2
    assert len(expected["epochs"][0]["heads"]) == expected["num_modules"]
    assert not list((tmp_path / "whole").glob("*.ckpt"))

    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "benchmarks.accuracy.main", *arguments("killed")]
    seen = None
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            found = [p.stat().st_mtime_ns for p in folder.glob("*.ckpt")]
            if found and found[0] != seen:
                seen = found[0]
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    again = result(folder)
    assert again["weights"] == expected["weights"]
    assert [e["accuracy"] for e in again["epochs"]] == [e["accuracy"] for e in expected["epochs"]]


def test_the_tables_show_every_finished_run():
    readme = (ROOT / "benchmarks/accuracy/README.md").read_text()
    finished = [found for found in results() if found["finished"]]
    assert finished
    rows = [line for line in rendered(results()).splitlines() if "%" not in line]
    for found in finished:
        shown = f"| {100 * found['last']:.2f} | {100 * found['best']:.2f} |"
        (row,) = [r for r in rows if r.startswith(f"| `{found['method']}` |") and shown in r]
        assert row in readme, f"python -m benchmarks.accuracy.table: {row}"


def test_minutes_end_a_run_that_then_goes_on(arguments, tmp_path, capsys):
    main([*arguments("cut"), "--max-minutes", "0"])
    assert "0 of 2 epochs, to be continued" in capsys.readouterr().out
    main(arguments("cut"))
    assert result(tmp_path / "cut")["finished"]
    main(arguments("cut"))
    assert "finished before" in capsys.readouterr().out


def test_methods_are_read_from_expressions_and_nothing_else_is():
    data = DATA["cifar10"]
    method = method_of("BackLink(weight=0.5, head=Linear(pool_features=64))", data)
    assert isinstance(method, methods.BackLink)
    assert isinstance(method.head, heads.Linear)
    assert method.coupling.weight == 0.5
    assert method_of("InfoPro", data).loss.needs_input
    for wrong in ("Linear()", "open(file='x')", "__import__('os')", "Greedy(head=1 + 1)"):
        with pytest.raises(ValueError, match="--method|malformed"):
            method_of(wrong, data)
