"""Accuracy of every head in validation and test, and a warning where none was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_local.links import Links
from lightning_local.metrics import countable, counted, hits
from lightning_local.objectives import ignored_index
from lightning_local.wrapping import as_inputs

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["AfterHeads", "HeadAccuracy", "warn_of_untrained"]


class HeadAccuracy:
    """Right predictions of every head over a validation or test run.

    Args:
        num_modules: K.
        device: Where the modules run.
        criterion: The heads' task loss, which may ignore targets.
    """

    def __init__(self, num_modules: int, device: torch.device, criterion: Any = None) -> None:
        self._ignored = ignored_index(criterion)
        self._counts = torch.zeros(2, num_modules, dtype=torch.int64, device=device)

    def update(self, k: int, output: Any, target: Any) -> None:
        """Counts one batch of module k."""
        if countable(output, target):
            self._counts[0, k] += hits(output[None], target, self._ignored)[0]
            self._counts[1, k] += counted(target, self._ignored).sum()

    def compute(self, links: Links) -> torch.Tensor:
        """Accuracies `(K,)` in [0, 1], of all stages; NaN where nothing could be counted."""
        counts = links.add_up(self._counts.cpu())
        return counts[0].double() / counts[1]


def warn_of_untrained(learner: LocalLearner) -> None:
    """Says so where heads that are asked for have learnt nothing: their numbers are chance."""
    heads = [m for m in learner.modules_in_order() if m.head is not None and m.predicts]
    fresh = [m for m in heads if not m.trained and any(True for _ in m.parameters())]
    if fresh:
        rank_zero_warn(
            f"{len(fresh)} of the {len(heads)} heads have not been trained, neither by a fit of "
            "this LocalLearner nor in a checkpoint (one of the plain module has no heads), so "
            "their accuracies and early exits say nothing: call trainer.fit first, or pass "
            "ckpt_path=... of a checkpoint that was written in a fit of the LocalLearner."
        )


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
        if module.predicts:
            accuracy.update(k, out if module.head is None else module.predict(out[0]), target)
        values = out
