"""The peak and the FLOPs of a step on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.memory.configurations import Configuration
from benchmarks.memory.networks import Subject
from lightning_local import LocalLearner, rehearsal
from lightning_local.setting import Setting

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What a step would need.

    Attributes:
        num_modules: K.
        head_parameters: Of all heads and losses.
        static: Bytes of parameters, buffers, optimizer states and the batch.
        peak: The most bytes that are alive at once.
        flops: Of the whole step, recomputation included.
        notes: What the rehearsal did otherwise than a fit.
        at_peak: The tensors that are alive at the peak, if they were asked for.
    """

    num_modules: int
    head_parameters: int
    static: int
    peak: int
    flops: int
    notes: tuple[str, ...]
    at_peak: tuple[Any, ...]


class _Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        count: Callable[..., int] | None = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def predict(
    subject: Subject,
    configuration: Configuration,
    batch_size: int,
    precision: str = "32-true",
    origins: bool = False,
) -> Prediction:
    """Rehearses a step.

    Args:
        subject: The network.
        configuration: How it is trained.
        batch_size: Samples of the batch.
        precision: As the Trainer's.
        origins: Whether to say which tensors are alive at the peak.
    """
    L.seed_everything(0, verbose=False)
    example = subject.data(2)
    learner = configuration.learner(subject)
    if not learner.whole:
        learner.planned_batch_size = batch_size
        learner.build(example[0])
    modules = learner.modules_in_order()
    flops = [0]

    class Counted(rehearsal.Rehearsal):
        def _run(self) -> None:
            with _Flops() as counter:
                super()._run()
            flops[0] = counter.total

    setting = Setting(example, batch_size, precision)
    with patch.object(rehearsal, "Rehearsal", Counted), torch.random.fork_rng(devices=[]):
        found = rehearsal.rehearse(learner, modules, learner.method, setting, origins=origins)
    return Prediction(
        num_modules=learner.num_modules,
        head_parameters=_size(learner),
        static=found.static,
        peak=found.peak,
        flops=flops[0],
        notes=tuple(found.notes),
        at_peak=tuple(found.at_peak),
    )


def _size(learner: LocalLearner) -> int:
    return sum(p.numel() for p in learner.local_modules.parameters())
