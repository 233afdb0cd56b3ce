"""Data modules of the papers' small data sets, all held in memory.

Each says how its images are augmented and normalised. How images become batches stands in
`images.py`, where they are read in `sources.py`; ImageNet, which does not fit, in `imagenet.py`.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar

from numpy.typing import NDArray

from examples.image_classification.images import ImageDataModule, ImageDataset, Parts
from examples.image_classification.sources import Reader, StoredImages

__all__ = [
    "Cifar10DataModule",
    "Cifar100DataModule",
    "FashionMnistDataModule",
    "Stl10DataModule",
    "StoredDataModule",
    "SvhnDataModule",
]


class StoredDataModule(ImageDataModule):
    """A data set of small square images; a subclass says which, and how they are augmented.

    Exactly one source is given: `path`, a `.npz` file, or `torchvision_root`, a folder that
    torchvision reads.

    Args:
        path: A `.npz` file with the images `x_train` and `x_test`, uint8 `(M, side, side, C)`, and
            the labels `y_train` and `y_test`, integers `(M,)` from 0.
        torchvision_root: Folder that torchvision reads.
        download: Let torchvision download into `torchvision_root` what is missing there.
        batch_size: Images per batch, at least 1.
        augment: Augment the training images.
        val_size: Training images held out for validation. With 0 the test images serve as
            validation images, as in the papers' tables: nothing may be chosen by them then.
        seed: Of the choice of these `val_size` images.

    Raises:
        ValueError: If not exactly one source is given, or an argument is out of its range.
        ModuleNotFoundError: If torchvision is to read, and lacks a package for it.
    """

    MEAN: ClassVar[tuple[float, ...]]
    STD: ClassVar[tuple[float, ...]]
    PAD: ClassVar[int]
    REFLECT: ClassVar[bool] = False
    MIRROR: ClassVar[bool] = True
    SIDE: ClassVar[int] = 32
    CLASSES: ClassVar[int] = 10

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
            path,
            torchvision_root,
            download,
            val_size,
            shape=(self.SIDE, self.SIDE, len(self.MEAN)),
            classes=self.CLASSES,
            read=self.reader(),
        )

    def reader(self) -> Reader:
        """What reads one part of the data set through torchvision."""
        raise AssertionError(f"{type(self).__name__} says nothing about torchvision")

    def prepare_data(self) -> None:
        """Download, where that was asked for."""
        self.stored.download()

    def load_parts(self) -> Parts:
        """Read the images from the source that was given, and hold out the validation images."""
        plain = partial(ImageDataset, mean=self.MEAN, std=self.STD)
        pad = self.PAD if self.augment else 0
        train = partial(plain, pad=pad, reflect=self.REFLECT, mirror=self.MIRROR)
        return self.stored.parts(train, plain, self.shuffled)


class Cifar10DataModule(StoredDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 colour pixels, 10 classes.

    Training images are padded by 4 reflected pixels, cropped and mirrored; all are normalised with
    the mean and standard deviation of the channels.
    """

    MEAN = (125.3, 123.0, 113.9)
    STD = (63.0, 62.1, 66.7)
    PAD = 4
    REFLECT = True

    def reader(self) -> Reader:
        """Reads `CIFAR10`."""
        return partial(_read_cifar, "CIFAR10")


class Cifar100DataModule(Cifar10DataModule):
    """CIFAR-100: as CIFAR-10, with 100 classes."""

    MEAN = (129.3, 124.1, 112.4)
    STD = (68.2, 65.4, 70.4)
    CLASSES = 100

    def reader(self) -> Reader:
        """Reads `CIFAR100`."""
        return partial(_read_cifar, "CIFAR100")


class FashionMnistDataModule(StoredDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 grey pixels, 10 classes.

    Training images are padded by 2 pixels of value 0, cropped and mirrored; all are normalised with
    mean and standard deviation.
    """

    MEAN = (72.9,)
    STD = (90.0,)
    PAD = 2
    SIDE = 28

    def reader(self) -> Reader:
        """Reads `FashionMNIST`."""
        return _read_fashion_mnist


class SvhnDataModule(StoredDataModule):
    """SVHN: 73,257 training and 26,032 test images of 32x32 colour pixels, house numbers 0..9.

    The 531,131 extra training images are left out, as in InfoPro's code. Training images are
    padded by 2 pixels of value 0 and cropped, and never mirrored: a mirrored digit is another
    sign. All are normalised to [-1, 1]. torchvision reads its files with SciPy.
    """

    MEAN = STD = (127.5, 127.5, 127.5)
    PAD = 2
    MIRROR = False

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
        super().__init__(path, torchvision_root, download, batch_size, augment, val_size, seed)
        if torchvision_root is not None and find_spec("scipy") is None:
            raise ModuleNotFoundError(
                f"torchvision_root={torchvision_root!r}: torchvision reads SVHN's .mat files with "
                "SciPy, which is not installed: `pip install scipy`, or pass `path`, a .npz file.",
                name="scipy",
            )

    def reader(self) -> Reader:
        """Reads `SVHN`."""
        return _read_svhn


class Stl10DataModule(StoredDataModule):
    """STL-10: 5,000 labelled training and 8,000 test images of 96x96 colour pixels, 10 classes.

    The unlabelled images are left out. Training images are padded by 4 pixels of value 0, cropped
    and mirrored; all are normalised to [-1, 1].
    """

    MEAN = STD = (127.5, 127.5, 127.5)
    PAD = 4
    SIDE = 96

    def reader(self) -> Reader:
        """Reads `STL10`."""
        return _read_stl10


def _read_cifar(
    name: str, root: str, train: bool, download: bool
) -> tuple[NDArray[Any], list[int]]:
    from torchvision import datasets

    part = getattr(datasets, name)(root, train=train, download=download)
    return part.data, part.targets


def _read_fashion_mnist(
    root: str, train: bool, download: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    from torchvision.datasets import FashionMNIST

    part = FashionMNIST(root, train=train, download=download)
    return part.data.numpy()[..., None], part.targets.numpy()


def _read_svhn(root: str, train: bool, download: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    from torchvision.datasets import SVHN

    part = SVHN(root, split="train" if train else "test", download=download)
    return part.data.transpose(0, 2, 3, 1), part.labels


def _read_stl10(root: str, train: bool, download: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    from torchvision.datasets import STL10

    part = STL10(root, split="train" if train else "test", download=download)
    return part.data.transpose(0, 2, 3, 1), part.labels
