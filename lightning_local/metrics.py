"""Losses and accuracies of the local modules, kept on the device until they are logged.

Reading one number per module and step would make the host wait K times a step; here nothing is read
before `log_every_n_steps`, the end of an epoch, or a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_local.losses import per_item
from lightning_local.wrapping import as_inputs

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["HeadAccuracy", "LocalMetrics", "after_heads"]


def _hits(output: Any, target: Any) -> tuple[torch.Tensor, int] | None:
    """Number of right predictions and of predictions, if the targets are class indices."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return None
    if target.is_floating_point() or target.dtype == torch.bool:
        return None
    logits, labels = per_item(output.detach(), target)
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels):
        return None
    return (logits.argmax(1) == labels).sum(), len(labels)


class LocalMetrics:
    """Losses, accuracies and penalties of K local modules over a window of steps and an epoch.

    Args:
        num_modules: K.
        device: Where the modules run.
    """

    def __init__(self, num_modules: int, device: torch.device) -> None:
        self._k = num_modules
        # Rows: steps, loss, penalty, right predictions, predictions; the epoch's, the window's
        # (MPS has no float64).
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, 5, num_modules, dtype=dtype, device=device)
        self._step = torch.zeros(5, num_modules, dtype=dtype, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._has_hits = [False] * num_modules
        # Steps with a penalty, which `every` makes fewer; counted on the host, as rows of `_sums`.
        self._penalties = [[0] * num_modules, [0] * num_modules]

    def update(
        self,
        k: int,
        loss: torch.Tensor,
        output: Any,
        target: Any,
        penalty: torch.Tensor | None = None,
    ) -> None:
        """Notes what module k did in this step; runs on the device only."""
        self._step[0, k] = 1
        self._step[1, k] = loss.detach()
        if penalty is not None:
            self._step[2, k] = penalty
            for counts in self._penalties:
                counts[k] += 1
        found = _hits(output, target)
        if found is not None:
            self._step[3, k] = found[0]
            self._step[4, k] = found[1]
            self._has_hits[k] = True

    def close_step(self, step: int) -> None:
        """Adds the step to window and epoch, and marks the first loss that is not finite."""
        bad = ~torch.isfinite(self._step[1])
        found = step * self._k + bad.to(torch.uint8).argmax()
        fresh = (self._first_bad < 0) & bad.any()
        self._first_bad = torch.where(fresh, found, self._first_bad)
        self._sums += self._step
        self._step.zero_()

    def check(self) -> None:
        """Raises if a loss was not finite; reads one number from the device.

        Raises:
            FloatingPointError: Names the first such step and local module.
        """
        first = int(self._first_bad)
        if first >= 0:
            self._first_bad.fill_(-1)
            raise FloatingPointError(
                f"The loss of local module {first % self._k} of {self._k} was NaN or infinite in "
                f"batch {first // self._k} (counted from 0), the first such one: lower the "
                "learning rate, clip gradients with Trainer(gradient_clip_val=...), or look at the "
                "input with Trainer(detect_anomaly=True)."
            )

    def read(self, epoch: bool = False) -> dict[str, torch.Tensor]:
        """Means over the window (or the epoch), and starts it anew.

        Returns:
            `local/<k>/loss`, `/accuracy` where targets are class indices, `/reconciliation` (mean
            penalty over mean loss) where the coupling has one; for the epoch with `_epoch` behind.
        """
        row = 0 if epoch else 1
        steps, loss, penalty, hits, count = self._sums[row].clone()
        self._sums[row].zero_()
        penalties, self._penalties[row] = self._penalties[row], [0] * self._k
        suffix = "_epoch" if epoch else ""
        values: dict[str, torch.Tensor] = {}
        for k in range(self._k):
            values[f"local/{k:02d}/loss{suffix}"] = (loss[k] / steps[k]).float()
            if self._has_hits[k]:
                values[f"local/{k:02d}/accuracy{suffix}"] = (hits[k] / count[k]).float()
            if penalties[k]:
                ratio = (penalty[k] / penalties[k]) / (loss[k] / steps[k])
                values[f"local/{k:02d}/reconciliation{suffix}"] = ratio.float()
        return values


class HeadAccuracy:
    """Right predictions of every head over a validation or test run.

    Args:
        num_modules: K.
        device: Where the modules run.
    """

    def __init__(self, num_modules: int, device: torch.device) -> None:
        self._counts = torch.zeros(2, num_modules, dtype=torch.int64, device=device)

    def update(self, k: int, output: Any, target: Any) -> None:
        """Counts one batch of module k."""
        found = _hits(output, target)
        if found is not None:
            self._counts[0, k] += found[0]
            self._counts[1, k] += found[1]

    def compute(self) -> torch.Tensor:
        """Accuracies `(K,)` in [0, 1]; NaN where nothing could be counted."""
        return self._counts[0].double() / self._counts[1]


def after_heads(learner: LocalLearner, name: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """The user's evaluation step, behind the chain of bodies and heads if somebody counts them."""
    if learner.head_accuracy is not None:
        _run_heads(learner, learner.head_accuracy, batch)
    return getattr(learner.module, name)(batch, *args, **kwargs)


@torch.no_grad()
def _run_heads(learner: LocalLearner, accuracy: HeadAccuracy, batch: Any) -> None:
    inputs, target = learner.unpack(batch)
    values = as_inputs(inputs)
    for k, module in enumerate(learner.modules_in_order()):
        body = module.body
        if body.in_place and k == 0:
            values = (values[0].clone(), *values[1:])
        out = module(*values)
        accuracy.update(k, out if module.head is None else module.predict(out[0]), target)
        values = out
