"""Losses and accuracies of the local modules, kept on the device until they are logged.

Reading one number per module and step would make the host wait K times a step; here nothing is read
before `log_every_n_steps`, the end of an epoch, or a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from lightning_local.losses import per_item
from lightning_local.substitute import OTHER_INPUT
from lightning_local.wrapping import as_inputs

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["AfterHeads", "HeadAccuracy", "LocalMetrics", "Publisher"]


# Outputs of up to this many numbers wait for the end of the step, to be counted together.
_SMALL = 2**16


def _countable(output: Any, target: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Logits `(n, C)` and class indices `(n,)`, if that is what they are."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return None
    if target.is_floating_point() or target.dtype == torch.bool:
        return None
    logits, labels = per_item(output.detach() if output.requires_grad else output, target)
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels):
        return None
    return logits, labels


def _put(row: torch.Tensor, ks: list[int], values: torch.Tensor | int) -> None:
    """`row[ks] = values` without an index tensor, whose way to the device the host would await."""
    if ks[-1] - ks[0] == len(ks) - 1:  # in the order of the modules, so without a gap
        row[ks[0] : ks[0] + len(ks)] = values
        return
    for i, k in enumerate(ks):
        row[k] = values if isinstance(values, int) else values[i]


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
        # The first step with a loss that is not finite (times K, plus the module), and the first
        # one whose input the user's step had changed.
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._first_changed = torch.full((), -1, dtype=torch.int64, device=device)
        self._changed: torch.Tensor | None = None
        self._has_hits = [False] * num_modules
        # Steps with a penalty, which `every` makes fewer; counted on the host, as rows of `_sums`.
        self._penalties = [[0] * num_modules, [0] * num_modules]
        # Of the step that is going on: modules and values of each row, and outputs still to be
        # counted, together where they have one form and the same targets.
        self._noted: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        self._outputs: dict[Any, tuple[list[int], list[torch.Tensor], torch.Tensor]] = {}

    def update(
        self,
        k: int,
        loss: torch.Tensor,
        output: Any,
        target: Any,
        penalty: torch.Tensor | None = None,
    ) -> None:
        """Notes what module k did in this step; nothing is read from the device."""
        self._note(1, k, loss)
        if penalty is not None:
            self._note(2, k, penalty)
            for counts in self._penalties:
                counts[k] += 1
        pair = _countable(output, target)
        if pair is None:
            return
        self._has_hits[k] = True
        logits, labels = pair
        if logits.numel() <= _SMALL:
            form = (logits.shape, logits.dtype, labels.data_ptr())
            ks, outputs, _ = self._outputs.setdefault(form, ([], [], labels))
            ks.append(k)
            outputs.append(logits)
        else:
            hits = (logits.argmax(1) == labels).sum()
            self._note(3, k, hits)
            self._note(4, k, hits.new_full((), len(labels)))

    def _note(self, row: int, k: int, value: torch.Tensor) -> None:
        ks, values = self._noted.setdefault(row, ([], []))
        ks.append(k)
        values.append(value.detach() if value.ndim == 0 else value.detach().reshape(()))

    def note_changed(self, changed: torch.Tensor | None) -> None:
        """Notes whether the user's step changed its input; None if it surely did not."""
        self._changed = changed

    def close_step(self, step: int) -> None:
        """Adds the step to window and epoch, and marks the first loss that is not finite."""
        sums = torch.zeros_like(self._sums[0])
        for row, (ks, values) in self._noted.items():
            _put(sums[row], ks, torch.stack(values))
        if self._noted:
            _put(sums[0], self._noted[1][0], 1)
        for ks, outputs, labels in self._outputs.values():
            _put(sums[3], ks, (torch.stack(outputs).argmax(2) == labels).sum(1))
            _put(sums[4], ks, len(labels))
        self._noted, self._outputs = {}, {}
        bad = ~torch.isfinite(sums[1])
        found = step * self._k + bad.to(torch.uint8).argmax()
        fresh = (self._first_bad < 0) & bad.any()
        self._first_bad = torch.where(fresh, found, self._first_bad)
        self._sums += sums
        if self._changed is not None:
            fresh = (self._first_changed < 0) & self._changed
            self._first_changed = self._first_changed.masked_fill(fresh, step)
            self._changed = None

    def check(self) -> None:
        """Raises if something was wrong; reads from the device once.

        Raises:
            ValueError: The user's step changed its input; names the first such batch.
            FloatingPointError: A loss was not finite; names the first such step and local module.
        """
        first, changed = torch.stack([self._first_bad, self._first_changed]).tolist()
        self._first_bad.fill_(-1)
        self._first_changed.fill_(-1)
        if changed >= 0:
            raise ValueError(f"In batch {changed} (counted from 0): {OTHER_INPUT}")
        if first >= 0:
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


class AfterHeads:
    """The user's evaluation step, behind the chain of bodies and heads if somebody counts them.

    An object, so that a copy of the learner has steps of its own; wrapped, so that Lightning sees
    which arguments the user's step takes.

    Args:
        learner: The learner.
        name: Of the step.
    """

    def __init__(self, learner: LocalLearner, name: str) -> None:
        self._learner = learner
        self.__wrapped__ = getattr(learner.module, name)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs both."""
        if self._learner.head_accuracy is not None:
            _run_heads(self._learner, self._learner.head_accuracy, batch)
        return self.__wrapped__(batch, *args, **kwargs)


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
