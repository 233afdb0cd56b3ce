"""Batches made on the device, from images that stay there, in an order that a cut run resumes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch

from examples.image_classification.data import StoredDataModule
from examples.image_classification.images import ImageDataset

__all__ = ["OnDevice"]

Batch = tuple[torch.Tensor, torch.Tensor]


class _Loader:
    """A loader whose batches depend on seed, epoch and number alone.

    Args:
        images: The data set, on the device.
        batch_size: Images per batch.
        seed: Of order and augmentation; None: all in order, as they are.
        epoch: Tells the epoch.
    """

    def __init__(
        self, images: ImageDataset, batch_size: int, seed: int | None, epoch: Callable[[], int]
    ) -> None:
        self.images, self.batch_size, self.seed, self.epoch = images, batch_size, seed, epoch
        self._first = self._next = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first % len(self), 0
        epoch, order = self.epoch(), torch.arange(len(self.images))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            order = torch.randperm(len(self.images), generator=generator)
        for number, chosen in enumerate(order.split(self.batch_size)):
            if number < first:
                continue
            self._next = number + 1
            if self.seed is None:
                yield self._batch(chosen)
                continue
            # The data set draws from the CPU's global generator, which is put back.
            state = torch.get_rng_state()
            torch.default_generator.manual_seed((1000 * self.seed + epoch) * 100_000 + number)
            batch = self._batch(chosen)
            torch.set_rng_state(state)
            yield batch

    def _batch(self, chosen: torch.Tensor) -> Batch:
        x, y = self.images.__getitems__(chosen)
        return x.contiguous(memory_format=torch.channels_last), y

    def state_dict(self) -> dict[str, Any]:
        """Where in the epoch it is."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there."""
        self._first = state["next"]


class OnDevice(L.LightningDataModule):
    """The images of another data module, uint8 on the training device.

    Args:
        stored: Which images.
        seed: Of order and augmentation.
        train_size: How many training images are used; 0 for all.

    Raises:
        ValueError: There are fewer.
    """

    def __init__(self, stored: StoredDataModule, seed: int, train_size: int = 0) -> None:
        super().__init__()
        self.stored, self.seed = stored, seed
        self._train = stored.parts.train
        if not 0 <= train_size <= len(self._train):
            raise ValueError(
                f"--train-size {train_size}: there are {len(self._train)} training images; "
                "0 takes all."
            )
        if train_size:
            chosen = stored.shuffled(len(self._train))[:train_size]
            self._train = copy.copy(self._train)
            self._train.images = self._train.images[chosen]
            self._train.labels = self._train.labels[chosen]

    def _loader(self, part: ImageDataset, batch_size: int, seed: int | None) -> _Loader:
        assert self.trainer is not None
        device, trainer = self.trainer.strategy.root_device, self.trainer
        return _Loader(part.to(device), batch_size, seed, lambda: trainer.current_epoch)

    def train_dataloader(self) -> _Loader:
        """Shuffled and augmented."""
        return self._loader(self._train, self.stored.batch_size, self.seed)

    def val_dataloader(self) -> _Loader:
        """In order."""
        return self._loader(self.stored.parts.val, 1000, None)
