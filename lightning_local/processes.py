"""Who is where, and what all processes of a run tell each other beside messages.

Everything here goes through gloo and the host's memory, whatever moves tensors between devices: a
process that waits here is not waiting for a device, and learns at once that another one is gone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_local.alarm import Alarm
from lightning_local.transport import object_bytes, object_from

__all__ = ["Processes"]

_DECISIONS, _REPORTS = 1, 2
# Small sends that may be on their way at once.
_PENDING = 64


class Processes:
    """The processes of a run on a ("stage", "data") mesh; the last stage comes first.

    Loggers, progress bars and checkpoints live on global rank 0, and the user's loss and metrics on
    the last stage: so the last stage of replica 0 is rank 0. Replicas of a stage are neighbours.

    Args:
        num_stages: Stages.
        num_replicas: Replicas of each stage.
        device: This process's.
        backend: Of the default process group.
        timeout: Of waiting for others.
    """

    def __init__(
        self,
        num_stages: int,
        num_replicas: int,
        device: torch.device,
        backend: str,
        timeout: timedelta,
    ) -> None:
        self.num_stages = num_stages
        self.num_replicas = num_replicas
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device
        kind = "cpu" if backend == "gloo" else device.type
        names = ("stage", "data")
        self.mesh: DeviceMesh = init_device_mesh(
            kind, (num_stages, num_replicas), mesh_dim_names=names
        )
        self.stage = num_stages - 1 - self.rank // num_replicas
        self.replica = self.rank % num_replicas
        self.timeout = timeout
        # Those of threads wait for as long as the main thread has nothing to say.
        patient = timedelta(days=30)
        self._control = _group(None, "gloo", timeout)
        self.forward = _group(None, "gloo", patient)
        self.backward = _group(None, "gloo", patient)
        self._alarms = _group(None, "gloo", patient)
        # Tensors between devices: a group for each pair and direction, so that none waits for
        # another in the order of a common queue.
        self.direct: dict[tuple[int, int], dist.ProcessGroup] = {}
        if backend != "gloo":
            for a, b in self._neighbours():
                for pair in ((a, b), (b, a)):
                    group = _group(sorted(pair), backend, patient)
                    if self.rank in pair:
                        self.direct[pair] = group
        self._replicas: dist.ProcessGroup = self.mesh["data"].get_group()
        self._hosts = self._replicas
        if backend != "gloo" and num_replicas > 1:
            ranks = sorted(self.rank_of(self.stage, d) for d in range(num_replicas))
            # Made by its members alone: others would split a communicator of the default group.
            made: Any = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
            self._hosts = made
        self.alarm = Alarm(self._alarms, self.rank, self.size, self.name_of)
        self._open = True
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def open(self) -> None:
        """Starts to listen; again after `close`."""
        if not self._open:
            self.alarm = Alarm(self._alarms, self.rank, self.size, self.name_of)
            self._open = True

    def close(self) -> None:
        """Ends the listening; all processes have to do it."""
        self.alarm.close()
        self._open = False

    def rank_of(self, stage: int, replica: int) -> int:
        """Global rank."""
        return (self.num_stages - 1 - stage) * self.num_replicas + replica

    def _neighbours(self) -> Iterator[tuple[int, int]]:
        for replica in range(self.num_replicas):
            for stage in range(self.num_stages - 1):
                yield self.rank_of(stage, replica), self.rank_of(stage + 1, replica)

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The replicas of this stage."""
        return self._replicas

    @property
    def data_hosts(self) -> dist.ProcessGroup:
        """The replicas of this stage, for tensors in the host's memory."""
        return self._hosts

    @property
    def leader(self) -> int:
        """The rank that reads the data, of replica 0."""
        return self.rank_of(0, 0)

    def describe(self, stage: int, replica: int) -> str:
        """A process in words."""
        text = f"stage {stage} of {self.num_stages}"
        if self.num_replicas > 1:
            text += f", replica {replica} of {self.num_replicas}"
        return f"{text} (rank {self.rank_of(stage, replica)})"

    def name_of(self, rank: int) -> str:
        """A rank in words."""
        return self.describe(
            self.num_stages - 1 - rank // self.num_replicas, rank % self.num_replicas
        )

    @contextmanager
    def guarded(self, rank: int | None = None) -> Iterator[None]:
        """Errors of the communication library give way to their reason, once that is known.

        Args:
            rank: Who is waited for; None for all.

        Raises:
            StageError: Another process failed.
            TimeoutError: Another process does not answer.
        """
        self.alarm.check()
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self.alarm.await_news()
            seconds, limit = time.monotonic() - start, self.timeout.total_seconds()
            if seconds < limit:
                raise
            who = "the other processes" if rank is None else self.name_of(rank)
            raise TimeoutError(
                f"Waited {limit:.0f} s for {who}: pass LocalParallelStrategy(timeout=...) if it "
                "may take longer."
            ) from error

    def barrier(self) -> None:
        """Waits for all."""
        with self.guarded():
            dist.barrier(group=self._control)

    def broadcast(self, obj: Any, source: int) -> Any:
        """The object of one rank, for all."""
        box = [obj]
        with self.guarded():
            dist.broadcast_object_list(box, source, group=self._control, device=torch.device("cpu"))
        return box[0]

    def gather(self, obj: Any) -> list[Any] | None:
        """The objects of all ranks on rank 0, in order; None elsewhere."""
        # `gather_object` moves through tensors of the size of the largest; a checkpoint's parts
        # differ a lot.
        if self.rank:
            self._send_object(obj)
            return None
        return [obj, *(self._receive_object(rank) for rank in range(1, self.size))]

    def to_writer(self, obj: Any, source: int) -> Any:
        """One rank's object on rank 0; None elsewhere."""
        if source == self.rank:
            if source:
                self._send_object(obj)
            return None if source else obj
        return None if self.rank else self._receive_object(source)

    def _send_object(self, obj: Any) -> None:
        data = object_bytes(obj)
        with self.guarded():
            dist.send(torch.tensor([data.numel()]), 0, group=self._control)
            dist.send(data, 0, group=self._control)

    def _receive_object(self, rank: int, tag: int = 0) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        with self.guarded(rank):
            dist.recv(size, rank, group=self._control, tag=tag)
            data = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(data, rank, group=self._control, tag=tag)
        return object_from(data)

    def spread(self, obj: Any, source: int) -> Any:
        """One rank's object, with tensors of any size, on all ranks."""
        data = object_bytes(obj) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        with self.guarded():
            dist.broadcast(size, source, group=self._control)
            if self.rank != source:
                data = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, source, group=self._control)
        return obj if self.rank == source else object_from(data)

    def add_up(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """The sum (or maximum) over all ranks, in the host's memory."""
        total = tensor.detach().cpu().clone()
        with self.guarded():
            operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(total, operation, group=self._control)
        return total

    def any_replica(self, value: bool) -> bool:
        """Whether it is true on one of this stage's replicas."""
        if self.num_replicas == 1:
            return value
        flag = torch.tensor([int(value)])
        with self.guarded():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._hosts)
        return bool(flag.item())

    def announce(self, value: int) -> int:
        """The first stage's value, for the later stages of its replica.

        The first stage does not wait, so nobody falls out of step: it comes here first.
        """
        if self.stage == 0:
            for stage in range(1, self.num_stages):
                self._post(torch.tensor([value]), self.rank_of(stage, self.replica), _DECISIONS)
            return value
        found, source = torch.zeros(1, dtype=torch.int64), self.rank_of(0, self.replica)
        with self.guarded(source):
            dist.recv(found, source, group=self._control, tag=_DECISIONS)
        return int(found)

    def decide(self, value: bool) -> bool:
        """What the first stage of replica 0 thinks, for all; without waiting for later stages."""
        if self.stage == 0 and self.num_replicas > 1:
            flag = torch.tensor([int(value)])
            with self.guarded():
                dist.broadcast(flag, self.leader, group=self._hosts)
            value = bool(flag.item())
        return bool(self.announce(int(value)))

    def report(self, obj: Any) -> list[Any] | None:
        """Objects of all stages on the last one, in order; None on the others, which don't wait."""
        if self.stage < self.num_stages - 1:
            data = object_bytes(obj)
            to = self.rank_of(self.num_stages - 1, self.replica)
            self._post(torch.tensor([data.numel()]), to, _REPORTS)
            self._post(data, to, _REPORTS)
            return None
        before = (self.rank_of(stage, self.replica) for stage in range(self.num_stages - 1))
        return [*(self._receive_object(rank, _REPORTS) for rank in before), obj]

    def _post(self, tensor: torch.Tensor, rank: int, tag: int) -> None:
        with self.guarded():
            work = dist.isend(tensor, rank, group=self._control, tag=tag)
            assert work is not None
            self._pending.append((work, tensor))
            while len(self._pending) > _PENDING:
                self._pending.popleft()[0].wait()

    def settle(self) -> None:
        """Waits until everything posted has arrived."""
        with self.guarded():
            while self._pending:
                self._pending.popleft()[0].wait()


def _group(ranks: list[int] | None, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """A new group; processes outside get what torch stands in for it."""
    made: Any = dist.new_group(ranks, timeout, backend)
    group: dist.ProcessGroup = made
    return group
