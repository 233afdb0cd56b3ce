"""Losses and accuracies of the local modules, kept on the device until they are logged.

Reading one number per module and step would make the host wait K times a step; here nothing is read
before `log_every_n_steps`, the end of an epoch, or a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from lightning_local.losses import per_item
from lightning_local.wrapping import as_inputs

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["HeadAccuracy", "LocalMetrics", "Publisher", "after_heads"]


# Outputs of up to this many numbers wait for the end of the step, to be counted together.
_SMALL = 2**16


def _countable(output: Any, target: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Logits `(n, C)` and class indices `(n,)`, if that is what they are."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return None
    if target.is_floating_point() or target.dtype == torch.bool:
        return None
    logits, labels = per_item(output.detach(), target)
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels):
        return None
    return logits, labels


def _put(row: torch.Tensor, ks: list[int], values: torch.Tensor) -> None:
    """`row[ks] = values` without an index tensor, whose way to the device the host would await."""
    if ks == list(range(ks[0], ks[0] + len(ks))):
        row[ks[0] : ks[0] + len(ks)] = values
    else:
        for k, value in zip(ks, values.unbind(), strict=True):
            row[k] = value


class LocalMetrics:
    """Losses, accuracies and penalties of K local modules over a window of steps and an epoch.

    A step only notes what the modules made; `close_step` then works on all of them at once.

    Args:
        num_modules: K.
        device: Where the modules run.
    """

    def __init__(self, num_modules: int, device: torch.device) -> None:
        self._k = num_modules
        # Rows: steps, loss, penalty, right predictions, predictions; the epoch's, the window's
        # (MPS has no float64).
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2, 5, num_modules, dtype=self._dtype, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._has_hits = [False] * num_modules
        # Steps with a penalty, which `every` makes fewer; counted on the host, as rows of `_sums`.
        self._penalties = [[0] * num_modules, [0] * num_modules]
        # Of the step that is going on: values by row and module, and outputs still to be counted.
        self._values: dict[tuple[int, int], torch.Tensor] = {}
        self._outputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        k: int,
        loss: torch.Tensor,
        output: Any,
        target: Any,
        penalty: torch.Tensor | None = None,
    ) -> None:
        """Notes what module k did in this step; nothing is read from the device."""
        self._values[1, k] = loss.detach()
        if penalty is not None:
            self._values[2, k] = penalty
            for counts in self._penalties:
                counts[k] += 1
        pair = _countable(output, target)
        if pair is None:
            return
        self._has_hits[k] = True
        if pair[0].numel() <= _SMALL:
            self._outputs[k] = pair
        else:
            self._values[3, k] = (pair[0].argmax(1) == pair[1]).sum()
            self._values[4, k] = self._values[3, k].new_full((), len(pair[1]))

    def close_step(self, step: int) -> None:
        """Adds the step to window and epoch, and marks the first loss that is not finite."""
        sums = torch.zeros_like(self._sums[0])
        for row in (1, 2, 3, 4):
            ks = [k for r, k in self._values if r == row]
            if ks:
                values = [self._values[row, k] for k in ks]
                _put(
                    sums[row],
                    ks,
                    torch.stack([v if v.ndim == 0 else v.reshape(()) for v in values]),
                )
                if row == 1:
                    _put(sums[0], ks, torch.ones_like(sums[0, : len(ks)]))
        for ks in self._alike():
            labels = self._outputs[ks[0]][1]
            found = torch.stack([self._outputs[k][0] for k in ks]).argmax(2) == labels
            _put(sums[3], ks, found.sum(1))
            _put(sums[4], ks, torch.full_like(sums[4, : len(ks)], len(labels)))
        self._values, self._outputs = {}, {}
        bad = ~torch.isfinite(sums[1])
        found = step * self._k + bad.to(torch.uint8).argmax()
        fresh = (self._first_bad < 0) & bad.any()
        self._first_bad = torch.where(fresh, found, self._first_bad)
        self._sums += sums

    def _alike(self) -> list[list[int]]:
        """The modules whose outputs can be counted together: one form, the same targets."""
        groups: dict[Any, list[int]] = {}
        for k, (logits, labels) in self._outputs.items():
            form = (logits.shape, logits.dtype, labels.data_ptr(), labels.shape)
            groups.setdefault(form, []).append(k)
        return list(groups.values())

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
        """Means over the window (or the epoch), and starts it anew; one copy from the device.

        Returns:
            `local/<k>/loss`, `/accuracy` where targets are class indices, `/reconciliation` (mean
            penalty over mean loss) where the coupling has one; for the epoch with `_epoch` behind.
        """
        row = 0 if epoch else 1
        steps, loss, penalty, hits, count = self._sums[row].clone().cpu()
        self._sums[row].zero_()
        penalties, self._penalties[row] = self._penalties[row], [0] * self._k
        suffix = "_epoch" if epoch else ""
        means = (loss / steps).float()
        accuracies = (hits / count).float().unbind()
        ratios = (penalty / torch.tensor(penalties) / (loss / steps)).float().unbind()
        values: dict[str, torch.Tensor] = {}
        for k, mean in enumerate(means.unbind()):
            values[f"local/{k:02d}/loss{suffix}"] = mean
            if self._has_hits[k]:
                values[f"local/{k:02d}/accuracy{suffix}"] = accuracies[k]
            if penalties[k]:
                values[f"local/{k:02d}/reconciliation{suffix}"] = ratios[k]
        return values


class Publisher:
    """Hands values to loggers and callbacks in Lightning's next call, as one more part of it.

    `self.log` costs 0.2 ms and more per value, since it goes through all earlier ones; K local
    modules would make it the largest part of a step.

    Args:
        trainer: Whose loggers and callbacks.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._connector = trainer._logger_connector

    def publish(self, values: dict[str, torch.Tensor]) -> None:
        """Callbacks see the values at once, loggers with what the user logs in this step."""
        connector = self._connector
        connector._callback_metrics.update(values)
        connector._logged_metrics.update(values)
        log = type(connector).log_metrics.__get__(connector)

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            self.close()
            log({**metrics, **values}, step)

        connector.__dict__["log_metrics"] = log_metrics

    def close(self) -> None:
        """Gives the connector its own method back."""
        self._connector.__dict__.pop("log_metrics", None)


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
        pair = _countable(output, target)
        if pair is not None:
            self._counts[0, k] += (pair[0].argmax(1) == pair[1]).sum()
            self._counts[1, k] += len(pair[1])

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
