"""Accuracy of SGR (reconstructed) against its weight: the sweep behind the default."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.report import renew_table, write
from examples.image_classification import Cifar10DataModule, CifarResNet, LitClassifier
from lightning_local import LocalLearner, LocalSummary, methods

HERE = Path(__file__).parent


class Part(Cifar10DataModule):
    """The first images of CIFAR-10.

    Args:
        train: Number of training images.
        test: Number of test images.
        options: Of `Cifar10DataModule`.
    """

    def __init__(self, train: int, test: int, **options: Any) -> None:
        super().__init__(**options)
        self.sizes = (train, test, test)

    def load_parts(self) -> Any:
        """Cuts the parts down."""
        parts = super().load_parts()
        for part, size in zip(parts, self.sizes, strict=True):
            part.images, part.labels = part.images[:size], part.labels[:size]
        return parts


class Ratio(Callback):
    """R_k over l_k in the last epoch, the mean over the modules that have it."""

    def __init__(self) -> None:
        self.value = 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads what was logged last."""
        names = [n for n in trainer.callback_metrics if n.endswith("/reconciliation")]
        if names:
            values = [float(trainer.callback_metrics[n]) for n in names]
            self.value = sum(values) / len(values)


def train(weight: float, distance: str, seed: int, options: Any) -> dict[str, Any]:
    """One run."""
    L.seed_everything(seed, verbose=False)
    data = Part(options.train, options.test, path=options.path, batch_size=128)
    module = LitClassifier(
        CifarResNet(options.depth), lr=0.1, weight_decay=5e-4, schedule="onecycle"
    )
    learner = LocalLearner(module, methods.SGR(weight=weight, distance=distance))
    heads, ratio = LocalSummary(head_accuracy=True), Ratio()
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_epochs=options.epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, callbacks=[heads, ratio],
    )  # fmt: skip
    trainer.fit(learner, data)
    return {
        "distance": distance,
        "weight": weight,
        "accuracy": f"{heads.accuracies[-1]:.1%}",
        "accuracy of each head": " ".join(f"{a:.1%}" for a in heads.accuracies[:-1]),
        "R / l at the end": ratio.value,
        "seed": seed,
    }


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default="data/cifar10.npz", help="a .npz file of CIFAR-10")
    parser.add_argument("--depth", type=int, default=8, help="of the ResNet")
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--test", type=int, default=4_000, help="test images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--distance", nargs="+", default=["squared_l2"])
    parser.add_argument("--weight", type=float, nargs="+", default=[0, 0.01, 0.03, 0.1, 0.3, 1, 3])
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    if options.table:
        renew_table(HERE)
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for distance in options.distance:
        for weight in options.weight:
            for seed in options.seeds:
                rows.append(train(weight, distance, seed, options))
                write(HERE, rows, train=options.train, test=options.test, epochs=options.epochs)


if __name__ == "__main__":
    main()
