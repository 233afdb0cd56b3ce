"""Where the images of a data set come from: a `.npz` file, or the files that torchvision reads.

A data module of `data.py` holds a `StoredImages`, which has the arguments that all of them share:
one source, whether to download, how many training images to hold out. What becomes of the images
is `images.py`'s business.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.image_classification.images import ImageDataset, Parts

__all__ = ["Reader", "StoredImages"]

# (root, train, download) -> (uint8 images (M, H, W, C), labels (M,)), through torchvision.
Reader = Callable[[str, bool, bool], tuple[NDArray[Any], Any]]
Make = Callable[[Tensor, Tensor], ImageDataset]


class StoredImages:
    """Labelled images of one size, from exactly one of two sources.

    Args:
        path: A `.npz` file with the images `x_train` and `x_test`, uint8 `(M, *shape)`, and the
            labels `y_train` and `y_test`, integers `(M,)` in 0..classes-1.
        torchvision_root: Folder that torchvision reads.
        download: Let torchvision download into `torchvision_root` what is missing there.
        val_size: Training images held out for validation; with 0 the test images serve for it.
        shape: Height, width and channels of an image.
        classes: Number of classes.
        read: Reads one part of the data set through torchvision.

    Raises:
        ValueError: If not exactly one source is given, or an argument is out of its range.
    """

    def __init__(
        self,
        path: str | None,
        torchvision_root: str | None,
        download: bool,
        val_size: int,
        *,
        shape: tuple[int, int, int],
        classes: int,
        read: Reader,
    ) -> None:
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
        self.wants_download = download
        self.val_size = val_size
        self.shape = shape
        self.classes = classes
        self.read = read

    def download(self) -> None:
        """Download, where that was asked for."""
        if self.wants_download:
            for train in (True, False):
                self.read(str(self.torchvision_root), train, True)

    def parts(self, train: Make, plain: Make, shuffled: Callable[[int], Tensor]) -> Parts:
        """Read the images and hold out those for validation.

        Args:
            train: Makes the data set of the training images from images and labels.
            plain: Makes those of validation and test.
            shuffled: Maps a number of images to their order `(M,)`, whose first `val_size` are
                held out.
        """
        if self.path is not None:
            x, y, x_test, y_test = _read_npz(Path(self.path), self.shape, self.classes)
        else:
            root = str(self.torchvision_root)
            x, y = _tensors(*self.read(root, True, False))
            x_test, y_test = _tensors(*self.read(root, False, False))
        if self.val_size >= len(y):
            raise ValueError(
                f"val_size={self.val_size} leaves none of the {len(y)} training images: pass less."
            )
        test = plain(x_test, y_test)
        if self.val_size == 0:
            return Parts(train(x, y), test, test)
        order = shuffled(len(y))
        held_out, kept = order[: self.val_size], order[self.val_size :]
        return Parts(train(x[kept], y[kept]), plain(x[held_out], y[held_out]), test)


def _read_npz(
    path: Path, shape: tuple[int, ...], classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        if x.dtype != np.uint8 or x.shape != (len(y), *shape):
            raise ValueError(
                f"x_{name} in {path} is {x.dtype} {x.shape} beside {len(y)} labels: "
                f"it must be uint8 {(len(y), *shape)}."
            )
        if len(y) and not 0 <= y.min() <= y.max() < classes:
            raise ValueError(
                f"y_{name} in {path} has labels in {y.min()}..{y.max()}: number the {classes} "
                f"classes 0..{classes - 1} (SVHN's and STL-10's own files say 1..10)."
            )
    return _tensors(x_train, y_train) + _tensors(x_test, y_test)


def _tensors(images: NDArray[Any], labels: Any) -> tuple[Tensor, Tensor]:
    images = np.ascontiguousarray(images)
    return torch.from_numpy(images), torch.from_numpy(np.asarray(labels, dtype=np.int64))
