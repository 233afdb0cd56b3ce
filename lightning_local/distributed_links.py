"""Links between local modules in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_local.alarm import Alarm
from lightning_local.channels import Inbox, Outbox
from lightning_local.links import InProcessLinks
from lightning_local.message import Fed, Message
from lightning_local.processes import Processes
from lightning_local.replicas import Replicas
from lightning_local.wire import Wire

__all__ = ["DistributedLinks"]

# Kinds of messages: with a batch; the rest of the epoch is left out; there is no batch this time.
_BATCH, _SKIP, _NONE = range(3)


class DistributedLinks(InProcessLinks):
    """Neighbours within a stage in this process, those at its ends in others.

    Args:
        processes: Who is where.
        in_flight: How many batches a stage may be ahead of the next one.
        send_input: Whether the last stage gets the network's input as part of the batch.

    Attributes:
        stop: All stages end after this batch.
        where: Which batch of the run this process is at: phase, epoch, number.
    """

    of_strategy = True

    def __init__(self, processes: Processes, in_flight: int, send_input: bool) -> None:
        super().__init__()
        self._processes = processes
        self._send_input = send_input
        self.alone = processes.size == 1
        stage, self.first = processes.stage, processes.stage == 0
        self.last = stage == processes.num_stages - 1
        self.replica = processes.replica
        self._owned: range | None = None
        self._hidden: frozenset[int] = frozenset()
        self.stop = False
        self.where: tuple[str, int, int] = ("", 0, 0)
        self._replicas: Replicas | None = None
        if processes.num_replicas > 1:
            self._replicas = Replicas(
                processes.data_group,
                processes.data_hosts,
                processes.num_replicas,
                processes.rank_of(stage, 0),
            )
        self._to_next = self._from_next = self._to_previous = self._from_previous = None
        if not self.last:
            self._to_next = self._outbox(stage + 1)
            self._from_next = self._inbox(stage + 1, 1)
        if not self.first:
            self._to_previous = self._outbox(stage - 1)
            self._from_previous = self._inbox(stage - 1, in_flight - 1)

    def _wire(self, stage: int, source: int) -> tuple[Wire, str, Alarm, float]:
        processes = self._processes
        peer = processes.rank_of(stage, processes.replica)
        pair = (processes.rank, peer) if source == processes.stage else (peer, processes.rank)
        forward = source < (stage if source == processes.stage else processes.stage)
        group = processes.forward if forward else processes.backward
        wire = Wire(peer, group, processes.direct.get(pair), processes.device)
        name = processes.describe(stage, processes.replica)
        return wire, name, processes.alarm, processes.timeout.total_seconds()

    def _outbox(self, stage: int) -> Outbox:
        wire, name, alarm, timeout = self._wire(stage, self._processes.stage)
        return Outbox(wire, name, alarm, timeout)

    def _inbox(self, stage: int, ahead: int) -> Inbox:
        wire, name, alarm, timeout = self._wire(stage, stage)
        return Inbox(wire, ahead, name, alarm, timeout)

    def place(self, stages: Sequence[range]) -> None:
        """Sets the local modules of each stage."""
        self.stages = stages
        self._owned = stages[self._processes.stage]

    def owned(self, num_modules: int) -> range:
        """The local modules of this process."""
        return range(num_modules) if self._owned is None else self._owned

    @property
    def replicas(self) -> Replicas | None:
        """The other processes with the same local modules."""
        return self._replicas

    def hide(self, inputs: Iterable[Any]) -> None:
        """The network's inputs of a batch, which later stages do not get as part of it."""
        if not self._send_input:
            self._hidden = frozenset(id(v) for v in inputs if isinstance(v, torch.Tensor))

    def send(self, k: int, message: Message) -> None:
        """Keeps the message, or lets it leave; it is on its way before this returns."""
        assert self._owned is not None
        if k in self._owned:
            super().send(k, message)
            return
        assert self._to_next is not None
        parts = (message.values, message.target, message.input, message.gradient)
        head = (self.where, self.stop, _BATCH, message.batch_idx)
        # What the user's loader and buffers hold may be overwritten; what was computed is not.
        computed = (*message.values[:1], message.gradient) if self.first else None
        fresh = None if computed is None else frozenset(map(id, computed))
        self._to_next.put((*head, parts), message.batch, self._hidden, fresh)
        self._hidden = frozenset()

    def fetch(self) -> Any:
        """The next message of the stage before; it waits here for the first local module.

        Returns:
            The batch, as far as it was sent.
        """
        assert self._owned is not None
        assert self._from_previous is not None
        (there, self.stop, kind, batch_idx, parts), batch = self._from_previous.get()
        if there != self.where:
            raise RuntimeError(
                f"The stage before sent batch {there[2]} of {there[0]} in epoch {there[1]}, and "
                f"this one is at batch {self.where[2]} of {self.where[0]} in epoch "
                f"{self.where[1]}: a sampler or loader has another length than it says, or "
                "trainer.should_stop was set on one stage alone."
            )
        self.skipped = kind == _SKIP
        if kind == _NONE:
            self.leave_out()
        if kind != _BATCH:
            return Fed() if self.skipped else None
        values, target, given, gradient = parts
        message = Message(values, target, batch, batch_idx, given, gradient)
        super().send(self._owned[0], message)
        return batch

    def leave_out(self) -> None:
        """Tells the later stages that there is no batch this time."""
        if self._to_next is not None:
            self._to_next.put((self.where, self.stop, _NONE, 0, None))

    def skip(self) -> None:
        """Tells the later stages that this batch, and the rest of the epoch, is left out."""
        if self._to_next is not None:
            self._to_next.put((self.where, self.stop, _SKIP, 0, None))

    def return_error(self, k: int, error: torch.Tensor) -> None:
        """Keeps the error, or lets it leave."""
        assert self._owned is not None
        if k in self._owned:
            super().return_error(k, error)
            return
        assert self._to_previous is not None
        self._to_previous.put(error)

    def await_error(self, k: int) -> torch.Tensor:
        """Gives the error away, or waits for it."""
        assert self._owned is not None
        if k + 1 in self._owned:
            return super().await_error(k)
        assert self._from_next is not None
        error: torch.Tensor = self._from_next.get()[0]
        return error

    def average(
        self, k: int, parameters: Iterable[torch.nn.Parameter]
    ) -> Callable[[], None] | None:
        """Starts to average gradients of local module `k` over its replicas."""
        if self._replicas is None:
            return None
        return self._replicas.average(k, parameters).wait

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What is made where the data of replica 0 are read, for all processes."""
        processes = self._processes
        made = make() if processes.rank == processes.leader else None
        return processes.broadcast(made, processes.leader)

    def gather(self, part: Any) -> list[list[Any]] | None:
        """Parts by stage and replica on rank 0; None elsewhere."""
        processes = self._processes
        found = processes.gather(part)
        if found is None:
            return None
        return [
            [found[processes.rank_of(s, d)] for d in range(processes.num_replicas)]
            for s in range(processes.num_stages)
        ]

    def report(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values of all stages for the last one; nothing for the others, which don't wait."""
        reports = self._processes.report(values)
        merged: dict[str, Any] = {}
        for report in reports or ():
            merged.update(report)
        return merged

    def decide(self, value: bool) -> bool:
        """What the first stage of replica 0 thinks, for all."""
        return self._processes.decide(value)

    def share(self, values: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's values, for all, which wait for it."""
        shared: dict[str, Any] = self._processes.broadcast(values, 0)
        return shared

    @contextmanager
    def reasons(self) -> Iterator[None]:
        """An error inside gives way to an earlier stage's, of which it may be the result."""
        try:
            yield
        except FloatingPointError:
            # Each waits longer than the one before it, which speaks when its own wait is over.
            if not self.first:
                self._processes.alarm.await_news(3.0 * self._processes.stage)
            raise

    def add_up(self, counts: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """The sum, or maximum, over all processes."""
        return self._processes.add_up(counts, largest)

    def close(self, seconds: float = 10.0) -> None:
        """Ends the connections; all processes have to do it, when nothing is under way."""
        outboxes = [box for box in (self._to_next, self._to_previous) if box is not None]
        inboxes = [box for box in (self._from_next, self._from_previous) if box is not None]
        for outbox in outboxes:
            outbox.close()
        for inbox in inboxes:
            inbox.close()
        for outbox in outboxes:
            outbox.join(seconds)
        for inbox in inboxes:
            inbox.join(seconds)
