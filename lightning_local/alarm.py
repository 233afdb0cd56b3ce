"""Bad news: told to all processes of a run by the one that has it."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

__all__ = ["Alarm", "StageError"]

# Bytes of a call; of a longer text the end counts, where a traceback says what happened.
_SIZE = 1 << 15
_FAILURE, _STOP, _END = 1, 2, 3
# Tags: calls of anybody, and the line to the neighbour that says nothing while it lives.
_CALLS, _LIFE = 0, 1
# Seconds that a process has to end by itself once it is known that it can't go on.
_GRACE = 12.0
# Seconds between the loss of a connection and its reason, where there is one.
_REASON = 1.0


class StageError(RuntimeError):
    """Another process of this run failed; the text says which stage, and how."""


class Alarm:
    """Listens in threads of its own, so that it hears even while everything else is blocked.

    Each process also watches one neighbour: of a process that is killed nobody else may notice.

    Args:
        group: gloo group of all processes that nothing else uses.
        rank: Global rank of this process.
        size: Number of processes.
        describe: A rank in words.

    Attributes:
        failure: What another process said when it failed.
        stop: A process was asked to end, by a signal.
    """

    def __init__(
        self, group: dist.ProcessGroup, rank: int, size: int, describe: Callable[[int], str]
    ) -> None:
        self._group = group
        self._rank = rank
        self._size = size
        self._describe = describe
        self.failure: str | None = None
        self.stop = threading.Event()
        self._told = self._closed = False
        self._threads = [
            threading.Thread(target=run, name="alarm", daemon=True)
            for run in (self._listen, self._watch)
        ]
        if size > 1:
            _ending.register()
            for thread in self._threads:
                thread.start()

    def _listen(self) -> None:
        data = torch.empty(_SIZE, dtype=torch.uint8)
        try:
            while True:
                dist.recv(data, None, group=self._group, tag=_CALLS)
                raw = data.numpy().tobytes()
                size = int.from_bytes(raw[1:5], "little")
                if raw[0] == _END:
                    return
                if raw[0] == _STOP:
                    self.stop.set()
                else:
                    self._note(raw[5 : 5 + size].decode(errors="replace"))
        except BaseException:
            # The group is gone: the neighbour's watch, or a message, tells why.
            return

    def _watch(self) -> None:
        neighbour = (self._rank - 1) % self._size
        try:
            dist.recv(torch.empty(1, dtype=torch.uint8), neighbour, group=self._group, tag=_LIFE)
        except BaseException:
            time.sleep(_REASON)
            if self.failure is None and not self._told:
                where = self._describe(neighbour)
                text = f"S{where[1:]} is gone: its process ended without a word (killed?)."
                self._note(text)
                self._call(_FAILURE, text, self._others())

    def _note(self, text: str) -> None:
        if self.failure is None:
            self.failure = text
            _end_soon(text)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _call(self, kind: int, text: str, ranks: list[int]) -> None:
        raw = text.encode()[-(_SIZE - 5) :]
        data = bytearray(_SIZE)
        data[0] = kind
        data[1:5] = len(raw).to_bytes(4, "little")
        data[5 : 5 + len(raw)] = raw
        self._send([(torch.frombuffer(data, dtype=torch.uint8), rank, _CALLS) for rank in ranks])

    def _send(self, calls: list[tuple[torch.Tensor, int, int]]) -> None:
        def send(tensor: torch.Tensor, rank: int, tag: int) -> None:
            try:
                dist.send(tensor, rank, group=self._group, tag=tag)
            except Exception:
                return  # it has ended already

        threads = [threading.Thread(target=send, args=call, daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 2.0
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def tell_failure(self, text: str) -> None:
        """Lets all others end, with this text; this process has to end, too."""
        if self._told or self._closed:
            return
        self._told = True
        self._call(_FAILURE, text, self._others())
        _end_soon(None)

    def ask_to_stop(self, rank: int) -> None:
        """Hands on that this process was asked to end."""
        if rank == self._rank:
            self.stop.set()
        else:
            self._call(_STOP, "", [rank])

    def check(self) -> None:
        """Raises if another process failed.

        Raises:
            StageError: With what it said.
        """
        if self.failure is not None:
            raise StageError(self.failure) from None

    def await_news(self, seconds: float = 2 * _REASON) -> None:
        """Waits for what may be the reason of a broken connection, and raises it.

        Raises:
            StageError: With what another process said.
        """
        end = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.02)
        self.check()

    def close(self) -> None:
        """Ends the neighbour's listening, as another neighbour ends this one's."""
        self._closed = True
        if self._size > 1:
            neighbour = (self._rank + 1) % self._size
            self._call(_END, "", [neighbour])
            self._send([(torch.zeros(1, dtype=torch.uint8), neighbour, _LIFE)])
            for thread in self._threads:
                thread.join(5.0)


class _Ending:
    """Ends the interpreter of a run that failed without waiting for threads that can't end.

    They are blocked in the communication library, which aborts a process that leaves otherwise.
    What the user has registered since the start of the run is called before.
    """

    def __init__(self) -> None:
        self.failed = False
        self._registered = False

    def register(self) -> None:
        """At the start of a run."""
        if not self._registered:
            self._registered = True
            atexit.register(self._leave)

    def _leave(self) -> None:
        if self.failed:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


_ending = _Ending()


def _end_soon(text: str | None) -> None:
    """Ends this process if it is still there after a while: it may be blocked for good."""
    _ending.failed = True

    def end() -> None:
        time.sleep(_GRACE)
        reason = text or "This process failed, the run has ended, and it is still there: it ends."
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=end, name="last resort", daemon=True).start()
