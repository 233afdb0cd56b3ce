"""Answers to what glue asks while it is traced, found on fakes of the example in several forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lightning_local.fake_run import FakeRun

__all__ = ["Asked"]

# Samples of larger batches, in those of the example.
_TIMES = 64


class Asked:
    """A network's glue, run for the example and for other forms of it.

    Args:
        network: The network; it is not changed.
        inputs: Its inputs, real tensors; the first dimension of the first one is the batch's.
        training: The mode to run in.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[Any], training: bool) -> None:
        first = tuple(inputs[0].shape) if isinstance(inputs[0], torch.Tensor) else ()
        size = first[0] if first else 0

        def run(resize: Callable[[torch.Tensor], tuple[int, ...]]) -> FakeRun:
            return FakeRun(network, inputs, training, resize)

        sizes = (max(size, 2), 2 * size + 1, _TIMES * size)
        self._batches = [run(partial(_of_size, size=size, new=new)) for new in sizes]
        self._others = [run(partial(_of_size, size=size, new=1))]
        if _may_be_longer(inputs[0]):
            self._others.append(run(partial(_longer, length=first[1])))

    def __call__(
        self, nodes: Sequence[fx.Node], ask: Callable[[Any], int], everywhere: bool
    ) -> int:
        """The answer for the last node's value, the same for batches of all sizes.

        Args:
            nodes: All nodes up to the one that is asked about.
            ask: From its value to the answer.
            everywhere: It has to be the same for a single sample and for longer sequences too, as
                far as the network takes these.

        Raises:
            Exception: Fake tensors, which have no numbers, don't tell, or answers differ.
        """
        (answer,) = {ask(run.value(nodes)) for run in self._batches}
        for run in list(self._others) if everywhere else ():
            try:
                other = ask(run.value(nodes))
            except Exception:  # whatever the network can't do with that form
                self._others.remove(run)
                continue
            if other != answer:
                raise ValueError(f"{other} for another form, {answer} for the example")
        return answer


def _of_size(tensor: torch.Tensor, size: int, new: int) -> tuple[int, ...]:
    return (new, *tensor.shape[1:]) if tensor.shape[:1] == (size,) else tuple(tensor.shape)


def _may_be_longer(first: Any) -> bool:
    """Whether it looks like a batch of sequences: tokens `(N, T)`, or vectors `(N, T, D)`."""
    if not isinstance(first, torch.Tensor):
        return False
    return first.ndim == 3 or (first.ndim == 2 and not first.is_floating_point())


def _longer(tensor: torch.Tensor, length: int) -> tuple[int, ...]:
    return tuple(2 * n + 1 if dim and n == length else n for dim, n in enumerate(tensor.shape))
