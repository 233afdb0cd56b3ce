"""Images in memory as batches: a data set that is indexed with a whole batch at once, and loaders.

Images stay uint8 until a batch asks for them. Cropping, mirroring and normalising are then a few
tensor operations per batch, and no worker process is needed. A batch is `(x, y)`: `x` is the
network's input exactly as the network gets it, and nothing is left to do in a training step. Which
images these are, `digits.py` and `data.py` say.

Shapes: M images in the data set, N in a batch, C channels, H and W the image's sides.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["ImageDataModule", "ImageDataset", "Parts"]

Batch = tuple[Tensor, Tensor]


class ImageDataset(Dataset[Batch]):
    """Images in memory that come out normalised, a batch per access.

    Args:
        images: uint8 `(M, H, W, C)`.
        labels: int64 `(M,)`.
        mean: Mean per channel, in the units of `images`.
        std: Standard deviation per channel, in the same units.
        pad: With `pad` > 0 each image is shifted by up to that many pixels, drawn from torch's
            global generator; below the smaller side.
        reflect: What lies beyond the border: the image reflected, or (False) pixels of value 0.
        mirror: With `pad` > 0, mirror half of the images, left to right.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int = 0,
        reflect: bool = True,
        mirror: bool = True,
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.pad = pad
        self.reflect = reflect
        self.mirror = mirror

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """One image `(C, H, W)` and its label `()`."""
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Images `(N, C, H, W)` and labels `(N,)`; the data loader calls this with a batch."""
        chosen = torch.as_tensor(indices).to(self.images.device)
        images = self._shifted(chosen) if self.pad else self.images[chosen]
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return x.sub_(self.mean).div_(self.std), self.labels[chosen]

    def to(self, device: torch.device | str) -> "ImageDataset":
        """The same images on a device, where batches are then made."""
        moved = copy.copy(self)
        for name in ("images", "labels", "mean", "std"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def _shifted(self, chosen: Tensor) -> Tensor:
        """Padded, cropped and mirrored images `(N, H, W, C)`, in one gather of pixels."""
        count, device = len(chosen), chosen.device
        _, height, width, channels = self.images.shape
        # Drawn on the CPU, so that images are the same on every device.
        top, left = torch.randint(-self.pad, self.pad + 1, (2, count, 1)).to(device)
        rows = top + torch.arange(height, device=device)
        columns = left + torch.arange(width, device=device)
        if self.mirror:
            mirrored = torch.rand(count, 1).to(device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        first = chosen.view(-1, 1, 1) * (height * width)
        inner_rows, inner_columns = _reflect(rows, height), _reflect(columns, width)
        pixels = first + inner_rows.unsqueeze(2) * width + inner_columns.unsqueeze(1)
        gathered = self.images.view(-1, channels).index_select(0, pixels.flatten())
        gathered = gathered.view(count, height, width, channels)
        if not self.reflect:
            beyond = (rows != inner_rows).unsqueeze(2) | (columns != inner_columns).unsqueeze(1)
            gathered.masked_fill_(beyond.unsqueeze(3), 0)
        return gathered


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside of [0, size) mirrored at the first and last pixel, which count once."""
    position = position.abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)


class Parts(NamedTuple):
    """The three data sets of a data module."""

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset


def _as_is(batch: Any) -> Any:
    """Nothing is left to collate: what arrives is a `Batch`, not a list of samples."""
    return batch


class ImageDataModule(L.LightningDataModule, ABC):
    """Loaders over three image data sets. A subclass says how to get them.

    Args:
        batch_size: Images per batch, at least 1.
        seed: Of the split into training and validation images.

    Raises:
        ValueError: If `batch_size` is below 1.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: pass at least 1.")
        self.batch_size = batch_size
        self.seed = seed
        self._parts: Parts | None = None

    @abstractmethod
    def load_parts(self) -> Parts:
        """Load the images and split them; called once."""

    @property
    def parts(self) -> Parts:
        """The data sets, loaded when they are first asked for."""
        if self._parts is None:
            self._parts = self.load_parts()
        return self._parts

    def shuffled(self, count: int) -> Tensor:
        """The numbers 0..count-1 in an order, int64 `(count,)`, that depends on `seed` alone."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def setup(self, stage: str) -> None:
        """Load the images before the first loader is asked for."""
        _ = self.parts

    def _loader(self, dataset: ImageDataset, shuffle: bool = False) -> DataLoader[Batch]:
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, collate_fn=_as_is)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images, shuffled by torch's global generator."""
        return self._loader(self.parts.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation images, in a fixed order."""
        return self._loader(self.parts.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images, in a fixed order."""
        return self._loader(self.parts.test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images."""
        return self._loader(self.parts.test)
