"""Measures the memory that each local module needs while it trains.

On a CUDA device the allocator's own statistics; elsewhere the bytes of live tensor storages, those
that autograd keeps included. There a storage is counted once, whoever views it, from the operation
that makes it until it is freed; what kernels allocate and free inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "Meter", "Origin", "existing"]


@dataclass(frozen=True)
class Origin:
    """Where a storage came from.

    Attributes:
        size: Bytes.
        shape: Of the tensor that was seen first.
        dtype: Its type.
        made_by: The operation that made it; `"given"` for a tensor that was there before.
        place: What ran, as `LiveBytes.place` said.
    """

    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: str
    place: str


# torch leaves TorchDispatchMode untyped, hence the two ignores.
class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live storages; use as a context.

    Args:
        seed: Tensors that exist already, such as a model's parameters and buffers.
        look_at: A number of bytes; what is alive when it is reached first is kept in `alive`.

    Attributes:
        live: Bytes alive now.
        peak: The most that were alive at once; may be set back.
        place: What runs now, for `alive`.
        alive: The storages alive when `look_at` was reached, largest first.
    """

    def __init__(self, seed: Iterable[torch.Tensor] = (), look_at: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.place = ""
        self.alive: list[Origin] = []
        self._look_at = look_at
        self._sizes: dict[int, int] = {}
        self._origins: dict[int, Origin] = {}
        for tensor in seed:
            self._note(tensor, "given")

    def _note(self, tensor: torch.Tensor, made_by: str) -> None:
        if tensor.layout != torch.strided:
            return  # a sparse tensor's storages are those of its indices and values
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._forget, key).atexit = False
        # The size too: an operation may have resized a storage that is known.
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)
        if self._look_at is not None:
            if size and (key not in self._origins or self._origins[key].size != size):
                shape = tuple(tensor.shape)
                self._origins[key] = Origin(size, shape, tensor.dtype, made_by, self.place)
            if self.live >= self._look_at and not self.alive:
                self.alive = sorted(self._origins.values(), key=lambda o: -o.size)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        self._origins.pop(key, None)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and notes what it made."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, str(function))
        return result


def existing(module: nn.Module, optimizers: Iterable[Any], batch: Any) -> Iterator[torch.Tensor]:
    """Tensors that are there before a step: weights, gradients, optimizer states, the batch."""
    yield from module.buffers()
    states = [list(optimizer.state.values()) for optimizer in optimizers]
    for value in tree_leaves([list(module.parameters()), states, batch]):
        if isinstance(value, torch.Tensor):
            yield value
            if value.is_leaf and value.grad is not None:
                yield value.grad


class Meter:
    """Peak bytes of each local module over the batches that run inside `running`.

    Args:
        num_modules: K.
        device: Where they run.

    Attributes:
        peaks: Bytes, K of them; all that is alive counts, the other modules' parameters and
            optimizer states too.
    """

    def __init__(self, num_modules: int, device: torch.device) -> None:
        self.peaks = [0] * num_modules
        self._device = device
        self._live: LiveBytes | None = None

    @contextmanager
    def running(self, existing: Iterable[torch.Tensor]) -> Iterator[None]:
        """Around a whole batch.

        Args:
            existing: Tensors that are there already: parameters, buffers, optimizer states, batch.
        """
        with ExitStack() as stack:
            if self._device.type != "cuda":
                self._live = LiveBytes(existing)
                stack.enter_context(self._live)
            try:
                yield
            finally:
                self._live = None

    @contextmanager
    def module(self, k: int) -> Iterator[None]:
        """Around work of local module k."""
        if self._live is not None:
            self._live.peak = self._live.live
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        if self._live is not None:
            found = self._live.peak
        else:
            found = torch.cuda.max_memory_allocated(self._device)
        self.peaks[k] = max(self.peaks[k], found)
