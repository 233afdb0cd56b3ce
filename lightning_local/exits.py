"""A network that stops early: each sample leaves at the first head that is sure of it. Pure torch.

Legend: N samples, C classes, K local modules; an exit is a local module whose head predicts, the
last exit is the network's own output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_local.fake_run import on_fakes
from lightning_local.local_module import LocalModule
from lightning_local.metrics import countable, counted

__all__ = ["ExitRecord", "Exits", "largest_probability"]

Confidence = Callable[[torch.Tensor], torch.Tensor]


def largest_probability(logits: torch.Tensor) -> torch.Tensor:
    """The largest softmax probability, `(N, C)` to `(N,)`."""
    return logits.float().softmax(-1).amax(-1)


class ExitRecord:
    """What every exit said about every sample of a test.

    Args:
        exits: Indices of the local modules that are exits.

    Attributes:
        exits: The same.
    """

    def __init__(self, exits: Sequence[int]) -> None:
        self.exits = tuple(exits)
        self._confidences: list[torch.Tensor] = []
        self._hits: list[torch.Tensor] = []

    def add(self, confidences: torch.Tensor, hits: torch.Tensor | None) -> None:
        """Adds a batch.

        Args:
            confidences: `(len(exits), N)`; those of the last exit are not looked at.
            hits: 1 for right predictions, else 0, NaN for what is not counted, the same shape; None
                where targets are no classes.
        """
        self._confidences.append(confidences.cpu())
        if hits is not None:
            self._hits.append(hits.cpu())

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(each.shape[1] for each in self._confidences)

    def taken(self, threshold: float) -> torch.Tensor:
        """Which exit each sample takes, as an index into `exits`, `(N,)`."""
        return first_sure(torch.cat(self._confidences, 1), threshold)

    def accuracy(self, taken: torch.Tensor) -> float | None:
        """Share of right predictions, in [0, 1], when samples leave at these exits.

        None unless all batches had class indices as targets.
        """
        hits = torch.cat(self._hits, 1) if self._hits else torch.empty(0, 0)
        if hits.shape[1] != len(taken):
            return None
        return float(hits.gather(0, taken[None]).nanmean())


def first_sure(confidences: torch.Tensor, threshold: float) -> torch.Tensor:
    """The first exit above the threshold, else the last: `(E, N)` to `(N,)`."""
    sure = confidences > threshold
    sure[-1] = True
    return sure.to(torch.uint8).argmax(0)


def growing(modules: Sequence[LocalModule], inputs: Sequence[Any]) -> list[list[bool]]:
    """What crosses each cut and has a row per sample, among its leaves.

    A mask `(T, T)` has none, though there may be T samples: the bodies are run on fakes of two and
    three batches behind each other.

    Raises:
        ValueError: The inputs don't tell either.
    """
    if all(module.body.num_carried == 0 for module in modules[1:]):
        return [[True]] * (len(modules) - 1)
    network = modules[0].body.network
    size = inputs[0].shape[0]

    def run(host: nn.Module, *values: Any) -> list[list[Any]]:
        found, now = [], values
        for module in modules[:-1]:
            now = module.body(*now)
            found.append([getattr(leaf, "shape", None) for leaf in tree_leaves(now)])
        return found

    def times(value: Any, n: int) -> Any:
        rows = isinstance(value, torch.Tensor) and value.shape[:1] == (size,)
        return torch.cat([value] * n) if rows else value

    try:
        once, more = (
            on_fakes(network, run, [times(value, n) for value in inputs], training=False)
            for n in (2, 3)
        )
    except Exception as error:
        raise ValueError(
            f"EarlyExit can't tell which of the network's inputs have a row per sample in a batch "
            f"of {size} ({error}): use another batch size."
        ) from error
    return [
        [bool(a) and bool(b) and a[0] != b[0] for a, b in zip(before, after, strict=True)]
        for before, after in zip(once, more, strict=True)
    ]


class Exits:
    """Stands in for the network's forward.

    Args:
        modules: All local modules, in order.
        classes: C.
        threshold: A sample leaves where its confidence is above this.
        confidence: Of logits.
        record: Runs every exit on every sample, and keeps what they say; else samples that left
            are not computed further.
        ignored: Targets that are not counted, besides negative ones.

    Attributes:
        counts: How many samples left at each local module, K numbers.
        target: Of the batch, for the record.
    """

    def __init__(
        self,
        modules: Sequence[LocalModule],
        classes: int,
        threshold: float,
        confidence: Confidence = largest_probability,
        record: bool = False,
        ignored: int = -100,
    ) -> None:
        self._ignored = ignored
        self._modules, self._threshold, self._confidence = modules, threshold, confidence
        self._classes = classes
        last = len(modules) - 1
        exits = [k for k, module in enumerate(modules) if module.predicts or k == last]
        self.record = ExitRecord(exits) if record else None
        self.counts = [0] * len(modules)
        self.target: Any = None
        self._per_sample: list[list[bool]] = []

    def _of_samples(self, k: int, values: Any, kept: torch.Tensor) -> Any:
        """What crosses the cut behind k, of some of the samples; what is not per sample stays."""
        leaves, form = tree_flatten(values)
        return tree_unflatten(
            [
                leaf[kept] if per_sample and leaf.shape[:1] == kept.shape else leaf
                for leaf, per_sample in zip(leaves, self._per_sample[k], strict=True)
            ],
            form,
        )

    def __call__(self, *values: Any) -> torch.Tensor:
        """The network's positional inputs to `(N, C)`: each sample's row is its exit's.

        Raises:
            ValueError: A head or the network gives something else than `(N, C)`.
        """
        if self._modules[0].body.in_place:
            values = (values[0].clone(), *values[1:])
        if self.record is not None:
            return self._recording(values)
        if not self._per_sample:
            self._per_sample = growing(self._modules, values)
        return self._leaving(values)

    def _leaving(self, values: tuple[Any, ...]) -> torch.Tensor:
        result: torch.Tensor | None = None
        rows: torch.Tensor | None = None  # of those that are still here; None for all
        for k, module in enumerate(self._modules):
            out = module(*values)
            if module.head is None:
                logits = self._checked(out)
                self.counts[k] += len(logits)
                if result is None:
                    return logits
                result[rows] = logits.to(result.dtype)
                return result
            values = out
            if not module.predicts:
                continue
            logits = self._checked(module.predict(values[0]))
            sure = self._confidence(logits) > self._threshold
            left = int(sure.sum())
            if not left:
                continue
            self.counts[k] += left
            if rows is None:
                rows = torch.arange(len(logits), device=logits.device)
                result = torch.empty_like(logits)
            assert result is not None
            result[rows[sure]] = logits[sure].to(result.dtype)
            if left == len(sure):
                return result
            rows = rows[~sure]
            values = self._of_samples(k, values, ~sure)
        raise AssertionError("the last local module has no head")

    def _recording(self, values: tuple[Any, ...]) -> torch.Tensor:
        assert self.record is not None
        found: list[torch.Tensor] = []
        for module in self._modules:
            out = module(*values)
            if module.head is None:
                found.append(self._checked(out))
            else:
                values = out
                if module.predicts:
                    found.append(self._checked(module.predict(values[0])))
        confidences = torch.stack([self._confidence(logits) for logits in found])
        target, hits = self.target, None
        if countable(found[-1], target):
            hits = torch.stack([logits.argmax(-1) == target for logits in found]).double()
            hits[:, ~counted(target, self._ignored)] = torch.nan
        self.record.add(confidences, hits)
        taken = first_sure(confidences, self._threshold)
        for k, count in zip(self.record.exits, taken.bincount(minlength=len(found)), strict=True):
            self.counts[k] += int(count)
        if not bool((taken < len(found) - 1).any()):
            return found[-1]
        rows = torch.arange(len(taken), device=taken.device)
        return torch.stack(found)[taken, rows]

    def _checked(self, output: Any) -> torch.Tensor:
        if isinstance(output, torch.Tensor) and output.shape[1:] == (self._classes,):
            return output
        form = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"EarlyExit puts a head's output in the place of the network's, (N, {self._classes}), "
            f"and got {form}: wrap the module so that the network gives the logits (network='.'), "
            "or leave the callback out."
        )
