"""Time per step of losses and accuracies of 55 local modules, against `self.log_dict` of them."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.report import renew_table, write
from lightning_local import LocalLearner
from lightning_local.loop import TrainingLoop
from lightning_local.metrics import LocalMetrics

HERE = Path(__file__).parent
MODULES, BATCH, CLASSES = 55, 128, 10


class Block(nn.Module):
    """One unit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, 32)` to `(N, 32)`."""
        return x + 0.1 * functional.relu(self.linear(x))


class Deep(L.LightningModule):
    """55 units, each so small that logging shows.

    Args:
        by_hand: Log 110 values with `self.log_dict` in each step too.
    """

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Block() for _ in range(MODULES - 1)), nn.Linear(32, CLASSES))
        self.by_hand = by_hand
        self.seconds = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross entropy."""
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.by_hand and self.trainer._logger_connector.should_update_logs:
            values = {f"{kind}/{k}": loss.detach() for k in range(MODULES) for kind in "ab"}
            start = time.process_time()
            self.log_dict(values)
            self.seconds += time.process_time() - start
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), 0.01)


def _timed(owner: Any, name: str, spent: list[float]) -> Callable[[], None]:
    """Adds the time spent in a method; returns what undoes it."""
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - start

    setattr(owner, name, timed)
    return lambda: setattr(owner, name, original)


def measure(every: int, by_hand: bool, steps: int) -> tuple[float, float]:
    """Milliseconds of process time per step, on one thread: of adding up, and of logging."""
    L.seed_everything(0, verbose=False)
    x = torch.randn(BATCH * steps, 32)
    loader = DataLoader(TensorDataset(x, torch.randint(CLASSES, (len(x),))), BATCH)
    module = Deep(by_hand)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, log_every_n_steps=every, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    adding, logging_ = [0.0], [0.0]
    undo = [
        _timed(owner, name, spent)
        for owner, name, spent in (
            (LocalMetrics, "update", adding),
            (LocalMetrics, "close_step", adding),
            (TrainingLoop, "_log_window", logging_),
            (TrainingLoop, "log_epoch", logging_),
            (_LoggerConnector, "log_metrics", logging_),
        )
    ]
    trainer.fit(LocalLearner(module, "Greedy"), loader)
    for each in undo:
        each()
    if by_hand:
        return 0.0, 1000 * module.seconds / steps
    return 1000 * adding[0] / steps, 1000 * logging_[0] / steps


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="the smallest counts")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    arguments = parser.parse_args()
    if arguments.table:
        renew_table(HERE)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for every in (1, 50):
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(arguments.repeats):
            for by_hand in found:
                found[by_hand].append(measure(every, by_hand, arguments.steps))
        rows.append(
            {
                "log_every_n_steps": every,
                "logging, ms per step": min(each for _, each in found[False]),
                "self.log_dict instead, ms per step": min(each for _, each in found[True]),
                "adding up, ms per step": min(each for each, _ in found[False]),
            }
        )
    facts = {"modules": MODULES, "batch": BATCH, "steps": arguments.steps, "seed": 0}
    write(HERE, rows, **facts)


if __name__ == "__main__":
    main()
