"""Validation, test and prediction over several stages: each runs its part of the network.

The user's step runs twice: where the data are, up to its call of the network, which tells the
network's input whatever the batch looks like; and on the last stage, with the network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_local.links import Links
from lightning_local.message import Message
from lightning_local.substitute import Substitute, inputs_of_call, replaced

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["AtLastStage", "BatchStart", "evaluate", "no_stop"]


def evaluate(learner: LocalLearner, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """One batch through the local modules of this process.

    Args:
        learner: Whose local modules.
        step: The user's `validation_step`, `test_step` or `predict_step`.
        args: Its arguments; the batch first.

    Returns:
        What the step returned on the last stage, None on others.

    Raises:
        ValueError: The step does not call the network exactly once.
    """
    links, modules = learner.links, learner.modules_in_order()
    counts = learner.head_accuracy
    if links.first:
        originals: dict[int, torch.Tensor] = {}

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.clone()
            originals[id(copy)] = tensor
            return copy

        # The step runs once more on the last stage, and it may change its batch.
        batch = apply_to_collection(args[0], torch.Tensor, copied)
        inputs = inputs_of_call(learner.network, lambda: step(batch, *args[1:])) or ()
        target = learner.unpack(args[0])[1] if counts is not None else None
        links.hide([originals.get(id(value), value) for value in inputs])
        links.send(0, Message(inputs, target, args[0], 0))
    for k in links.owned(len(modules)):
        module, message = modules[k], links.receive(k)
        values = message.values
        if k == 0 and values and module.body.in_place:
            values = (values[0].clone(), *values[1:])
        if k == len(modules) - 1:
            if not values:
                with replaced(learner.network, "forward", _refuse):
                    return step(*args)

            def output(module: Any = module, values: tuple[Any, ...] = values) -> Any:
                return module(*values)

            network = Substitute(
                learner.network, output, None, step=getattr(step, "__name__", "step")
            )
            with network.active():
                result = step(*args)
            if counts is not None and module.predicts:
                counts.update(k, network.output, message.target)
            return result
        out = module(*values) if values else ()
        if counts is not None and module.predicts and out:
            counts.update(k, module.predict(out[0]), message.target)
        links.send(k + 1, Message(out, message.target, message.batch, 0))
    return None


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "The step called the network on the last stage, but not on the first, where it found its "
        "input: whether the network is called may not depend on what only one process knows."
    )


class AtLastStage:
    """A hook of the user's module that looks at what steps made, and runs where they ran.

    Args:
        learner: Its links say where.
        name: Of the hook.
    """

    def __init__(self, learner: LocalLearner, name: str) -> None:
        self._learner = learner
        self._name = name
        self.__wrapped__ = getattr(learner.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it on the last stage."""
        if not self._learner.links.last:
            return None
        if self._name != "on_train_batch_end":
            return self.__wrapped__(*args, **kwargs)  # the others will hear of it at the end
        with no_stop(self._learner, self._name):
            return self.__wrapped__(*args, **kwargs)


@contextmanager
def no_stop(learner: LocalLearner, where: str) -> Iterator[None]:
    """Refuses an end of training that the other stages would not hear of.

    Args:
        learner: Its links say whether there are any.
        where: What runs on the last stage alone.

    Raises:
        ValueError: It set `trainer.should_stop`.
    """
    trainer = learner.trainer
    before = trainer.should_stop
    yield
    if trainer.should_stop and not before and not learner.links.first:
        raise ValueError(
            f"{where} set trainer.should_stop, and it runs on the last stage alone, while the "
            "others are at later batches: set it in on_validation_epoch_end, on_train_epoch_end or "
            "in a callback, all of which every stage hears of."
        )


class BatchStart:
    """The user's `on_train_batch_start`; where the data are, it may skip the rest of an epoch.

    Args:
        learner: Its links tell the other stages.
    """

    def __init__(self, learner: LocalLearner) -> None:
        self._learner = learner
        self.__wrapped__ = learner.module.on_train_batch_start

    def __call__(self, batch: Any, batch_idx: int) -> int | None:
        """-1 on all stages, or on none."""
        links: Links = self._learner.links
        if links.skipped:
            links.skip()
            return -1
        response = self.__wrapped__(batch, batch_idx)
        if not links.first or response != -1:
            return None
        links.skip()
        return -1
