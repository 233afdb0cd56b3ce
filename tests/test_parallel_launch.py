"""Parallel runs as users start them: by Lightning's launcher, by torchrun, by the command line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, sys, time
import lightning as L
from simple import Lit, data
from lightning_local import LocalLearner, LocalParallelStrategy

class Pause(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if sys.argv[1:]:
            time.sleep(0.02)
        if trainer.global_step == 5:
            print(f"rank {trainer.global_rank} at work", flush=True)

if __name__ == "__main__":
    L.seed_everything(3)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=LocalParallelStrategy(num_stages=2),
        max_epochs=10_000 if sys.argv[1:] else 2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Pause()],
    )
    learner = LocalLearner(Lit(), "Greedy")
    trainer.fit(learner, data(), data(shuffle=False))
    trainer.validate(learner, data(shuffle=False), verbose=False)
    print(f"rank {trainer.global_rank} did {trainer.global_step} steps", flush=True)
"""
# What Python, torch or the system say when something was not put away.
NOISE = (
    "terminate called|Exception ignored|leaked|destroy_process_group|Aborted|Fatal Python|Traceb"
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def members(group, folder):
    """The processes still there of a group, zombies too, or with a folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            its = (path / "stat").read_text().rpartition(")")[2].split()[2]
            command = (path / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The workers of torchrun have sessions of their own.
        if int(its) == group or str(folder) in command:
            found.append(int(path.name))
    return found


class Command:
    """A command in a session of its own."""

    def __init__(self, folder, *args):
        self.folder = folder
        self.log = folder / "log"
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        # With the fault handler, a process that has to be aborted says where it was.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *args],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in members(self.process.pid, self.folder):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def text(self):
        return self.log.read_text()

    def wait_for(self, text, seconds=100):
        end = time.time() + seconds
        while text not in self.text:
            assert self.process.poll() is None, self.text
            assert time.time() < end, self.text
            time.sleep(0.05)

    def end(self, seconds=240, grace=15):
        """The exit code; nobody is left soon after."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in members(self.process.pid, self.folder):
                os.kill(pid, signal.SIGABRT)
            time.sleep(2)
            pytest.fail(f"still there after {seconds} s:\n{self.text}")
        end = time.time() + grace
        while (left := members(self.process.pid, self.folder)) and time.time() < end:
            time.sleep(0.05)
        assert left == [], self.text
        return code


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_torchrun(script, tmp_path):
    with Command(tmp_path, *TORCHRUN, script) as command:
        assert command.end() == 0, command.text
        assert re.findall(NOISE, command.text) == []
        for rank in range(2):
            assert f"rank {rank} did 6 steps" in command.text


def test_the_command_line(tmp_path):
    # Lightning's launcher starts the second process, and the strategy is given by its name.
    args = ["-m", "lightning_local", "fit", "--trainer.max_epochs=1", "--trainer.logger=false"]
    args += ["--config", "examples/image_classification/digits.yaml"]
    args += ["--trainer.devices=2", "--trainer.strategy=local_parallel"]
    args += ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
    args += [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    with Command(tmp_path, *args) as command:
        assert command.end() == 0, command.text
        assert re.findall(NOISE, command.text) == []
        assert "Stage 1" in command.text
