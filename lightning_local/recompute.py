"""Activations that are computed twice instead of kept: `torch.utils.checkpoint` without traces.

torch's checkpointing restores torch's random states and autocast for the second run; what the first
one wrote into buffers (running statistics, power iterations) it would write once more. Here the
second run finds buffers and all random states as the first one found them, and what it changes is
dropped.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed", "recomputing"]

_thread = threading.local()


def recomputing() -> bool:
    """Whether a part runs that keeps nothing, or runs again."""
    return getattr(_thread, "depth", 0) > 0


def recomputed(
    run: Callable[..., Any], holders: Iterable[nn.Module], values: tuple[Any, ...], clone: bool
) -> Any:
    """`run(*values)`, which keeps `values` for the backward instead of its activations.

    Gradients, buffers and random states (torch, Python, NumPy) afterwards are those of a plain
    call, bit for bit. State that layers keep elsewhere, in plain attributes, generators of their
    own, or parameters that a forward changes, is written twice, and hooks run twice.

    Args:
        run: A part of a network; it is called again when its backward comes.
        holders: The modules whose own buffers it may change.
        values: Its arguments.
        clone: Whether `run` overwrites tensors among them, which the second run needs as they were.
    """
    state = _State(holders)

    def call(*arguments: Any) -> Any:
        if clone:
            arguments = tuple(
                value.clone() if isinstance(value, torch.Tensor) else value for value in arguments
            )
        return run(*arguments)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _inside(), _SecondRun(state)

    return checkpoint(call, *values, use_reentrant=False, context_fn=contexts)


class _State:
    """Buffers of some modules, and random states, as they are before the first run."""

    def __init__(self, holders: Iterable[nn.Module]) -> None:
        # All of them: what is written to a buffer's `data` leaves no trace on the buffer.
        self.buffers = [
            (holder, name, None if buffer is None else buffer.clone())
            for holder in {id(holder): holder for holder in holders}.values()
            for name, buffer in holder._buffers.items()
        ]
        self.random = random.getstate(), np.random.get_state()


@contextmanager
def _inside() -> Iterator[None]:
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


class _SecondRun(AbstractContextManager[None]):
    """The block finds what the first run found; afterwards everything is as before it.

    A part with several backwards runs several times more. A run may end early, by an exception
    with which torch says that it has all it wants.
    """

    def __init__(self, state: _State) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._inside = _inside()
        self._inside.__enter__()
        self._now = [(h, name, h._buffers[name]) for h, name, _ in self._state.buffers]
        self._random = random.getstate(), np.random.get_state()
        for holder, name, before in self._state.buffers:
            holder._buffers[name] = None if before is None else before.clone()
        self._set_random(self._state.random)

    def __exit__(self, *error: object) -> None:
        for holder, name, buffer in self._now:
            holder._buffers[name] = buffer
        self._set_random(self._random)
        self._inside.__exit__(None, None, None)

    @staticmethod
    def _set_random(states: tuple[Any, Any]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
