"""One process of a run: trains a tiny network for many steps, and notes what memory it holds."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, LocalParallelStrategy, couplings, methods

__all__ = ["train"]

SAMPLES, BATCH = 400, 16


class Notes(L.Callback):
    """Resident memory of the process and number of live tensors, every so many steps.

    Args:
        every: Steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, int]] = []
        self._steps = 0

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """Takes notes."""
        self._steps += 1
        if self._steps % self.every:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        self.rows.append({"step": self._steps, "resident": resident, "tensors": tensors})


def _batches() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (SAMPLES,), generator=generator)
    return DataLoader(TensorDataset(images, labels), BATCH, shuffle=True)


def train(options: argparse.Namespace) -> list[dict[str, int]]:
    """A fit, resumed from the folder's last checkpoint if there is one.

    Args:
        options: `steps`, `processes`, `folder`, `every` and `save`.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    method = methods.AugLocal(depth=1, coupling=couplings.BackwardLink())
    learner = LocalLearner(LitClassifier(CifarResNet(8, in_channels=1)), method)
    notes = Notes(options.every)
    callbacks: list[L.Callback] = [notes]
    if options.save:
        callbacks.append(ModelCheckpoint(options.folder, save_last=True, every_n_epochs=1))
    more: dict[str, Any] = {}
    if options.processes > 1:
        strategy = LocalParallelStrategy(num_stages=options.processes)
        more = {"strategy": strategy, "devices": options.processes}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=-1, max_epochs=options.steps * BATCH // SAMPLES,
        logger=False, enable_checkpointing=options.save, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, **{"devices": 1, **more},
    )  # fmt: skip
    last = Path(options.folder) / "last.ckpt"
    found = str(last) if options.save and last.exists() else None
    trainer.fit(learner, _batches(), ckpt_path=found)
    trainer.save_checkpoint(Path(options.folder) / "final.ckpt")
    return notes.rows


def main() -> None:
    """Trains, and writes what was noted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--save", action="store_true", help="a checkpoint behind each epoch")
    parser.add_argument("--folder", required=True)
    options = parser.parse_args()
    rows = train(options)
    rank = os.environ.get("RANK", "0")
    Path(options.folder, f"notes{rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
