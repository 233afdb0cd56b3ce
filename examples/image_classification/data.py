"""Two data modules of real images: digits from scikit-learn, and CIFAR-10.

How images become batches stands in `images.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.image_classification.images import ImageDataModule, ImageDataset, Parts

__all__ = ["Cifar10DataModule", "DigitsDataModule"]


class DigitsDataModule(ImageDataModule):
    """1,797 scanned digits of 8x8 grey pixels, which scikit-learn ships: nothing is downloaded.

    Args:
        batch_size: Images per batch, at least 1.
        val_fraction: Share of the images for validation, above 0.
        test_fraction: Share of the images for the test, above 0.
        seed: Of the split, which depends on nothing else.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.2,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if val_fraction <= 0.0 or test_fraction <= 0.0 or val_fraction + test_fraction >= 1.0:
            raise ValueError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction}: pass two shares "
                "above 0 whose sum is below 1, so that training images are left."
            )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load_parts(self) -> Parts:
        """Read the digits and split them at random, by `seed`."""
        # Imported here, since scikit-learn is an extra.
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(3)
        labels = torch.from_numpy(digits.target.astype(np.int64))
        val = round(self.val_fraction * len(labels))
        test = round(self.test_fraction * len(labels))
        order = self.shuffled(len(labels))

        def part(chosen: Tensor) -> ImageDataset:
            # Pixels are in 0..16; mean and standard deviation of all images, rounded.
            return ImageDataset(images[chosen], labels[chosen], mean=[4.88], std=[6.02])

        return Parts(
            train=part(order[val + test :]), val=part(order[:val]), test=part(order[val:][:test])
        )


class Cifar10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 colour pixels, 10 classes.

    Exactly one source is given: `path`, a `.npz` file, or `torchvision_root`, a folder in the
    layout of `torchvision.datasets.CIFAR10`. Training images are padded by 4 reflected pixels,
    cropped and mirrored; all are normalised with the mean and standard deviation of the channels.

    Args:
        path: A `.npz` file with the images `x_train` and `x_test`, uint8 `(M, 32, 32, 3)`, and
            the labels `y_train` and `y_test`, integers `(M,)` in 0..9.
        torchvision_root: Folder that torchvision reads.
        download: Let torchvision download into `torchvision_root` what is missing there.
        batch_size: Images per batch, at least 1.
        augment: Crop and mirror the training images.
        val_size: Training images held out for validation. With 0 the test images serve as
            validation images, as in the papers' tables: nothing may be chosen by them then.
        seed: Of the choice of these `val_size` images.

    Raises:
        ValueError: If not exactly one source is given, or an argument is out of its range.
    """

    MEAN = (125.3, 123.0, 113.9)
    STD = (63.0, 62.1, 66.7)
    PAD = 4

    def __init__(
        self,
        path: str | None = None,
        torchvision_root: str | None = None,
        download: bool = False,
        batch_size: int = 128,
        augment: bool = True,
        val_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if (path is None) == (torchvision_root is None):
            raise ValueError(
                f"path={path!r} and torchvision_root={torchvision_root!r}: pass exactly one, a "
                ".npz file as `path` or a folder in torchvision's layout as `torchvision_root`."
            )
        if download and torchvision_root is None:
            raise ValueError("download=True needs `torchvision_root`, the folder to download to.")
        if val_size < 0:
            raise ValueError(f"val_size={val_size}: pass 0 or a number of training images.")
        self.path = path
        self.torchvision_root = torchvision_root
        self.download = download
        self.augment = augment
        self.val_size = val_size

    def prepare_data(self) -> None:
        """Download, where that was asked for."""
        if self.download:
            from torchvision.datasets import CIFAR10

            CIFAR10(self.torchvision_root, download=True)

    def load_parts(self) -> Parts:
        """Read the images from the source that was given, and hold out the validation images."""
        if self.path is not None:
            x_train, y_train, x_test, y_test = _read_npz(Path(self.path))
        else:
            x_train, y_train, x_test, y_test = _read_torchvision(str(self.torchvision_root))
        if self.val_size >= len(y_train):
            raise ValueError(
                f"val_size={self.val_size} leaves none of the {len(y_train)} training images: "
                "pass less."
            )
        pad = self.PAD if self.augment else 0
        test = ImageDataset(x_test, y_test, self.MEAN, self.STD)
        if self.val_size == 0:
            return Parts(ImageDataset(x_train, y_train, self.MEAN, self.STD, pad), test, test)
        order = self.shuffled(len(y_train))
        held_out, kept = order[: self.val_size], order[self.val_size :]
        return Parts(
            ImageDataset(x_train[kept], y_train[kept], self.MEAN, self.STD, pad),
            ImageDataset(x_train[held_out], y_train[held_out], self.MEAN, self.STD),
            test,
        )


def _read_npz(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, training then test, from a `.npz` file."""
    names = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise FileNotFoundError(
            f"path={str(path)!r} is no file: pass a .npz file with the arrays {', '.join(names)} "
            "(`--data.path` on the command line), or `torchvision_root` instead."
        )
    with np.load(path) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)} and holds {', '.join(arrays) or 'nothing'}: "
                f"it needs the arrays {', '.join(names)}."
            )
        x_train, y_train, x_test, y_test = (arrays[name] for name in names)
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if x.dtype != np.uint8 or x.shape != (len(y), 32, 32, 3):
            raise ValueError(
                f"x_{name} in {path} is {x.dtype} {x.shape} beside {len(y)} labels: "
                f"it must be uint8 ({len(y)}, 32, 32, 3)."
            )
    return _tensors(x_train, y_train) + _tensors(x_test, y_test)


def _read_torchvision(root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, training then test, through torchvision."""
    from torchvision.datasets import CIFAR10

    train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    return _tensors(train.data, train.targets) + _tensors(test.data, test.targets)


def _tensors(images: np.ndarray, labels: NDArray[Any] | list[int]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images), torch.from_numpy(np.asarray(labels, dtype=np.int64))
