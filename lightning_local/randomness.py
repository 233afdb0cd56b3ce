"""Random states: one stream per local module, and the process's own for a checkpoint.

Each local module draws from a stream of its own, so that results don't depend on where it runs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["Streams", "global_states", "seed_for", "set_global_states"]


def global_states() -> dict[str, Any]:
    """States of the process's generators (torch, CUDA, Python, NumPy), as plain types."""
    version, state, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    name, keys, *rest = numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(state), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_global_states(states: dict[str, Any]) -> None:
    """Goes on where `global_states` was; CUDA states only where there are as many devices."""
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))


def seed_for(seed: int, k: int) -> int:
    """A seed for local module `k`, from the global one: a splitmix64 step."""
    z = (seed + (k + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


class Streams:
    """Generator states of the K local modules, for the CPU and the device they run on.

    With one module there is nothing to separate: it draws from the global generator, as plain
    Lightning does.

    Args:
        seed: The global seed.
        num_modules: K.
    """

    def __init__(self, seed: int, num_modules: int) -> None:
        self._seeds = [seed_for(seed, k) for k in range(num_modules)]
        self._cpu = [torch.Generator().manual_seed(s).get_state() for s in self._seeds]
        self._cuda: list[torch.Tensor | None] = [None] * num_modules

    @contextmanager
    def using(self, k: int, device: torch.device) -> Iterator[None]:
        """Draws come from module k's stream inside the block."""
        if len(self._cpu) == 1:
            yield
            return
        outer = torch.get_rng_state()
        torch.set_rng_state(self._cpu[k])
        cuda = device.type == "cuda"
        outer_cuda = torch.cuda.get_rng_state(device) if cuda else None
        if cuda:
            state = self._cuda[k]
            if state is None:
                generator = torch.Generator(device=device).manual_seed(self._seeds[k])
                state = generator.get_state()
            torch.cuda.set_rng_state(state, device)
        try:
            yield
        finally:
            self._cpu[k] = torch.get_rng_state()
            torch.set_rng_state(outer)
            if outer_cuda is not None:
                self._cuda[k] = torch.cuda.get_rng_state(device)
                torch.cuda.set_rng_state(outer_cuda, device)

    def save(self) -> dict[str, list[torch.Tensor | None]]:
        """The states as plain tensors."""
        return {"cpu": list(self._cpu), "cuda": list(self._cuda)}

    def load(self, states: dict[str, Sequence[torch.Tensor | None]]) -> None:
        """Goes on where `save` was."""
        self._cpu = [state.cpu() for state in states["cpu"] if state is not None]
        self._cuda = [None if s is None else s.cpu() for s in states["cuda"]]
