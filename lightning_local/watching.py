"""What looks at the local modules while they train: profilers, and a meter of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_local.meter import Meter

__all__ = ["Watch"]


class Watch:
    """Contexts around the local modules' shares of a step.

    Args:
        trainer: Its profiler is told which local module runs.
        num_modules: K.

    Attributes:
        meter: Measures memory while it is there.
    """

    def __init__(self, trainer: pl.Trainer, num_modules: int) -> None:
        # Lightning's connectors set it, out of mypy's sight.
        self._profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        self._names = [f"local/{k:02d}" for k in range(num_modules)]
        self.meter: Meter | None = None

    def metered(self, k: int) -> AbstractContextManager[None]:
        """What happens inside counts for local module k."""
        return self.meter.module(k) if self.meter is not None else nullcontext()

    @contextmanager
    def profiled(self, k: int) -> Iterator[None]:
        """The same, and profilers see it under the local module's name."""
        if len(self._names) == 1:
            with self.metered(k):
                yield
            return
        with (
            self.metered(k),
            self._profiler.profile(self._names[k]),
            torch.autograd.profiler.record_function(self._names[k]),
        ):
            yield
