"""Image classification: a plain Lightning module, a CIFAR ResNet and two data modules."""

from examples.image_classification.data import Cifar10DataModule, DigitsDataModule
from examples.image_classification.module import LitClassifier
from examples.image_classification.network import CifarResNet

__all__ = ["Cifar10DataModule", "CifarResNet", "DigitsDataModule", "LitClassifier"]
