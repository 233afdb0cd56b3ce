"""Losses and accuracies of the local modules, kept on the device until they are logged.

Reading one number per module and step would make the host wait K times a step; here nothing is read
before `log_every_n_steps`, the end of an epoch, or a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_local.substitute import OTHER_INPUT

__all__ = ["LocalMetrics", "countable", "counted", "hits"]


# Outputs of up to this many numbers wait for the end of the step, to be counted together; all of
# them together are not more than this many.
_SMALL, _ALL = 2**16, 2**20
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Steps that are kept before they are added up and looked at.
_ROWS = 64


def countable(output: Any, target: Any) -> bool:
    """Whether these are logits `(N, C)` or `(N, T, V)` with one class index each, C and V above 1.

    Not where `(N, T, V)` could as well be torch's `(N, C, T)`.
    """
    return (
        isinstance(output, torch.Tensor)
        and isinstance(target, torch.Tensor)
        and not target.is_floating_point()
        and target.dtype != torch.bool
        and output.ndim in (2, 3)
        and output.shape[:-1] == target.shape
        and output.shape[-1] > 1
        and (output.ndim == 2 or output.shape[1] != output.shape[2])
    )


def counted(target: torch.Tensor, ignored: int = -100) -> torch.Tensor:
    """Which targets count: not the criterion's `ignore_index`, nor negative ones."""
    return (target >= 0) if ignored < 0 else (target >= 0) & (target != ignored)


def hits(outputs: torch.Tensor, target: torch.Tensor, ignored: int = -100) -> torch.Tensor:
    """Right predictions of each of several modules, `(k,)`, from their logits `(k, N, ..., C)`.

    Targets that the criterion ignores are neither right nor counted.
    """
    right = outputs.argmax(-1) == target
    if ignored >= 0:  # negative ones equal no prediction
        right &= target != ignored
    return right.flatten(1).sum(1)


def _put(row: torch.Tensor, ks: list[int], values: torch.Tensor) -> None:
    """`row[ks] = values` without an index tensor, whose way to the device the host would await."""
    if ks[-1] - ks[0] == len(ks) - 1:  # in the order of the modules, so without a gap
        row[ks[0] : ks[0] + len(ks)] = values
        return
    for i, k in enumerate(ks):
        row[k] = values[i]


class LocalMetrics:
    """Losses, accuracies and penalties of K local modules over a window of steps and an epoch.

    A module only notes what it made, the end of a step copies that into a row on the device, and a
    number of rows is added up at once: most of the cost of small things is in their number.

    Args:
        num_modules: K.
        device: Where the modules run.
        ignored: The criterion's `ignore_index`.
    """

    def __init__(self, num_modules: int, device: torch.device, ignored: int = -100) -> None:
        self._k, self._ignored = num_modules, ignored
        # Loss, penalty, right predictions, predictions (MPS has no float64); of steps, of epoch and
        # window.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._rows = torch.zeros(_ROWS, 4, num_modules, dtype=dtype, device=device)
        self._filled = 0
        self._sums = torch.zeros(2, 4, num_modules, dtype=dtype, device=device)
        # How many steps gave a loss, a penalty, predictions: of epoch and window, on the host.
        self._counts = [[[0] * num_modules for _ in range(3)] for _ in range(2)]
        # The first step with a loss that is not finite (times K, plus the module), and the first
        # one whose input the user's step had changed.
        self._next_step = 0
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._first_changed = torch.full((), -1, dtype=torch.int64, device=device)
        self._changed: torch.Tensor | None = None
        self._noted: list[tuple[int, torch.Tensor, torch.Tensor | None, Any, Any]] = []
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._waiting = 0  # numbers in outputs that were noted

    def update(
        self,
        k: int,
        loss: torch.Tensor,
        output: Any,
        target: Any,
    ) -> None:
        """Notes what module k did in this step.

        Args:
            k: The local module.
            loss: l_k, detached.
            output: The prediction, detached.
            target: The targets.
        """
        if isinstance(output, torch.Tensor):
            size = output.numel()
            if size > _SMALL or self._waiting + size > _ALL:
                if countable(output, target):
                    self._count_hits([k], output[None], target)
                output = None
            else:
                self._waiting += size
        self._noted.append((k, loss, None, output, target))

    def add_penalty(self, penalty: torch.Tensor | None) -> None:
        """Notes what the coupling added to the last module's loss that was noted, detached."""
        if penalty is not None:
            k, loss, _, output, target = self._noted[-1]
            self._noted[-1] = (k, loss, penalty, output, target)

    def _count(self, kind: int, ks: list[int], values: torch.Tensor) -> None:
        _put(self._rows[self._filled, kind], ks, values)
        for counts in self._counts:
            for k in ks:
                counts[kind][k] += 1

    def _count_hits(self, ks: list[int], outputs: torch.Tensor, target: torch.Tensor) -> None:
        target = self._as_it_was(target)
        self._count(2, ks, hits(outputs, target, self._ignored))
        of_these = counted(target, self._ignored).sum()
        _put(self._rows[self._filled, 3], ks, of_these.expand(len(ks)))

    def keep(self, target: Any) -> None:
        """Copies class indices before the user's step, which may edit them in place."""
        if isinstance(target, torch.Tensor) and target.ndim <= 2 and target.dtype in _WHOLE:
            self._kept = (target, target.clone())

    def _as_it_was(self, target: Any) -> Any:
        return self._kept[1] if self._kept is not None and target is self._kept[0] else target

    def note_changed(self, changed: torch.Tensor | None) -> None:
        """Notes whether the user's step changed its input; None if it surely did not."""
        self._changed = changed

    def close_step(self, step: int) -> None:
        """Copies what was noted to the device's rows.

        Args:
            step: Number of the batch; one more than the last time.
        """
        if self._noted:
            ks = [k for k, *_ in self._noted]
            losses = [loss if loss.ndim == 0 else loss.reshape(()) for _, loss, *_ in self._noted]
            self._count(0, ks, torch.stack(losses))
        penalties = [(k, penalty) for k, _, penalty, _, _ in self._noted if penalty is not None]
        if penalties:
            self._count(1, [k for k, _ in penalties], torch.stack([p for _, p in penalties]))
        alike: dict[Any, list[tuple[int, torch.Tensor, Any]]] = {}
        for k, _, _, output, target in self._noted:
            if isinstance(output, torch.Tensor):
                form = (output.shape, output.dtype, id(target))
                alike.setdefault(form, []).append((k, output, target))
        for group in alike.values():
            target = group[0][2]
            if countable(group[0][1], target):
                outputs = torch.stack([output for _, output, _ in group])
                self._count_hits([k for k, *_ in group], outputs, target)
        self._noted, self._kept, self._waiting = [], None, 0
        if self._changed is not None:
            fresh = (self._first_changed < 0) & self._changed
            self._first_changed = self._first_changed.masked_fill(fresh, step)
            self._changed = None
        self._next_step = step + 1
        self._filled += 1
        if self._filled == _ROWS:
            self._fold()

    def _fold(self) -> None:
        """Adds the rows up, and marks the first loss in them that is not finite."""
        if not self._filled:
            return
        rows = self._rows[: self._filled]
        bad = ~torch.isfinite(rows[:, 0]).flatten()
        found = (self._next_step - self._filled) * self._k + bad.to(torch.uint8).argmax()
        fresh = (self._first_bad < 0) & bad.any()
        self._first_bad = torch.where(fresh, found, self._first_bad)
        self._sums += rows.sum(0)
        rows.zero_()
        self._filled = 0

    def forget_step(self) -> None:
        """Drops what was noted of a step that did not end."""
        self._noted, self._changed, self._kept, self._waiting = [], None, None, 0

    def check(self, losses: bool = True) -> None:
        """Raises if something was wrong; reads from the device once.

        Args:
            losses: Whether losses have to be finite.

        Raises:
            ValueError: The user's step changed its input; names the first such batch.
            FloatingPointError: A loss was not finite; names the first such step and local module.
        """
        self._fold()
        first, changed = torch.stack([self._first_bad, self._first_changed]).tolist()
        self._first_bad.fill_(-1)
        self._first_changed.fill_(-1)
        if changed >= 0:
            raise ValueError(f"In batch {changed} (counted from 0): {OTHER_INPUT}")
        if first >= 0 and losses:
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
        self._fold()
        row = 0 if epoch else 1
        sums = self._sums[row].clone().cpu()
        self._sums[row].zero_()
        counts = self._counts[row]
        self._counts[row] = [[0] * self._k for _ in range(3)]
        suffix = "_epoch" if epoch else ""
        loss, penalty = sums[:2] / torch.tensor(counts[:2])
        accuracy = sums[2] / sums[3]
        means, ratios, accuracies = loss.float(), (penalty / loss).float(), accuracy.float()
        values: dict[str, torch.Tensor] = {}
        for k, mean in enumerate(means.unbind()):
            if counts[0][k]:
                values[f"local/{k:02d}/loss{suffix}"] = mean
            if counts[2][k]:
                values[f"local/{k:02d}/accuracy{suffix}"] = accuracies[k]
            if counts[1][k]:
                values[f"local/{k:02d}/reconciliation{suffix}"] = ratios[k]
        return values
