"""Data modules of the papers' small data sets: CIFAR-10, SVHN and STL-10, all held in memory.

Each says how its images are augmented and normalised. How images become batches stands in
`images.py`, where they are read in `sources.py`; ImageNet, which does not fit, in `imagenet.py`.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

from numpy.typing import NDArray

from examples.image_classification.images import ImageDataModule, ImageDataset, Parts
from examples.image_classification.sources import StoredImages

__all__ = ["Cifar10DataModule", "Stl10DataModule", "SvhnDataModule"]


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
        self.augment = augment
        self.stored = StoredImages(
            path, torchvision_root, download, val_size, side=32, read=_read_cifar10
        )

    def prepare_data(self) -> None:
        """Download, where that was asked for."""
        self.stored.download()

    def load_parts(self) -> Parts:
        """Read the images from the source that was given, and hold out the validation images."""
        plain = partial(ImageDataset, mean=self.MEAN, std=self.STD)
        train = partial(plain, pad=self.PAD if self.augment else 0)
        return self.stored.parts(train, plain, self.shuffled)


class SvhnDataModule(ImageDataModule):
    """SVHN: 73,257 training and 26,032 test images of 32x32 colour pixels, house numbers 0..9.

    The 531,131 extra training images are left out, as in InfoPro's code. Training images are
    padded by 2 pixels of value 0 and cropped, and never mirrored: a mirrored digit is another
    sign. All are normalised to [-1, 1].

    Args:
        path: A `.npz` file as for `Cifar10DataModule`.
        torchvision_root: Folder in the layout of `torchvision.datasets.SVHN`, which reads it with
            SciPy.
        download: Let torchvision download into `torchvision_root` what is missing there.
        batch_size: Images per batch, at least 1.
        augment: Crop the training images.
        val_size: Training images held out for validation; with 0 the test images serve for it.
        seed: Of the choice of these `val_size` images.

    Raises:
        ValueError: If not exactly one source is given, or an argument is out of its range.
        ModuleNotFoundError: If torchvision is to read, and SciPy is not installed.
    """

    MEAN = STD = (127.5, 127.5, 127.5)
    PAD = 2

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
        self.augment = augment
        self.stored = StoredImages(
            path, torchvision_root, download, val_size, side=32, read=_read_svhn
        )
        if torchvision_root is not None and find_spec("scipy") is None:
            raise ModuleNotFoundError(
                f"torchvision_root={torchvision_root!r}: torchvision reads SVHN's .mat files with "
                "SciPy, which is not installed: `pip install scipy`, or pass `path`, a .npz file.",
                name="scipy",
            )

    def prepare_data(self) -> None:
        """Download, where that was asked for."""
        self.stored.download()

    def load_parts(self) -> Parts:
        """Read the images from the source that was given, and hold out the validation images."""
        plain = partial(ImageDataset, mean=self.MEAN, std=self.STD)
        pad = self.PAD if self.augment else 0
        train = partial(plain, pad=pad, reflect=False, mirror=False)
        return self.stored.parts(train, plain, self.shuffled)


class Stl10DataModule(ImageDataModule):
    """STL-10: 5,000 labelled training and 8,000 test images of 96x96 colour pixels, 10 classes.

    The unlabelled images are left out. Training images are padded by 4 pixels of value 0, cropped
    and mirrored; all are normalised to [-1, 1].

    Args:
        path: A `.npz` file as for `Cifar10DataModule`, with images `(M, 96, 96, 3)`.
        torchvision_root: Folder in the layout of `torchvision.datasets.STL10`.
        download: Let torchvision download into `torchvision_root` what is missing there.
        batch_size: Images per batch, at least 1.
        augment: Crop and mirror the training images.
        val_size: Training images held out for validation; with 0 the test images serve for it.
        seed: Of the choice of these `val_size` images.

    Raises:
        ValueError: If not exactly one source is given, or an argument is out of its range.
    """

    MEAN = STD = (127.5, 127.5, 127.5)
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
        self.augment = augment
        self.stored = StoredImages(
            path, torchvision_root, download, val_size, side=96, read=_read_stl10
        )

    def prepare_data(self) -> None:
        """Download, where that was asked for."""
        self.stored.download()

    def load_parts(self) -> Parts:
        """Read the images from the source that was given, and hold out the validation images."""
        plain = partial(ImageDataset, mean=self.MEAN, std=self.STD)
        train = partial(plain, pad=self.PAD if self.augment else 0, reflect=False)
        return self.stored.parts(train, plain, self.shuffled)


def _read_cifar10(root: str, train: bool, download: bool) -> tuple[NDArray[Any], list[int]]:
    from torchvision.datasets import CIFAR10

    part = CIFAR10(root, train=train, download=download)
    return part.data, part.targets


def _read_svhn(root: str, train: bool, download: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    from torchvision.datasets import SVHN

    part = SVHN(root, split="train" if train else "test", download=download)
    return part.data.transpose(0, 2, 3, 1), part.labels


def _read_stl10(root: str, train: bool, download: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    from torchvision.datasets import STL10

    part = STL10(root, split="train" if train else "test", download=download)
    return part.data.transpose(0, 2, 3, 1), part.labels
