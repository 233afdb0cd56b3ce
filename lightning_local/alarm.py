"""Bad news: told to all processes of a run by the one that has it."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

__all__ = ["Alarm", "StageError"]

# Bytes of a call; of a longer text the end counts, where a traceback says what happened.
_SIZE = 1 << 15
_FAILURE, _STOP, _END = 1, 2, 3
# Seconds that a process has to end by itself once it is known that it can't go on.
_GRACE = 12.0


class StageError(RuntimeError):
    """Another process of this run failed; the text says which stage, and how."""


class Alarm:
    """Listens in a thread of its own, so that it hears even while everything else is blocked.

    Args:
        group: gloo group of all processes that nothing else uses.
        rank: Global rank of this process.
        size: Number of processes.

    Attributes:
        failure: What another process said when it failed.
        stop: A process was asked to end, by a signal.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self._group = group
        self._rank = rank
        self._size = size
        self.failure: str | None = None
        self.stop = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)
        if size > 1:
            ending.register()
            self._thread.start()

    def _listen(self) -> None:
        data = torch.empty(_SIZE, dtype=torch.uint8)
        try:
            while True:
                dist.recv(data, None, group=self._group)
                raw = data.numpy().tobytes()
                size = int.from_bytes(raw[1:5], "little")
                if raw[0] == _END:
                    return
                if raw[0] == _STOP:
                    self.stop.set()
                elif self.failure is None:
                    self.failure = raw[5 : 5 + size].decode(errors="replace")
                    _end_soon(self.failure)
        except BaseException:
            # The group is gone: whoever waits for a message learns it there.
            return

    def _call(self, kind: int, text: str, ranks: list[int]) -> None:
        raw = text.encode()[-(_SIZE - 5) :]
        data = bytearray(_SIZE)
        data[0] = kind
        data[1:5] = len(raw).to_bytes(4, "little")
        data[5 : 5 + len(raw)] = raw
        tensor = torch.frombuffer(data, dtype=torch.uint8)

        def send(rank: int) -> None:
            try:
                dist.send(tensor, rank, group=self._group)
            except Exception:
                return  # it has ended already

        threads = [threading.Thread(target=send, args=(r,), daemon=True) for r in ranks]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 2.0
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def tell_failure(self, text: str) -> None:
        """Lets all others end, with this text; this process has to end, too."""
        if self._told:
            return
        self._told = True
        self._call(_FAILURE, text, [r for r in range(self._size) if r != self._rank])
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
            raise StageError(self.failure)

    def await_news(self, seconds: float) -> None:
        """Waits for what may be the reason of a broken connection, and raises it."""
        end = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.02)
        self.check()

    def close(self) -> None:
        """Ends the neighbour's listening, as another neighbour ends this one's."""
        if self._size > 1:
            self._call(_END, "", [(self._rank + 1) % self._size])
            self._thread.join(5.0)


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


ending = _Ending()


def _end_soon(text: str | None) -> None:
    """Ends this process if it is still there after a while: it may be blocked for good."""
    ending.failed = True

    def end() -> None:
        time.sleep(_GRACE)
        if text is not None:
            print(text, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=end, name="last resort", daemon=True).start()
