"""What a run writes down, and how it survives being cut: one JSON and one checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.report import environment
from lightning_local import LocalLearner, LocalSummary
from lightning_local.build import step_flops

__all__ = ["Enough", "Record"]


class Enough(Exception):
    """The minutes are over; the run goes on when it is started again."""


class Record(L.Callback):
    """Writes JSON after each epoch, and a checkpoint every now and then.

    Args:
        result: The JSON.
        checkpoint: The checkpoint.
        facts: What else is in the JSON.
        summary: Evaluates the heads.
        save_seconds: Time between checkpoints.
        stop: `time.monotonic()` at which the run is left.
    """

    def __init__(
        self,
        result: Path,
        checkpoint: Path,
        facts: dict[str, Any],
        summary: LocalSummary,
        save_seconds: float,
        stop: float,
    ) -> None:
        self.result, self.checkpoint, self.facts = result, checkpoint, facts
        self.summary, self.save_seconds, self.stop = summary, save_seconds, stop
        self.epochs: list[dict[str, Any]] = []
        self.seconds = self.process_seconds = 0.0
        self.peak = 0
        self._since = self._saved = time.monotonic()
        self._process_since = time.process_time()

    def state_dict(self) -> dict[str, Any]:
        """What was written down so far travels with the weights."""
        self._elapsed()
        names = ("epochs", "seconds", "process_seconds", "peak")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with it."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    def _elapsed(self) -> None:
        now, process = time.monotonic(), time.process_time()
        self.seconds, self._since = self.seconds + now - self._since, now
        self.process_seconds += process - self._process_since
        self._process_since = process

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clocks start when the network has been cut."""
        self._since = self._saved = time.monotonic()
        self._process_since = time.process_time()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves, but not between an epoch's last batch and its validation."""
        self.peak = max([self.peak, *self.summary.peaks])
        if batch_idx + 1 < trainer.num_training_batches:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the epoch down."""
        if trainer.sanity_checking:
            return
        self._elapsed()
        logged = trainer.callback_metrics
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "train_loss": float(logged.get("train/loss", torch.nan)),
                "accuracy": float(logged["val/accuracy"]),
                "heads": [round(value, 4) for value in self.summary.accuracies],
                "seconds": round(self.seconds, 1),
            }
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the JSON, and saves if it is time."""
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        done = trainer.current_epoch + 1 == trainer.max_epochs
        self.write(pl_module, finished=done)
        if not done:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        now = time.monotonic()
        if now >= self.stop or now - self._saved >= self.save_seconds:
            new = self.checkpoint.with_suffix(".new")
            trainer.save_checkpoint(new)
            new.replace(self.checkpoint)
            self._saved = time.monotonic()
        if now >= self.stop:
            raise Enough

    def write(self, learner: L.LightningModule, *, finished: bool) -> None:
        """Writes the JSON under another name first, so that there is never half of one."""
        assert isinstance(learner, LocalLearner)
        modules = learner.modules_in_order()
        body = sum(module.body_flops for module in modules)
        _, heads = learner.parameters_per_module()
        accuracies = [each["accuracy"] for each in self.epochs]
        result = {
            **self.facts,
            "finished": finished,
            "epoch": len(self.epochs),
            "last": accuracies[-1],
            "best": max(accuracies),
            "seconds": round(self.seconds, 1),
            "process_seconds": round(self.process_seconds, 1),
            "peak_bytes": self.peak,
            "num_modules": learner.num_modules,
            "head_parameters": sum(p.numel() for each in heads for p in each),
            "flops": round(sum(step_flops(learner)) / (3 * body), 3) if body else 1.0,
            "weights": digest(learner.module) if finished else None,
            **environment(),
            "epochs": self.epochs,
        }
        self.result.parent.mkdir(parents=True, exist_ok=True)
        new = self.result.with_suffix(".new")
        new.write_text(json.dumps(result, indent=1) + "\n")
        new.replace(self.result)


def digest(module: torch.nn.Module) -> str:
    """A hash of all weights and buffers, to compare runs bit for bit."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
