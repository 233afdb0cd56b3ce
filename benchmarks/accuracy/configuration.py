"""What one run trains, from the strings of a command line."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

import torch

from examples.image_classification import (
    Cifar10DataModule,
    Cifar100DataModule,
    CifarResNet,
    FashionMnistDataModule,
    LitClassifier,
    Stl10DataModule,
    SvhnDataModule,
)
from examples.image_classification.data import StoredDataModule
from lightning_local import LocalLearner, couplings, heads, losses, methods

__all__ = ["DATA", "RECIPES", "Recipe", "make_data", "make_learner", "method_of", "name_of"]

DATA: dict[str, type[StoredDataModule]] = {
    "cifar10": Cifar10DataModule,
    "cifar100": Cifar100DataModule,
    "svhn": SvhnDataModule,
    "stl10": Stl10DataModule,
    "fashion": FashionMnistDataModule,
}


@dataclass(frozen=True)
class Recipe:
    """An optimizer and its schedule.

    Attributes:
        epochs: Length of the run.
        batch: Images per step.
        options: Of `LitClassifier`.
        source: Who trained so.
    """

    epochs: int
    batch: int
    options: dict[str, Any]
    source: str


_PAPERS = {"lr": 0.8, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine_warmup"}
RECIPES = {
    "short": Recipe(
        5, 256, {"lr": 0.4, "weight_decay": 5e-4, "schedule": "onecycle"}, "ours, for a CPU"
    ),
    "160": Recipe(160, 1024, _PAPERS, "InfoPro's code"),
    "400": Recipe(400, 1024, _PAPERS, "AugLocal's code"),
}


def method_of(text: str, data: type[StoredDataModule]) -> methods.LocalMethod:
    """The method that an expression such as `BackLink(head=Linear())` names; nothing is evaluated.

    Args:
        text: A name, or a call with literals and further calls, of `methods`, `heads`, `losses` and
            `couplings`. `InfoPro` gets the data's normalisation.
        data: The data set.

    Raises:
        ValueError: It is something else.
    """
    made = _built(ast.parse(text, mode="eval").body, data)
    if isinstance(made, type):
        made = _call(made, {}, data)
    if not isinstance(made, methods.LocalMethod):
        raise ValueError(f"--method {text}: pass a method, such as AugLocal(depth=2).")
    return made


def _built(node: ast.expr, data: type[StoredDataModule]) -> Any:
    if isinstance(node, ast.Name):
        for room in (methods, heads, losses, couplings):
            if node.id in room.__all__ and isinstance(getattr(room, node.id), type):
                return getattr(room, node.id)
        raise ValueError(f"--method: {node.id} is no method, head, loss or coupling.")
    if isinstance(node, ast.Call) and not node.args:
        given = {str(each.arg): _built(each.value, data) for each in node.keywords}
        return _call(_built(node.func, data), given, data)
    return ast.literal_eval(node)


def _call(kind: Any, given: dict[str, Any], data: type[StoredDataModule]) -> Any:
    if kind is methods.InfoPro:
        scaled = [tuple(v / 255 for v in values) for values in (data.MEAN, data.STD)]
        given = {"denormalize": tuple(scaled), **given}
    return kind(**given)


def make_learner(options: Any) -> LocalLearner:
    """The learner of a run.

    Args:
        options: Its arguments: `network` (`resnet20`, ... `resnet110`), `dataset`, `recipe`,
            `method`, `partition` (`units`, a number, or split points with commas between),
            `compile` (a mode, or None).

    Raises:
        ValueError: The network or the method is not known.
    """
    data, recipe = DATA[options.dataset], RECIPES[options.recipe]
    depth = re.fullmatch(r"resnet(\d+)", options.network)
    if depth is None:
        raise ValueError(f"--network {options.network}: pass resnet20, resnet32, resnet110, ...")
    network = CifarResNet(int(depth[1]), num_classes=data.CLASSES, in_channels=len(data.MEAN))
    network.to(memory_format=torch.channels_last)
    module = LitClassifier(network, num_classes=data.CLASSES, **recipe.options)
    method, partition = method_of(options.method, data), options.partition
    if partition != "units":
        partition = int(partition) if partition.isdigit() else partition.split(",")
    if isinstance(method, methods.EndToEnd):
        partition = "units"  # its own default: it isn't cut
    return LocalLearner(module, method, partition, compile=options.compile or False)


def make_data(options: Any) -> StoredDataModule:
    """The images of a run, from `options.data`: a `.npz` file, or a folder for torchvision."""
    kind, batch = DATA[options.dataset], options.batch or RECIPES[options.recipe].batch
    file = options.data.endswith(".npz")
    return kind(
        path=options.data if file else None,
        torchvision_root=None if file else options.data,
        batch_size=batch,
        val_size=options.val_size,
    )


def name_of(options: Any) -> str:
    """A file's name for a run, without what is the usual."""
    method = re.sub(r"[^\w.]+", "-", options.method).strip("-")
    parts = [options.dataset, options.network, method]
    if options.partition != "units":
        parts.append("K" + re.sub(r"[^\w.]+", "-", options.partition)[:20])
    epochs = "" if options.epochs == RECIPES[options.recipe].epochs else f"e{options.epochs}"
    parts.append(options.recipe + epochs)
    if options.batch:
        parts.append(f"b{options.batch}")
    if options.train_size:
        parts.append(f"n{options.train_size}")
    if options.val_size:
        parts.append(f"val{options.val_size}")
    return "_".join([*parts, f"s{options.seed}"])
