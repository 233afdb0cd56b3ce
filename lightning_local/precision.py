"""One fp16 loss scaler per local module.

A scaler grows and shrinks once per step of an optimizer. Shared by K local modules it would move K
times per batch, and one module's overflow would change the scale under the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch

__all__ = ["LossScalers", "outside_precision"]


@contextmanager
def outside_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Runs what automatic optimization runs outside of a step's precision: backward and step.

    Args:
        device: Whose autocast is switched off.
        dtype: The default type of new tensors.
    """
    before = torch.get_default_dtype()
    if before == dtype and not torch.is_autocast_enabled(device.type):
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


class LossScalers:
    """Copies of the precision plugin's scaler; nothing where it has none, or with one module.

    The last local module keeps the plugin's own, so that the plugin's part of a checkpoint is what
    the plain class expects.

    Args:
        trainer: Its precision plugin has the scaler to copy.
        num_modules: K.
    """

    def __init__(self, trainer: pl.Trainer, num_modules: int) -> None:
        self._plugin: Any = trainer.precision_plugin
        scaler = getattr(self._plugin, "scaler", None)
        self._scalers: list[Any] = []
        if scaler is not None and num_modules > 1:
            self._scalers = [copy.deepcopy(scaler) for _ in range(num_modules - 1)] + [scaler]

    @contextmanager
    def using(self, k: int) -> Iterator[None]:
        """Backward and step inside the block scale with local module k's scaler."""
        if not self._scalers:
            yield
            return
        self._plugin.scaler = self._scalers[k]
        try:
            yield
        finally:
            self._plugin.scaler = self._scalers[-1]

    @property
    def scaling(self) -> bool:
        """Whether losses are scaled, by our scalers or the plugin's own."""
        return getattr(self._plugin, "scaler", None) is not None

    def factor(self, k: int, device: torch.device) -> torch.Tensor | float:
        """The current scale of local module k, on the device: nothing is read back."""
        if not self._scalers:
            return 1.0
        scaled: torch.Tensor = self._scalers[k].scale(torch.ones((), device=device))
        return scaled

    def save(self) -> list[dict[str, Any]]:
        """States of the K scalers."""
        return [scaler.state_dict() for scaler in self._scalers]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes on where `save` was; a checkpoint of another precision has none to restore."""
        if len(states) == len(self._scalers):
            for scaler, state in zip(self._scalers, states, strict=True):
                scaler.load_state_dict(state)
