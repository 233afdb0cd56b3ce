"""Step time of LocalLearner in Trainer.fit, beside loops written by hand, all in one run.

python -m benchmarks.step_time.main
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from benchmarks.report import kept, renew_table, write
from benchmarks.step_time.authors import TheirLoop, check
from benchmarks.step_time.by_hand import ByHand, EndToEndByHand, parts_of
from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, methods

HERE = Path(__file__).parent
# Network: (how to make it, side of an image, classes).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet32": (lambda: CifarResNet(32), 32, 10),
    "resnet110": (lambda: CifarResNet(110), 32, 10),
    "resnet50": (torchvision.models.resnet50, 224, 1000),
    "vit_b_16": (torchvision.models.vit_b_16, 224, 1000),
}
# Of their code only AugLocal, whose depth is the number here; 0 is end-to-end backpropagation.
THEIRS = {"end to end": 0, "AugLocal, d=2": 2, "AugLocal, d=6": 6}
METHODS: dict[str, Callable[[], methods.LocalMethod]] = {
    "end to end": methods.EndToEnd,
    "Greedy": methods.Greedy,
    "AugLocal, d=2": lambda: methods.AugLocal(depth=2),
    "AugLocal, d=6": lambda: methods.AugLocal(depth=6),
    "BackLink": methods.BackLink,
}
# Seconds of each step, and operations of one.
Found: TypeAlias = tuple[list[float], "int | str"]
OPTIONS = (
    *("channels_last", "bf16", "channels_last+bf16", "recompute", "compile"),
    *("channels_last+compile", "graphs"),
)


class _Stored(Dataset[Any]):
    """One batch, again and again, so that loading costs nothing."""

    def __init__(self, batch: tuple[torch.Tensor, ...], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if index >= self.steps:
            raise IndexError(index)
        return self.batch


class _Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher: on a GPU about as many kernels are launched."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


class _Clock(L.Callback):
    """When each batch ended: between two of these lies all that a step takes.

    Args:
        counts: Count operations in the second step, which is not timed.

    Attributes:
        operations: Of that step.
    """

    def __init__(self, counts: bool = True) -> None:
        self.ends: list[float] = []
        self.operations: int | str = ""
        self._mode = _Operations() if counts else None

    def note(self) -> None:
        """Process time, or wall time behind the device's work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
        else:
            self.ends.append(time.process_time())
        if self._mode is not None and len(self.ends) == 1:
            self._mode.__enter__()
        elif self._mode is not None and len(self.ends) == 2:
            self._mode.__exit__(None, None, None)
            self.operations = self._mode.number

    def on_train_batch_end(self, *args: Any) -> None:
        """Notes it."""
        self.note()

    def steps(self) -> Found:
        """Seconds of each step but the first two, and the operations of one."""
        return [b - a for a, b in zip(self.ends[1:], self.ends[2:], strict=False)], self.operations


def _batch(
    options: argparse.Namespace, layout: torch.memory_format = torch.contiguous_format
) -> tuple[torch.Tensor, ...]:
    _, side, classes = NETWORKS[options.network]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, 3, side, side, generator=generator)
    y = torch.randint(classes, (options.batch,), generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return x.to(device, memory_format=layout), y.to(device)


def _network(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = NETWORKS[options.network][0]()
    return network.cuda() if torch.cuda.is_available() else network


def _optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def _lightning(network: nn.Module, options: argparse.Namespace) -> L.LightningModule:
    return LitClassifier(network, num_classes=NETWORKS[options.network][2])


def loop_by_hand(method: str, network: nn.Module, options: argparse.Namespace) -> Any:
    """A loop without Lightning that trains the network.

    Heads are as the library makes them, so that the same is computed; bodies are made by hand.
    """
    network.train()
    made = METHODS[method]()
    if isinstance(made, methods.EndToEnd):
        return EndToEndByHand(network, _optimizer)
    learner = LocalLearner(_lightning(network, options), made)
    learner.build(_batch(options)[0][:2])
    heads = [m.head for m in learner.local_modules if m.head is not None]
    parts = parts_of(network)
    bodies = [*parts[: len(heads)], nn.Sequential(*parts[len(heads) :])]
    return ByHand(bodies, heads, _optimizer, linked=method == "BackLink")


def by_hand(method: str, options: argparse.Namespace) -> Found:
    """Seconds of each step of a loop without Lightning."""
    return _timed(loop_by_hand(method, _network(options), options), options)


def by_the_authors(method: str, options: argparse.Namespace) -> Found:
    """Seconds of each step of the authors' code."""
    torch.manual_seed(0)
    depth = THEIRS[method]
    loop = TheirLoop(options.authors, options.network, options.batch, depth, _optimizer)
    loop.network.train().to("cuda" if torch.cuda.is_available() else "cpu")
    return _timed(loop, options)


def _timed(loop: Any, options: argparse.Namespace) -> Found:
    clock, (x, y) = _Clock(), _batch(options)
    for _ in range(options.steps):
        loop.step(x, y)
        clock.note()
    return clock.steps()


def in_lightning(method: str, option: str, plain: bool, options: argparse.Namespace) -> Found:
    """Seconds of each step inside `Trainer.fit`.

    Args:
        method: Of `METHODS`.
        option: Of `OPTIONS`, or `""`.
        plain: Without a learner.
        options: Of the program.
    """
    chosen = option.split("+")
    kind = torch.channels_last if "channels_last" in chosen else torch.contiguous_format
    module = _lightning(_network(options).to(memory_format=kind), options)
    model: L.LightningModule = module
    if not plain:
        recompute = "blocks" if option == "recompute" else "none"
        compile = "reduce-overhead" if option == "graphs" else "compile" in chosen
        model = LocalLearner(module, METHODS[method](), recompute=recompute, compile=compile)
        if "channels_last" in chosen:
            model.build(_batch(options)[0][:2])
            model.to(memory_format=kind)
    clock = _Clock(
        counts=not {"compile", "graphs"} & {*chosen}
    )  # compiled code is counted as what it was made from
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        precision="bf16-mixed" if "bf16" in chosen else "32-true", enable_progress_bar=False,
        enable_model_summary=False, callbacks=[clock], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(_Stored(_batch(options, kind), options.steps), batch_size=None))
    return clock.steps()


def rows_of(options: argparse.Namespace) -> list[tuple[str, str, Callable[[], Found]]]:
    """Method, what runs it, and how to time it."""
    found: list[tuple[str, str, Callable[[], Found]]] = []
    for method in options.methods:
        given = method  # bound now
        found.append((method, "by hand", lambda m=given: by_hand(m, options)))
        if method == "end to end":
            found.append((method, "Lightning", lambda m=given: in_lightning(m, "", True, options)))
        if options.authors is not None and method in THEIRS:
            found.append((method, "authors", lambda m=given: by_the_authors(m, options)))
        found.append((method, "LocalLearner", lambda m=given: in_lightning(m, "", False, options)))
        for option in options.options:
            found.append(
                (
                    method,
                    f"LocalLearner, {option}",
                    lambda m=given, o=option: in_lightning(m, o, False, options),
                )
            )
    return found


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method and loop; rounds in which all take turns."""
    rows = rows_of(options)
    seconds: list[list[float]] = [[] for _ in rows]
    operations: list[int | str] = [""] * len(rows)
    for _ in range(options.rounds):
        for i, (_, _, run) in enumerate(rows):
            steps, operations[i] = run()
            seconds[i] += steps
    best = {(m, how): min(s) for (m, how, _), s in zip(rows, seconds, strict=True)}
    return [
        {
            "network": options.network,
            "batch": options.batch,
            "method": method,
            "loop": how,
            "step, ms": 1000 * min(found),
            "median, ms": 1000 * statistics.median(found),
            "operations": count,
            "by hand, x": min(found) / best[method, "by hand"],
            "authors, x": _ratio(min(found), best.get((method, "authors"))),
            "end to end by hand, x": _ratio(min(found), best.get(("end to end", "by hand"))),
        }
        for found, count, (method, how, _) in zip(seconds, operations, rows, strict=True)
    ]


def _ratio(seconds: float, of: float | None) -> float | str:
    return "" if of is None else seconds / of


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet32")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 128])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:3])
    parser.add_argument("--options", nargs="*", choices=OPTIONS, default=[])
    parser.add_argument(
        "--steps", type=int, default=7, help="of a round; the first two don't count"
    )
    parser.add_argument("--rounds", type=int, default=3, help="in which all rows take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--authors", type=Path, help="a checkout of the code of AugLocal's paper")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of other networks and batches"
    )
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    options = parser.parse_args()
    if options.table:
        renew_table(HERE)
        return
    if options.authors is not None:
        check(options.authors, options.network)
    old: dict[str, Any] = {}
    if options.add:
        old = kept(
            HERE, lambda row: row["network"] == options.network and row["batch"] in options.batch
        )
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [
        row
        for batch in options.batch
        for row in measure(argparse.Namespace(**{**vars(options), "batch": batch}))
    ]
    if options.print:
        for row in rows:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        return
    write(HERE, rows, **old, threads=options.threads, steps=options.steps, rounds=options.rounds)


if __name__ == "__main__":
    main()
