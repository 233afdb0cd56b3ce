"""Trains one network by one method, and writes one JSON; a run that was cut goes on.

python -m benchmarks.accuracy.main --data data/cifar10.npz --method "AugLocal(depth=2)"
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from benchmarks.accuracy.configuration import DATA, RECIPES, make_data, make_learner, name_of
from benchmarks.accuracy.images import OnDevice
from benchmarks.accuracy.record import Enough, Record
from lightning_local import LocalSummary

HERE = Path(__file__).parent


def parser_of_a_run() -> argparse.ArgumentParser:
    """The arguments of one run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", default="data/cifar10.npz", help=".npz file, or torchvision's folder"
    )
    parser.add_argument("--dataset", choices=DATA, default="cifar10")
    parser.add_argument("--network", default="resnet20", help="resnet20, resnet32, resnet110, ...")
    parser.add_argument("--method", default="EndToEnd", help='such as "AugLocal(depth=2)"')
    parser.add_argument(
        "--partition", default="units", help="units, a number, or names with commas"
    )
    parser.add_argument("--recipe", choices=RECIPES, default="short")
    parser.add_argument("--epochs", type=int, help="another length than the recipe's")
    parser.add_argument("--batch", type=int, help="another number of images than the recipe's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--val-size", type=int, default=0, help="training images held out, to choose by"
    )
    parser.add_argument("--train-size", type=int, default=0, help="images used; 0 for all")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--device", default="auto", help="cpu, cuda, auto")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--compile", nargs="?", const="default", help="compile bodies and heads, in this mode"
    )
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    parser.add_argument("--save-seconds", type=float, default=120, help="between checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="for the JSONs")
    parser.add_argument("--checkpoints", type=Path, default=Path("data/accuracy"))
    return parser


def run(options: argparse.Namespace) -> bool:
    """Starts a run or goes on with it.

    Returns:
        Whether it is finished.
    """
    stop = time.monotonic() + 60 * options.max_minutes
    options.epochs = options.epochs or RECIPES[options.recipe].epochs
    name = name_of(options)
    result, checkpoint = options.results / f"{name}.json", options.checkpoints / f"{name}.ckpt"
    if result.exists() and json.loads(result.read_text())["finished"]:
        print(f"{name}: finished before")
        return True
    if options.threads:
        torch.set_num_threads(options.threads)
    L.seed_everything(options.seed, verbose=False)
    learner = make_learner(options)
    facts = {
        key: getattr(options, key)
        for key in (
            *("dataset", "network", "method", "partition", "recipe"),
            *("seed", "val_size", "train_size"),
        )
    }
    facts["batch"] = options.batch or RECIPES[options.recipe].batch
    facts["precision"], facts["epochs_planned"] = options.precision, options.epochs
    summary = LocalSummary(head_accuracy=True, memory=True, pictures=False)
    record = Record(result, checkpoint, facts, summary, options.save_seconds, stop)
    trainer = L.Trainer(
        max_epochs=options.epochs, precision=options.precision, accelerator=options.device,
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[summary, record],
    )  # fmt: skip
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    data = OnDevice(make_data(options), options.seed, options.train_size)
    try:
        trainer.fit(learner, data, ckpt_path=checkpoint if checkpoint.exists() else None)
    except Enough:
        print(f"{name}: {len(record.epochs)} of {options.epochs} epochs, to be continued")
        return False
    checkpoint.unlink(missing_ok=True)
    print(f"{name}: {record.epochs[-1]['accuracy']:.2%} after {options.epochs} epochs")
    return True


def main(args: Sequence[str] | None = None) -> None:
    """One run."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run(parser_of_a_run().parse_args(args))


if __name__ == "__main__":
    main()
