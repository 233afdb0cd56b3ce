"""A plain `LightningModule` for classification. It knows nothing of local learning.

Everything a user would write stands here and nowhere else: loss, metrics, logging, optimizer and
schedule. What trains it, the `Trainer` alone or through `lightning_local.LocalLearner`, is decided
outside of this file.
"""

import math
from collections.abc import Callable
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["LitClassifier", "cosine", "cosine_warmup"]

Batch = tuple[Tensor, Tensor]


def cosine_warmup(
    epoch: int, epochs: int, lr: float, warmup_epochs: int = 10, warmup_lr: float = 0.01
) -> float:
    """Learning rate of one epoch: a cosine down to 0 that is blended in over the first epochs.

    With `c = 0.5 * lr * (1 + cos(pi * epoch / epochs))` the rate is `c`, and during the warm-up
    `c * (epoch - 1) / warmup_epochs + warmup_lr * (warmup_epochs + 1 - epoch) / warmup_epochs`.
    This is the schedule in the published code of InfoPro and AugLocal.

    Args:
        epoch: The epoch, counted from 1.
        epochs: Number of epochs, at least 1. The last one has rate 0.
        lr: Height of the cosine.
        warmup_epochs: Length of the warm-up in epochs.
        warmup_lr: Rate of the first epoch.
    """
    cosine = 0.5 * lr * (1.0 + math.cos(math.pi * epoch / epochs))
    if epoch > warmup_epochs:
        return cosine
    share = (epoch - 1) / warmup_epochs
    return cosine * share + warmup_lr * (1.0 - share)


def cosine(epoch: int, epochs: int, warmup_epochs: int = 0) -> float:
    """Learning rate of one epoch as a share of the highest: a line up, then a cosine down to 0.

    Without warm-up it is `0.5 * (1 + cos(pi * epoch / epochs))`, the schedule of InfoPro's code
    for ImageNet; a warm-up of w epochs puts `1 / (w + 1)`, `2 / (w + 1)`, ... in front.

    Args:
        epoch: The epoch, counted from 0.
        epochs: Number of epochs, at least 1, the warm-up's among them.
        warmup_epochs: Length of the warm-up in epochs, 0 or more.
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    length = max(1, epochs - warmup_epochs)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (epoch - warmup_epochs) / length)))


class LitClassifier(L.LightningModule):
    """Cross entropy, accuracy and an optimizer around any network that maps images to logits.

    It logs `train/loss`, `train/accuracy`, `val/loss`, `val/accuracy`, `test/loss` and
    `test/accuracy`. `load_from_checkpoint` needs the `network` again, since only the other
    arguments are stored as hyper-parameters.

    Args:
        network: Maps images `(N, C, H, W)` to logits `(N, num_classes)`.
        num_classes: Number of classes, at least 2.
        label_smoothing: Of the training loss, in [0, 1].
        lr: Learning rate, the highest one of the schedule, above 0.
        momentum: Of SGD, in [0, 1); Nesterov's form when above 0.
        weight_decay: On every parameter, 0 or more.
        schedule: `"none"`; `"onecycle"`, per step over the whole run; `"cosine"` or
            `"cosine_warmup"`, per epoch over the whole run (see the functions of these names).
        optimizer: `"sgd"` or `"adamw"`.
        warmup_epochs: Of the schedule `"cosine"`, 0 or more; `"cosine_warmup"` brings its own.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: Literal["none", "onecycle", "cosine", "cosine_warmup"] = "none",
        optimizer: Literal["sgd", "adamw"] = "sgd",
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: pass at least 2.")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} is outside of [0, 1].")
        if lr <= 0.0:
            raise ValueError(f"lr={lr}: pass a learning rate above 0.")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum} is outside of [0, 1).")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay={weight_decay}: pass 0 or more.")
        if schedule not in ("none", "onecycle", "cosine", "cosine_warmup"):
            raise ValueError(
                f"schedule={schedule!r} is unknown: pass 'none', 'onecycle', 'cosine' or "
                "'cosine_warmup'."
            )
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer={optimizer!r} is unknown: pass 'sgd' or 'adamw'.")
        if warmup_epochs < 0 or (warmup_epochs and schedule != "cosine"):
            raise ValueError(
                f"warmup_epochs={warmup_epochs} with schedule={schedule!r}: pass 0 or more with "
                "schedule='cosine', and leave it out with any other."
            )
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.label_smoothing = label_smoothing
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.optimizer = optimizer
        self.warmup_epochs = warmup_epochs
        # The checks of the values cost one host-device synchronisation per batch.
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` to logits `(N, num_classes)`."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch: images `(N, C, H, W)` and labels `(N,)`."""
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        self.train_accuracy(logits, y)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy over the validation images."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy over the test images."""
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: Batch, name: str, accuracy: MulticlassAccuracy) -> None:
        x, y = batch
        logits = self(x)
        accuracy(logits, y)
        self.log(f"{name}/loss", F.cross_entropy(logits, y))
        self.log(f"{name}/accuracy", accuracy, prog_bar=True)

    def predict_step(self, batch: Tensor | Batch, batch_idx: int) -> Tensor:
        """Class probabilities `(N, num_classes)` of images with or without labels."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        probabilities: Tensor = self(x).softmax(dim=1)
        return probabilities

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD or AdamW with the schedule that was asked for, stretched over the whole run."""
        optimizer: Optimizer
        if self.optimizer == "adamw":
            optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = SGD(
                self.parameters(),
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.momentum > 0.0,
                weight_decay=self.weight_decay,
            )
        scheduler: LRScheduler
        if self.schedule == "none":
            return optimizer
        if self.schedule == "onecycle":
            steps = int(self._finite(self.trainer.estimated_stepping_batches))
            # Cycling the momentum too, the default, would overrule `momentum`.
            scheduler = OneCycleLR(optimizer, self.lr, steps, cycle_momentum=False)
            interval = "step"
        else:
            epochs = int(self._finite(self.trainer.max_epochs))
            scheduler = LambdaLR(optimizer, self._share_of_lr(epochs))
            interval = "epoch"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval},
        }

    def _share_of_lr(self, epochs: int) -> Callable[[int], float]:
        """The schedule as `LambdaLR` wants it: a factor on `lr`, epochs counted from 0."""
        lr, warmup_epochs = self.lr, self.warmup_epochs
        if self.schedule == "cosine":
            return lambda epoch: cosine(epoch, epochs, warmup_epochs)
        return lambda epoch: cosine_warmup(epoch + 1, epochs, lr) / lr

    def _finite(self, length: float | None) -> float:
        """The length of the run, which the schedule must know."""
        if length is None or not 0 < length < math.inf:
            raise ValueError(
                f"schedule={self.schedule!r} needs a run with an end, and this one has "
                f"{length}: pass `max_epochs` to the Trainer, or schedule='none'."
            )
        return length
