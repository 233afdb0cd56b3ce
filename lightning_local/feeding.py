"""Where batches come from on each stage: the first reads the data, the others are fed by it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_local.message import Fed
from lightning_local.processes import Processes

__all__ = ["feed"]


class _Around:
    """Looks like the user's loader.

    Args:
        loader: It.
        processes: Who is where.
    """

    def __init__(self, loader: Any, processes: Processes) -> None:
        self._loader = loader
        self._processes = processes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_processes"):
            raise AttributeError(name)
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)  # of the classes that say so
        return getattr(self._loader, name)

    def __len__(self) -> int:
        """The loader's."""
        return len(self._loader)


class _FedLoader(_Around):
    """As many batches as the first stage reads; the user's loader is never iterated here."""

    def __iter__(self) -> Iterator[Any]:
        if _is_certain(self._loader):
            for _ in range(len(self._loader)):
                yield Fed()
            return
        while self._processes.announce(1):
            yield Fed()


class _StatefulFedLoader(_FedLoader):
    """The same for a loader that can say where it is, on the first stage."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the first stage's counts."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to go on with."""


class _Announcing(_Around):
    """Tells the later stages of every batch, and of the end."""

    def __iter__(self) -> Iterator[Any]:
        # Now, not with the first batch: a loader's iterator draws random numbers when it is made.
        return self._announced(iter(self._loader))

    def _announced(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._processes.announce(1)
            yield batch
        self._processes.announce(0)


class _StatefulAnnouncing(_Announcing):
    """The same for a loader that can say where it is."""

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the loader go on."""
        self._loader.load_state_dict(state_dict)


def _is_certain(loader: Any) -> bool:
    """Whether the number of batches is sure before they are read: samplers are torch's own."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if type(loader.sampler) not in (RandomSampler, SequentialSampler, DistributedSampler):
        return False
    own = type(loader).__iter__ is not DataLoader.__iter__  # of a subclass: it may stop early
    return type(loader.batch_sampler) is BatchSampler and not own


def feed(loader: Any, processes: Processes) -> Any:
    """What Lightning is to iterate on this stage.

    Args:
        loader: The user's, with the sampler that Lightning gave it.
        processes: Who is where.
    """
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    if processes.stage > 0:
        return (_StatefulFedLoader if stateful else _FedLoader)(loader, processes)
    seeded = int(os.environ.get("PL_SEED_WORKERS", "0"))
    if seeded and getattr(loader, "worker_init_fn", True) is None:
        # As Lightning does next, but by the place among the readers: rank 0 reads nothing.
        loader.worker_init_fn = partial(pl_worker_init_function, rank=processes.replica)
    if processes.num_stages == 1 or _is_certain(loader):
        return loader
    return (_StatefulAnnouncing if stateful else _Announcing)(loader, processes)
