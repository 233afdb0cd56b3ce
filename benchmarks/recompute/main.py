"""What computing activations twice saves and costs: memory against step time, with AugLocal."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.memory.configurations import Configuration
from benchmarks.memory.networks import SUBJECTS
from benchmarks.memory.predicted import predict
from benchmarks.methods.main import Clock, Images
from benchmarks.recompute.picture import draw
from benchmarks.report import renew_table, write
from lightning_local import methods

HERE = Path(__file__).parent
SUBJECT = SUBJECTS["ResNet-110"]
# What runs twice, and in how many of the first local modules; 19 have the largest maps.
PARTS = [
    ("none", 0), ("body", 19), ("body", 99),
    ("blocks", 7), ("blocks", 19), ("blocks", 37), ("blocks", 99),
]  # fmt: skip


def configurations() -> list[tuple[str, str, int, Configuration]]:
    """Method, mode, number of local modules that recompute, and what to train."""
    plain = Configuration("end to end", methods.EndToEnd)
    checkpointed = Configuration("end to end", methods.EndToEnd, "blocks")
    found = [("end to end", "none", 0, plain), ("end to end", "blocks", 55, checkpointed)]
    for depth in (2, 6):
        name, count = f"AugLocal, d={depth}", 55 - depth
        for mode, number in PARTS:
            first = min(number, count)
            recompute = dict.fromkeys(range(first), mode) or "none"
            own = Configuration(name, lambda d=depth: methods.AugLocal(depth=d), recompute)
            found.append((name, mode, first, own))
    return found


def step_seconds(configuration: Configuration, options: Any) -> float:
    """Process time of the fastest step but the first."""
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    clock = Clock()
    trainer = L.Trainer(
        accelerator=options.accelerator, devices=1, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[clock], limit_val_batches=0,
    )  # fmt: skip
    batches = DataLoader(Images(options.steps + 1, options.batch), batch_size=None)
    trainer.fit(configuration.learner(SUBJECT), batches)
    return min(clock.seconds[1:])


def measure(options: Any) -> list[dict[str, Any]]:
    """One row per configuration; rounds go through all of them."""
    given = configurations()
    found = [predict(SUBJECT, each[-1], SUBJECT.batch_size) for each in given]
    seconds = [float("inf")] * len(given)
    for _ in range(options.rounds):
        for i, each in enumerate(given):
            seconds[i] = min(seconds[i], step_seconds(each[-1], options))
            print(each[:3], round(seconds[i], 2), flush=True)
    rows = []
    for (name, mode, count, _), prediction, own in zip(given, found, seconds, strict=True):
        plain = [each[:2] for each in given].index((name, "none"))
        rows.append(
            {
                "method": name,
                "twice": mode,
                "in local modules": count,
                "peak, MiB": round(prediction.peak / 2**20),
                "peak, x": prediction.peak / found[0].peak,
                "FLOPs, x": prediction.flops / found[plain].flops,
                "step, s": own,
                "step, x": own / seconds[plain],
            }
        )
    return rows


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32, help="images of a timed step")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest step counts")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--table", action="store_true", help="only rewrite table and picture")
    options = parser.parse_args()
    if options.table:
        renew_table(HERE)
    else:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        facts = {"network": "CifarResNet(110)", "batch of the peaks": SUBJECT.batch_size}
        write(HERE, measure(options), **facts, **{"batch of the times": options.batch})
    draw(HERE)


if __name__ == "__main__":
    main()
