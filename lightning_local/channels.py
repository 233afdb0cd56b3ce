"""One direction between two processes: a queue that a thread of its own sends or receives.

The training loop never waits in a communication library: it waits for a Python queue, so signals
and news of failures reach it at once, and messages move while it computes. On CUDA everything runs
on a stream of the thread's own; events put the streams in order, and the host waits for none.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from lightning_local.alarm import Alarm
from lightning_local.transport import Packed, pack
from lightning_local.wire import Received, Wire

__all__ = ["Inbox", "Outbox"]

# Seconds between looks for news while the main thread waits.
_LOOK = 0.2
_CLOSE = "close"


def wait_for(
    ready: Callable[[float], bool], check: Callable[[], None], timeout: float, what: str
) -> None:
    """Waits in the main thread, with an eye on signals and news.

    Args:
        ready: Waits up to some seconds, and says whether it is over.
        check: Raises if there is no point in waiting.
        timeout: Seconds.
        what: For whom we wait.

    Raises:
        TimeoutError: It took longer.
    """
    end = time.monotonic() + timeout
    while not ready(_LOOK):
        check()
        if time.monotonic() > end:
            raise TimeoutError(
                f"Waited {timeout:.0f} s for {what}: pass LocalParallelStrategy(timeout=...) if it "
                "may take longer."
            )


class Outbox:
    """Sends objects in order; `put` waits until the one before is taken.

    Args:
        wire: To the peer.
        name: Of the peer, for errors.
        alarm: Says if something failed elsewhere.
        timeout: Seconds to wait for the peer.
    """

    def __init__(self, wire: Wire, name: str, alarm: Alarm, timeout: float) -> None:
        self._wire = wire
        self._name = name
        self._alarm = alarm
        self._timeout = timeout
        self._queue: queue.SimpleQueue[tuple[Packed, Any]] = queue.SimpleQueue()
        self._free = threading.Semaphore(1)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"to {name}", daemon=True)
        self._thread.start()

    def put(
        self,
        obj: Any,
        batch: Any = None,
        hidden: Collection[int] = (),
        fresh: Collection[int] | None = None,
    ) -> None:
        """Hands an object and a batch over (see `pack`); they are sent in the background."""
        packed = pack(obj, batch, hidden, fresh)
        wait_for(
            lambda seconds: self._free.acquire(timeout=seconds),
            self._look,
            self._timeout,
            f"{self._name} to take a message",
        )
        self._look()
        self._queue.put((packed, self._wire.now()))

    def _look(self) -> None:
        self._alarm.check()
        if self.error is not None:
            self._alarm.await_news()
            raise ConnectionError(f"The connection to {self._name} is lost.") from self.error

    def _run(self) -> None:
        self._wire.enter_thread()
        try:
            while True:
                packed, event = self._queue.get()
                self._wire.send(packed, event)
                self._free.release()
                if packed is self._last:
                    return
        except BaseException as error:
            self.error = error
            self._free.release()

    _last: Packed | None = None

    def close(self) -> None:
        """Sends what is left, then word of the end."""
        self._last = pack(_CLOSE)
        self._queue.put((self._last, None))

    def join(self, seconds: float) -> None:
        """Waits for the thread."""
        self._thread.join(seconds)


class Inbox:
    """Receives objects in order, some of them ahead of the one that is asked for.

    Args:
        wire: From the peer.
        ahead: How many are received before they are asked for.
        name: Of the peer, for errors.
        alarm: Says if something failed elsewhere.
        timeout: Seconds to wait for the peer.
    """

    def __init__(self, wire: Wire, ahead: int, name: str, alarm: Alarm, timeout: float) -> None:
        self._wire = wire
        self._name = name
        self._alarm = alarm
        self._timeout = timeout
        self._queue: queue.Queue[Received | None] = queue.Queue()
        self._slots = threading.Semaphore(ahead)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"from {name}", daemon=True)
        self._thread.start()

    def get(self) -> tuple[Any, Any]:
        """The next object and batch."""
        found: list[Received | None] = []

        def ready(seconds: float) -> bool:
            try:
                found.append(self._queue.get(timeout=seconds))
            except queue.Empty:
                return False
            return True

        self._alarm.check()
        self._slots.release()
        wait_for(ready, self._look, self._timeout, f"a message of {self._name}")
        if found[0] is None:
            self._look()
        assert found[0] is not None
        return self._wire.take(found[0])

    def _look(self) -> None:
        self._alarm.check()
        if self.error is not None and self._queue.empty():
            self._alarm.await_news()
            raise ConnectionError(f"The connection to {self._name} is lost.") from self.error

    def _run(self) -> None:
        self._wire.enter_thread()
        try:
            while True:
                self._slots.acquire()
                received = self._wire.receive()
                if isinstance(received.obj[0], str) and received.obj[0] == _CLOSE:
                    return
                self._queue.put(received)
        except BaseException as error:
            self.error = error
            self._queue.put(None)

    def close(self) -> None:
        """Lets the thread take the peer's word of the end."""
        self._slots.release()

    def join(self, seconds: float) -> None:
        """Waits for the thread."""
        self._thread.join(seconds)
