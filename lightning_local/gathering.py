"""Checkpoints of a network in several processes: one ordinary file, written by rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_local import limits
from lightning_local.holdings import Holdings
from lightning_local.in_step import say_nothing_is_saved
from lightning_local.links import BrokenLinks
from lightning_local.mesh_strategy import MeshStrategy

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["GatheringStrategy"]


class GatheringStrategy(MeshStrategy):
    """A mesh strategy for a learner whose stages hold different weights.

    Args:
        args: Of the mesh.
        options: Of the mesh.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._holdings: Holdings | None = None

    @property
    def _learner(self) -> LocalLearner:
        limits.check_learner(self.lightning_module)
        learner: Any = self.lightning_module
        found: LocalLearner = learner
        return found

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole network's on rank 0, nothing elsewhere."""
        if self._is_broken():
            self._learner.links = BrokenLinks()
            return {}
        if self._holdings is None:
            return super().lightning_module_state_dict()
        self._holdings.make_replicas_alike(buffers_alone=True)
        self._holdings.collect()
        return super().lightning_module_state_dict() if self.is_global_zero else {}

    def share_weights(self) -> None:
        """Gives every process the whole network."""
        assert self._holdings is not None
        self._holdings.make_replicas_alike(buffers_alone=True)
        self._holdings.share()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of a local module's optimizer on rank 0, nothing elsewhere."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if self._is_broken() or self._holdings is None or self._processes is None:
            return super().optimizer_state(optimizer) if not self._is_broken() else {}
        k = next(i for i, each in enumerate(self.optimizers) if each is optimizer)
        return self._holdings.optimizer_state(k, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads those of this stage; of the others what schedulers and loggers see."""
        assert self._links is not None
        states = checkpoint["optimizer_states"]
        owned = self._links.owned(len(self.optimizers))
        for k, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            if k in owned:
                optimizer.load_state_dict(state)
                _optimizer_to_device(optimizer, self.root_device)
            else:
                optimizer.load_state_dict({**state, "state": {}})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Writes the file, unless stages are at different batches."""
        if self._is_broken():
            say_nothing_is_saved(filepath)
            return
        super().save_checkpoint(checkpoint, filepath, storage_options)
