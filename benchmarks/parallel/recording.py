"""When the local modules compute and wait: the training loop's methods, timed from outside.

And what follows from it: the method's own bound on the time of a step in several stages.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

# Spans that hold a message's packing and all waiting for neighbours.
HANDING_OVER = ("fetch", "await", "send", "return")
# Kind, local module (-1: unknown), batch, start and end.
Span = tuple[str, int, int, Any, Any]


class Clock:
    """Moments that all processes of a machine share.

    Args:
        device: On CUDA, moments of its stream; the host does not wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._event: Any = None
        self._host = 0.0
        if self._cuda:
            torch.cuda.synchronize()
            self._event = self.now()
            torch.cuda.synchronize()
            self._host = time.perf_counter()

    def now(self) -> Any:
        """This moment."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: Any) -> float:
        """A moment on the host's clock."""
        if not self._cuda:
            return float(moment)
        moment.synchronize()
        return self._host + self._event.elapsed_time(moment) / 1000


def _unknown(*args: Any) -> int:
    return -1


def _first(k: int, *args: Any) -> int:
    return k


class Recorder(L.Callback):
    """Notes the end of every batch and, of a `LocalLearner`, what its loop does and when.

    Args:
        device: Known outside of Lightning only.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.spans: list[Span] = []
        self.ends: list[Any] = []
        self.owned = range(0)
        self.clock: Any = None if device is None else Clock(device)

    def wrap(self, owner: Any, name: str, kind: str, index: Callable[..., int] = _unknown) -> None:
        """Times a method of one object from now on."""
        inner, now = getattr(owner, name), self.clock.now

        def timed(*args: Any, **options: Any) -> Any:
            start = now()
            try:
                return inner(*args, **options)
            finally:
                self.spans.append((kind, index(*args), len(self.ends), start, now()))

        setattr(owner, name, timed)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Hangs itself on the loop, once."""
        if self.clock is not None:
            return
        self.clock = Clock(trainer.strategy.root_device)
        loop = getattr(module, "loop", None)
        if loop is None:
            return
        self.owned = loop.owned
        self.wrap(loop, "_start", "start", _first)
        self.wrap(loop, "_finish", "finish", _first)
        self.wrap(loop, "_forward", "forward", _first)
        self.wrap(loop.coupling, "prepare", "backward")
        self.wrap(loop.coupling, "backward", "backward")
        self.wrap(loop.coupling, "link", "link")
        self.wrap(loop.stepping, "step", "step", _first)
        self.wrap(module.links, "send", "send", lambda k, *args: k - 1)
        self.wrap(module.links, "return_error", "return", lambda k, *args: k + 1)
        self.wrap(module.links, "await_error", "await", _first)
        if hasattr(module.links, "fetch"):
            self.wrap(module.links, "fetch", "fetch")

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """Notes the end."""
        self.ends.append(self.clock.now())

    def result(self, options: Any) -> dict[str, Any]:
        """Seconds of a step, of each local module, and what was done when in a few batches."""
        ends = [self.clock.seconds(end) for end in self.ends]
        first = options.warm_up
        last = first + options.batches  # the ones behind it keep the other stages at work
        shown = range(first, min(last, first + options.shown))
        exact = [
            (kind, k, t, self.clock.seconds(start), self.clock.seconds(end))
            for kind, k, t, start, end in self.spans
            if first <= t < last
        ]
        return {
            "owned": list(self.owned),
            "step": (ends[last - 1] - ends[first - 1]) / options.batches,
            "times": times_of(exact, self.owned),
            "handing over": {
                kind: sum(end - start for name, _, _, start, end in exact if name == kind)
                / options.batches
                for kind in HANDING_OVER
            },
            "spans": [span for span in exact if span[2] in shown],
        }


@dataclass
class Times:
    """Mean seconds of a local module in a batch, without waiting for neighbours.

    Attributes:
        sent: From its start to the hidden state's leaving.
        returned: From its start to the boundary error's leaving; 0 if there is none.
        start: Forward and own backward, with all around them.
        finish: The successor's error, and the optimizer's step.
    """

    sent: float
    returned: float
    start: float
    finish: float

    @property
    def own(self) -> float:
        """All its work."""
        return self.start + self.finish


def times_of(spans: Sequence[Span], owned: Sequence[int]) -> dict[int, Times]:
    """The mean over batches for each local module."""
    found: dict[tuple[int, int], dict[str, tuple[float, float]]] = {}
    for kind, k, t, start, end in spans:
        found.setdefault((k, t), {})[kind] = (start, end)
    mean: dict[int, Times] = {}
    for k in owned:
        rows = []
        for (module, _), marks in found.items():
            if module != k or not {"start", "finish"} <= set(marks):
                continue
            begin, end = marks["start"]
            send = marks.get("send", (end, end))
            back = marks.get("return", (begin, begin))
            sending, returning = send[1] - send[0], back[1] - back[0]
            waited = marks["await"][1] - marks["await"][0] if "await" in marks else 0.0
            rows.append(
                (
                    send[0] - begin,
                    back[0] - begin - (sending if back[0] > begin else 0.0),
                    end - begin - sending - returning,
                    marks["finish"][1] - marks["finish"][0] - waited,
                )
            )
        mean[k] = Times(*(statistics.fmean(column) for column in zip(*rows, strict=True)))
    return mean


def bound(times: dict[int, Times], stages: Sequence[range]) -> float:
    """Least seconds between two batches, if messages took no time (see README).

    Each stage has its own work to do; and where its last local module waits for its successor's
    error, that one's forward and backward lie between the message and the link.
    """
    least = []
    for s, owned in enumerate(stages):
        least.append(sum(times[k].own for k in owned))
        last = owned[-1]
        if s + 1 < len(stages) and (error := times[stages[s + 1][0]].returned):
            before = sum(times[k].start for k in owned[:-1]) + times[last].sent
            before += sum(times[k].finish for k in owned[:-2])
            least.append(before + error + times[last].finish)
    return max(least)


def as_stages(sizes: Sequence[int]) -> list[range]:
    """Runs of so many local modules each."""
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def best_sizes(times: dict[int, Times], num_stages: int, first: int | None = None) -> list[int]:
    """How many local modules to give to each stage.

    Args:
        times: Of all local modules.
        num_stages: How many stages.
        first: How many the first one gets; default as many as is best.
    """
    count, choices = len(times), []
    for cuts in itertools.combinations(range(1, count), num_stages - 1):
        sizes = [b - a for a, b in itertools.pairwise((0, *cuts, count))]
        if first is None or sizes[0] == first:
            choices.append((bound(times, as_stages(sizes)), sizes))
    return min(choices)[1]
