"""Peak memory and step time of every method, relative to end-to-end backpropagation, in one run."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.report import renew_table, write
from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, heads, methods, reconciliation
from lightning_local.meter import LiveBytes, existing
from lightning_local.methods import LocalMethod
from lightning_local.second_order import fast_second_derivatives
from lightning_local.tables import flops_of_a_step

HERE = Path(__file__).parent
# Random pixels are in [0, 1] once multiplied by 0.1 and moved by 0.5, nearly always.
PIXELS = ([0.5], [0.1])
METHODS: dict[str, Callable[[], LocalMethod]] = {
    "end to end": methods.EndToEnd,
    "Greedy": methods.Greedy,
    "DGL": methods.DGL,
    "PredSim": methods.PredSim,
    "InfoPro, softmax": lambda: methods.InfoPro(denormalize=PIXELS),
    "InfoPro, contrast": lambda: methods.InfoPro(denormalize=PIXELS, task="contrast"),
    "AugLocal, d=2": lambda: methods.AugLocal(depth=2),
    "AugLocal, d=5": lambda: methods.AugLocal(depth=5),
    "BackLink": methods.BackLink,
    "BackLink, linear heads": lambda: methods.BackLink(head=heads.Linear()),
    "SGR": methods.SGR,
    "SGR, linear heads": lambda: methods.SGR(head=heads.Linear()),
    "SGR, linear heads, every=4": lambda: methods.SGR(head=heads.Linear(), every=4),
}
SLOW = "SGR, linear heads, torch's own second derivatives"
METHODS[SLOW] = METHODS["SGR, linear heads"]


class Images(Dataset[Any]):
    """Random batches of images and labels.

    Args:
        batches: How many.
        size: Images in each.
    """

    def __init__(self, batches: int, size: int) -> None:
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        """Number of batches."""
        return self.batches

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch."""
        generator = torch.Generator().manual_seed(index)
        images = torch.randn(self.size, 3, 32, 32, generator=generator).clamp(-5, 5)
        return images, torch.randint(10, (self.size,), generator=generator)


class Clock(L.Callback):
    """Seconds of each step but the first, which makes the optimizers' states."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def now(self, trainer: Any) -> float:
        """Process time, or wall time behind the device's work."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Starts."""
        self._start = self.now(trainer)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """Stops."""
        self.seconds.append(self.now(trainer) - self._start)


class Peak(L.Callback):
    """Most bytes alive in a step but the first: weights, gradients, momentum and batch included."""

    def __init__(self) -> None:
        self.bytes = 0
        self._live: LiveBytes | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Starts counting."""
        if batch_idx == 0:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._live = LiveBytes(existing(module, trainer.optimizers, batch))
            self._live.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """Stops counting."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self.bytes, self._live = max(self.bytes, self._live.peak), None
        elif trainer.strategy.root_device.type == "cuda":
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated())


def run(name: str, callback: L.Callback, steps: int, options: Any) -> Any:
    """One fit of a few steps; returns what was trained."""
    fast = fast_second_derivatives
    reconciliation.fast_second_derivatives = (lambda loss: nullcontext()) if name == SLOW else fast
    method = METHODS[name]()
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    model: Any = LitClassifier(CifarResNet(options.depth))
    if not isinstance(method, methods.EndToEnd):
        model = LocalLearner(model, method)
    trainer = L.Trainer(
        accelerator=options.accelerator, devices=1, max_epochs=1, precision=options.precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Images(steps, options.batch), batch_size=None))
    return model


def measure(options: Any) -> list[dict[str, Any]]:
    """One row per method."""
    names = options.only or list(METHODS)
    seconds: dict[str, float] = {name: float("inf") for name in names}
    facts: dict[str, tuple[int, int, int, float]] = {}
    for name in names:
        peak = Peak()
        model = run(name, peak, options.steps + 1, options)
        if isinstance(model, LocalLearner):
            plain, local = flops_of_a_step(model)
            size = sum(p.numel() for p in model.local_modules.parameters())
            facts[name] = (model.num_modules, size, peak.bytes, local / plain)
        else:
            facts[name] = (1, 0, peak.bytes, 1.0)
    for _ in range(options.rounds):
        for name in names:
            clock = Clock()
            run(name, clock, options.steps + 1, options)
            seconds[name] = min(seconds[name], sum(clock.seconds[1:]) / options.steps)
    base = names[0]
    return [
        {
            "method": name,
            "local modules": facts[name][0],
            "head parameters": facts[name][1],
            "FLOPs, x": facts[name][3],
            "peak, MiB": facts[name][2] / 2**20,
            "peak, x": facts[name][2] / facts[base][2],
            "step, s": seconds[name],
            "step, x": seconds[name] / seconds[base],
        }
        for name in names
    ]


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=32, help="of the ResNet")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of a round, after one more"
    )
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one's mean step counts")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="the first is the base")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args()
    if options.table:
        renew_table(HERE)
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = measure(options)
    if options.print:
        for row in rows:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        return
    facts = {"network": f"CifarResNet({options.depth})", "batch": options.batch, "seed": 0}
    write(HERE, rows, **facts)


if __name__ == "__main__":
    main()
