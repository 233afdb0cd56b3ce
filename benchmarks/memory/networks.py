"""The networks that are measured, each with its optimizer, batch and random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torchvision
from torch import nn

from benchmarks.memory.gpt import Gpt, LitGpt
from examples.image_classification import CifarResNet, LitClassifier

__all__ = ["SMALL", "SUBJECTS", "Subject", "images", "texts"]

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A network to measure.

    Args:
        make: The user's module around the network.
        batch_size: Samples of a batch.
        data: A random batch of some samples.
    """

    make: Callable[[], L.LightningModule]
    batch_size: int
    data: Callable[[int], Batch]


def images(size: int, classes: int) -> Callable[[int], Batch]:
    """Random images with labels, normalised so that 0.1 * image + 0.5 is in [0, 1]."""

    def batch(samples: int) -> Batch:
        pixels = torch.randn(samples, 3, size, size).clamp_(-5, 5)
        return pixels, torch.randint(classes, (samples,))

    return batch


def texts(length: int, vocabulary: int) -> Callable[[int], Batch]:
    """Random tokens, with the one that follows each."""

    def batch(samples: int) -> Batch:
        tokens = torch.randint(vocabulary, (samples, length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def _classifier(make: Callable[[], nn.Module], classes: int, optimizer: Any = "sgd") -> Any:
    rate = 0.1 if optimizer == "sgd" else 1e-3
    return lambda: LitClassifier(make(), num_classes=classes, optimizer=optimizer, lr=rate)


def _cifar(depth: int, batch_size: int) -> Subject:
    return Subject(_classifier(lambda: CifarResNet(depth), 10), batch_size, images(32, 10))


def _vision(name: str, size: int, batch_size: int, classes: int, **arguments: Any) -> Subject:
    optimizer = "adamw" if name.startswith("vit") else "sgd"
    model = getattr(torchvision.models, name)
    make = _classifier(lambda: model(num_classes=classes, **arguments), classes, optimizer)
    return Subject(make, batch_size, images(size, classes))


def _gpt(layers: int, width: int, heads: int, context: int, vocabulary: int, size: int) -> Subject:
    return Subject(
        lambda: LitGpt(Gpt(layers, width, heads, context, vocabulary)),
        size,
        texts(context, vocabulary),
    )


def _small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 16, 4, 4, 64, 256, num_classes=10)


def _perceptron() -> nn.Module:
    sizes = (3 * 32 * 32, 512, 512, 512, 512)
    layers = [
        layer
        for before, after in zip(sizes, sizes[1:], strict=False)
        for layer in (nn.Linear(before, after), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], 10))


# Those of the table, the slowest last.
SUBJECTS = {
    "ResNet-32": _cifar(32, 1024),
    "ResNet-110": _cifar(110, 1024),
    "resnet50": _vision("resnet50", 224, 64, 1000),
    "resnet152": _vision("resnet152", 224, 64, 1000),
    "vit_b_16": _vision("vit_b_16", 224, 64, 1000),
    "GPT": _gpt(12, 768, 12, 1024, 50257, 8),
    "ResNet-1202": _cifar(1202, 128),
}
# Those in which a prediction is compared with a fit on the CPU.
SMALL = {
    "ResNet-20": _cifar(20, 32),
    "resnet18": _vision("resnet18", 64, 16, 10),
    "vgg11_bn": _vision("vgg11_bn", 64, 8, 10),
    "mobilenet_v3_small": _vision("mobilenet_v3_small", 96, 16, 10),
    "densenet121": _vision("densenet121", 64, 8, 10),
    "small ViT": Subject(_classifier(_small_vit, 10, "adamw"), 16, images(64, 10)),
    "small GPT": _gpt(4, 64, 4, 64, 500, 16),
    "MLP": Subject(_classifier(_perceptron, 10), 64, images(32, 10)),
}
