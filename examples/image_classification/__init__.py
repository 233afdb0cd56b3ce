"""Image classification: a plain Lightning module, two small networks, and data modules."""

from examples.image_classification.data import (
    Cifar10DataModule,
    Cifar100DataModule,
    FashionMnistDataModule,
    Stl10DataModule,
    SvhnDataModule,
)
from examples.image_classification.digits import DigitsDataModule
from examples.image_classification.imagenet import ImageNetDataModule
from examples.image_classification.module import LitClassifier
from examples.image_classification.network import CifarResNet
from examples.image_classification.vit import TinyViT

__all__ = [
    "Cifar100DataModule",
    "Cifar10DataModule",
    "CifarResNet",
    "DigitsDataModule",
    "FashionMnistDataModule",
    "ImageNetDataModule",
    "LitClassifier",
    "Stl10DataModule",
    "SvhnDataModule",
    "TinyViT",
]
