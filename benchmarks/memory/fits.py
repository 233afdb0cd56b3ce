"""The peak of a step inside a real `Trainer.fit`, on the CPU or on a GPU."""

from __future__ import annotations

import gc
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.memory.configurations import Configuration
from benchmarks.memory.networks import Subject
from benchmarks.methods.main import Peak

__all__ = ["fit"]

STEPS = 3


class _Batches(Dataset[Any]):
    """Random batches.

    Args:
        subject: Whose data.
        size: Samples in each.
    """

    def __init__(self, subject: Subject, size: int) -> None:
        self.subject, self.size = subject, size

    def __len__(self) -> int:
        """Number of batches."""
        return STEPS

    def __getitem__(self, index: int) -> Any:
        """A batch."""
        return self.subject.data(self.size)


def fit(
    subject: Subject, configuration: Configuration, batch_size: int, options: Any
) -> int | None:
    """Bytes at the peak of a step behind the first, which makes the optimizers' states.

    Args:
        subject: The network.
        configuration: How it is trained.
        batch_size: Samples of a batch.
        options: `accelerator` and `precision`, as the Trainer's.

    Returns:
        None if memory did not suffice.
    """
    L.seed_everything(0, verbose=False)
    peak = Peak()
    trainer = L.Trainer(
        accelerator=options.accelerator, devices=1, max_epochs=1, precision=options.precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[peak], limit_val_batches=0,
    )  # fmt: skip
    fitted = True
    try:
        loader = DataLoader(_Batches(subject, batch_size), batch_size=None)
        trainer.fit(configuration.learner(subject), loader)
    except torch.OutOfMemoryError:
        fitted = False
    # The Trainer and the module know each other, so that only a collection frees the weights.
    del trainer
    _clean()
    return peak.bytes if fitted else None


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
