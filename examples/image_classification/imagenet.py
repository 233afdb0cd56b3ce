"""ImageNet, or any folder of images in its layout, read from disk by worker processes.

The small data sets are held in memory, see `data.py`.
"""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["ImageNetDataModule"]

Batch = tuple[Tensor, Tensor]


class ImageNetDataModule(L.LightningDataModule):
    """Images in folders `train/<class>/` and `val/<class>/`, as `torchvision.datasets.ImageFolder`.

    Training images are a random part (8 to 100 % of the area) resized to 224x224, and mirrored
    half of the time; the others are resized to 256 pixels on the smaller side, of which the middle
    224x224 are taken. All are normalised with ImageNet's usual mean and standard deviation.
    ImageNet's test images have no public labels: `val` serves for validation, test and prediction,
    as in the papers' tables, and nothing may be chosen by it then.

    Args:
        root: Folder that holds `train` and `val`.
        batch_size: Images per batch, at least 1.
        num_workers: Processes that read images for each loader, 0 (the main process) or more;
            default one per CPU core, at most 16.

    Raises:
        ValueError: If an argument is out of its range, or the two folders hold other classes.
        FileNotFoundError: If a folder is missing, before the first batch.
    """

    SIDE = 224
    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self, root: str, batch_size: int = 128, num_workers: int | None = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: pass at least 1.")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: pass 0 (the main process) or more.")
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = min(16, os.cpu_count() or 1) if num_workers is None else num_workers
        self._train: Dataset[Batch] | None = None
        self._val: Dataset[Batch] | None = None

    def setup(self, stage: str) -> None:
        """List the images, and check that both folders have the same classes."""
        if self._train is not None:
            return
        # Imported here, since no other data module needs torchvision.
        from torchvision.datasets import ImageFolder

        for name in ("train", "val"):
            if not (self.root / name).is_dir():
                raise FileNotFoundError(
                    f"root={str(self.root)!r} has no folder {name!r}: pass a folder with "
                    "train/<class>/*.JPEG and val/<class>/*.JPEG (`--data.root` on the command "
                    "line). The images of ILSVRC's validation archive have to be sorted into one "
                    "folder per class first."
                )
        train = ImageFolder(str(self.root / "train"), _transform(self.SIDE, self.MEAN, self.STD))
        val = ImageFolder(
            str(self.root / "val"), _transform(self.SIDE, self.MEAN, self.STD, augment=False)
        )
        if train.classes != val.classes:
            only = sorted(set(train.classes) ^ set(val.classes))
            raise ValueError(
                f"train and val in {self.root} must hold the same classes, and {len(only)} are in "
                f"one of them only, {only[0]!r} for instance: give both a folder per class."
            )
        self._train, self._val = train, val

    def _loader(self, dataset: Dataset[Batch] | None, shuffle: bool = False) -> DataLoader[Batch]:
        if dataset is None:
            raise RuntimeError("The images are not listed yet: call `setup` first.")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images, shuffled and augmented by torch's global generator."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The images of `val`, in a fixed order."""
        return self._loader(self._val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The images of `val`."""
        return self._loader(self._val)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The images of `val`."""
        return self._loader(self._val)


def _transform(
    side: int, mean: tuple[float, ...], std: tuple[float, ...], augment: bool = True
) -> Any:
    """From an image of any size to a normalised tensor `(3, side, side)`."""
    from torchvision import transforms

    cut = [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip()]
    if not augment:
        cut = [transforms.Resize(side * 8 // 7), transforms.CenterCrop(side)]
    return transforms.Compose([*cut, transforms.ToTensor(), transforms.Normalize(mean, std)])
