"""Scanned digits that scikit-learn ships: real images, and nothing is downloaded."""

import numpy as np
import torch
from torch import Tensor

from examples.image_classification.images import ImageDataModule, ImageDataset, Parts

__all__ = ["DigitsDataModule"]


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
