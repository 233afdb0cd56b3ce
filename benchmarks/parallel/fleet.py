"""Processes that stay: on one thread each, they take jobs one after the other."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Most seconds that a job may take before all processes are ended.
SECONDS = 180


def device_of(rank: int, options: argparse.Namespace) -> torch.device:
    """The device of a process."""
    return torch.device("cpu" if options.accelerator == "cpu" else f"cuda:{rank}")


@contextmanager
def _connected(rank: int, size: int, file: str, options: argparse.Namespace) -> Iterator[None]:
    """As under torchrun while it lasts; nothing at all for one process alone."""
    if size == 1:
        yield
        return
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    given = {**place, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in given.items()})
    device = device_of(rank, options)
    more: dict[str, Any] = {"device_id": device} if options.backend == "nccl" else {}
    dist.init_process_group(
        options.backend, init_method=f"file://{file}", rank=rank, world_size=size, **more
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name in given:
            os.environ.pop(name, None)


def _serve(rank: int, pipe: Any) -> None:
    """What a process does: jobs, until there are no more."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        function, size, file, options, arguments = job
        try:
            if options.accelerator != "cpu":
                torch.cuda.set_device(device_of(rank, options))
            with _connected(rank, size, file, options):
                pipe.send((function(rank, size, options, *arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class Fleet:
    """Some processes, which wait while they have nothing to do.

    Args:
        size: How many.
        options: The benchmark's.
    """

    def __init__(self, size: int, options: argparse.Namespace) -> None:
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        # Nothing has run in this process yet, so a fork is safe, and it saves all the imports.
        # CUDA forbids it.
        cpu = options.accelerator == "cpu"
        context: Any = multiprocessing.get_context("fork" if cpu else "spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = 0
        self._pipes: list[Any] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(
        self,
        size: int,
        function: Callable[..., Any],
        options: argparse.Namespace,
        *arguments: Any,
    ) -> list[Any]:
        """What `function(rank, size, options, *arguments)` returns in the first `size` processes.

        Raises:
            RuntimeError: It failed, or took too long.
        """
        self._jobs += 1
        file = str(Path(self._folder.name) / f"rendezvous{self._jobs}")
        pipes = self._pipes[:size]
        for pipe in pipes:
            pipe.send((function, size, file, options, arguments))
        results: dict[Any, Any] = {}
        while len(results) < size:
            left = [pipe for pipe in pipes if pipe not in results]
            ready: list[Any] = multiprocessing.connection.wait(left, SECONDS)
            if not ready:
                raise RuntimeError(f"{function.__name__}{arguments} took over {SECONDS} s")
            for pipe in ready:
                result, error = pipe.recv()
                if error is not None:
                    raise RuntimeError(f"{function.__name__}{arguments} failed:\n{error}")
                results[pipe] = result
        return [results[pipe] for pipe in pipes]

    def __enter__(self) -> Fleet:
        """As a context, it ends its processes."""
        return self

    def __exit__(self, *args: Any) -> None:
        """Ends them, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()
