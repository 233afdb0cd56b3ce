"""When the optimizers of the local modules step, and when their gradients go.

As under automatic optimization: one step per accumulation window, of which the epoch's last may be
shorter, and nothing of a window that was never stepped reaches the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer import call

from lightning_local.optim import count_once
from lightning_local.precision import LossScalers

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["Stepping"]


class _Closure:
    """What an optimizer may call once, before it steps: the gradients are there.

    Args:
        optimizer: Who is going to call it.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._called = False
        self._versions = self._count()

    def _count(self) -> int:
        return sum(p._version for group in self._optimizer.param_groups for p in group["params"])

    def __call__(self) -> None:
        """Nothing.

        Raises:
            ValueError: The optimizer asks for the loss of other weights.
        """
        if self._called or self._count() != self._versions:
            raise ValueError(
                f"{type(self._optimizer).__name__} evaluates the loss again within one step, and a "
                "local module's loss is computed once per batch: use another optimizer."
            )
        self._called = True


class Stepping:
    """The optimizers of the local modules that live here.

    Args:
        learner: Whose optimizers.
        scalers: The local modules' loss scalers.
        owned: Indices of the local modules.

    Attributes:
        optimizers: One per local module, wrapped by Lightning.
        steps: How often each has stepped in this fit.
    """

    def __init__(self, learner: LocalLearner, scalers: LossScalers, owned: range) -> None:
        found: Any = learner.optimizers()
        self.optimizers: list[Any] = found if isinstance(found, list) else [found]
        self.steps = 0
        self._trainer = learner.trainer
        self._scalers = scalers
        self._owned = owned
        self._local = learner.num_modules > 1
        self._zeroed = self._open = False
        if self._local:
            for optimizer in self.optimizers:
                optimizer.zero_grad()

    @property
    def accumulates(self) -> bool:
        """Whether no optimizer steps in this batch."""
        return self._trainer.fit_loop.epoch_loop._should_accumulate()

    def start(self, batch_idx: int) -> None:
        """Starts a batch."""
        count_once(self._trainer, counted=self._owned[-1])
        if batch_idx % self._trainer.accumulate_grad_batches:
            return
        self._zeroed = False
        if self._open and self._local:
            for k in self._owned:
                self._zero(k)

    def end(self) -> None:
        """Ends a batch."""
        self._open = self.accumulates
        self.steps += not self._open

    def before_backward(self) -> None:
        """With one module at automatic optimization's moment: before a window's first backward."""
        if not self._local and not self._zeroed:
            self._zero(0)
            self._zeroed = True

    def parameters(self, k: int) -> list[Any]:
        """What optimizer k steps."""
        return [p for group in self.optimizers[k].param_groups for p in group["params"]]

    def step(self, k: int) -> None:
        """Steps optimizer k unless it accumulates; releases a local module's gradients at once."""
        if self.accumulates:
            return
        optimizer = self.optimizers[k]
        gradients = (p.grad for p in self.parameters(k))
        with self._scalers.using(k):
            if self._scalers.scaling and all(gradient is None for gradient in gradients):
                # Nothing to unscale, which a scaler takes for a mistake; the step counts anyway.
                optimizer._on_before_step()
                optimizer._on_after_step()
            else:
                optimizer.step(_Closure(optimizer.optimizer))
        self._zeroed = False
        if self._local:
            self._zero(k)

    def _zero(self, k: int) -> None:
        raw = self.optimizers[k].optimizer
        call._call_callback_hooks(self._trainer, "on_before_zero_grad", raw)
        call._call_lightning_module_hook(self._trainer, "on_before_zero_grad", raw)
        self.optimizers[k].zero_grad()
