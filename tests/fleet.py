"""Runs a function in several processes that train together, and gives back what it returns.

They are forked, since starting Python and torch takes longer than a small fit: from a server that
has imported everything and run nothing, as autograd's threads don't survive a fork.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.distributed
from lightning.fabric.plugins.environments import ClusterEnvironment

from lightning_local import LocalParallelStrategy

SECONDS = 120


class Place(ClusterEnvironment):
    """This process's place in a fleet; the process group exists already."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank = rank
        self.size = size

    @property
    def creates_processes_externally(self):
        return True

    @property
    def main_address(self):
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self):
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect():
        return False

    def world_size(self):
        return self.size

    def set_world_size(self, size):
        pass

    def global_rank(self):
        return self.rank

    def set_global_rank(self, rank):
        pass

    def local_rank(self):
        return self.rank

    def node_rank(self):
        return 0


def _run(rank, size, folder, filters, function, args):
    os.setpgid(0, 0)
    # A shell that starts pytest in the background has it, and its children, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What is an error in pytest is one here.
    warnings.resetwarnings()
    warnings.filters[:] = filters
    # Output goes to a file: the tests look at it only when something fails.
    log = os.open(f"{folder}/log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    code = 1
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
        )
        result = function(rank, *args)
        torch.save(result, f"{folder}/result{rank}")
        torch.distributed.barrier()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Ended:
    """How the processes of a fleet ended."""

    def __init__(self, codes, logs, results, seconds):
        self.codes = codes
        self.logs = logs
        self.results = results
        self.seconds = seconds


def launch(size, function, *args, during=None, seconds=SECONDS):
    """Runs `function(rank, *args)` in `size` processes, whatever becomes of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_local", "simple"])
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        filters = list(warnings.filters)
        started = [
            context.Process(target=_run, args=(rank, size, folder, filters, function, args))
            for rank in range(size)
        ]
        for process in started:
            process.start()
        try:
            if during is not None:
                during(started, Path(folder))
            for process in started:
                process.join(max(0.0, start + seconds - time.monotonic()))
            took = time.monotonic() - start
            left = [rank for rank, process in enumerate(started) if process.is_alive()]
        finally:
            for process in started:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
        logs = [Path(f"{folder}/log{rank}").read_text() for rank in range(size)]
        assert not left, f"ranks {left} were still there after {took:.0f} s:\n" + "\n".join(logs)
        results = [
            torch.load(path, weights_only=False) if path.exists() else None
            for path in (Path(f"{folder}/result{rank}") for rank in range(size))
        ]
        return Ended([process.exitcode for process in started], logs, results, took)


def together(size, function, *args, seconds=SECONDS):
    """What `function(rank, *args)` returns in each of `size` processes."""
    ended = launch(size, function, *args, seconds=seconds)
    text = "\n".join(f"-- rank {rank}\n{log}" for rank, log in enumerate(ended.logs))
    assert all(code == 0 for code in ended.codes), f"exit codes {ended.codes}\n{text}"
    return ended.results


def trainer(rank, size, quiet, *, num_stages="auto", data_parallel=1, strategy=None, **options):
    """A Trainer for one process of a fleet."""
    strategy = dict(strategy or {})
    parallel = LocalParallelStrategy(
        num_stages, data_parallel, cluster_environment=Place(rank, size), **strategy
    )
    return L.Trainer(**{**quiet, "devices": size, "strategy": parallel, **options})


QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def single(**options):
    """A Trainer for one process, which takes what `trainer` takes."""
    for name in ("num_stages", "data_parallel", "strategy"):
        options.pop(name, None)
    return L.Trainer(**{**QUIET, **options})


def differences(a, b, where=""):
    """Where two nests of dicts, lists and tensors differ, in words."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [f"{where}: {_short(a)}, not {_short(b)}"]
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{where}: without {key!r}" for key in a if key not in b]
        found += [f"{where}: also {key!r}" for key in b if key not in a]
        return found + [t for k in a if k in b for t in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [t for i, (x, y) in pairs for t in differences(x, y, f"{where}/{i}")]
    return [] if type(a) is type(b) and a == b else [f"{where}: {_short(a)}, not {_short(b)}"]


def _short(value):
    if isinstance(value, torch.Tensor):
        value = value.flatten()[:3].tolist()
    return repr(value)[:60]
