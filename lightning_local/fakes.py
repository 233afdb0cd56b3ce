"""Modules of fake tensors, which have a shape and no memory."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from lightning_local.local_module import LocalModule

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["convert_fakes", "fake_copies", "faking"]


@contextmanager
def faking(fakes: FakeTensorMode | None) -> Iterator[None]:
    """New tensors, and copies of real ones, are fakes."""
    if fakes is None:
        yield
        return
    with fakes, FakeCopyMode(fakes):
        yield


def convert_fakes(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """`module.to("cpu", dtype)` for fake tensors, which torch can't exchange in place."""

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else None
        return tensor.detach().to("cpu", kind)

    made: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []  # so that no other gets its id
    for part in module.modules():
        for name, parameter in part._parameters.items():
            # Others stay what they are: tied weights are one tensor.
            if parameter is not None and not (
                parameter.device.type == "cpu" and dtype in (None, parameter.dtype)
            ):
                other = made.setdefault(
                    id(parameter), nn.Parameter(converted(parameter), parameter.requires_grad)
                )
                kept.append(parameter)
                part._parameters[name] = other
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else converted(buffer)


def fake_copies(
    learner: LocalLearner, modules: Sequence[LocalModule], mode: FakeTensorMode
) -> tuple[pl.LightningModule, list[LocalModule], Any, Callable[[], Any] | None]:
    """Copies of the user's module, of local modules, of the criterion and of a recipe.

    The recipe is what a LightningCLI with `--optimizer` put in the place of the module's
    `configure_optimizers`, if anything. The module has a Trainer, for hooks that ask it something.

    Raises:
        ValueError: The module can't be copied.
    """
    given = learner.__dict__.get("configure_optimizers") or learner._given_optimizer
    with FakeCopyMode(mode):
        # Together, since bodies call the network.
        memo: dict[int, Any] = {}
        try:
            module, own, criterion = copy.deepcopy(
                (learner.module, list(modules), learner._criterion[0]), memo
            )
        except Exception as error:
            raise ValueError(
                f"{type(learner.module).__name__} can't be copied ({type(error).__name__}: {error})"
                ", and memory is predicted on a copy: keep locks, files, processes and tensors "
                "with a history out of its attributes, or write its __deepcopy__."
            ) from error
        configure = given
        if isinstance(given, MethodType):
            # Of its function too, which may hold an optimizer of the real parameters.
            function: Any = copy.deepcopy(given.__func__, memo)
            configure = MethodType(function, copy.deepcopy(given.__self__, memo))
    # Fakes of a device need that device.
    for part in (module, *own, criterion):
        if isinstance(part, nn.Module):
            convert_fakes(part)
    module.trainer = _quiet_trainer()
    return module, own, criterion, configure


@functools.cache
def _quiet_trainer() -> pl.Trainer:
    """With a number of steps, so that `estimated_stepping_batches` needs no data."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return pl.Trainer(
            accelerator="cpu", devices=1, barebones=True, max_epochs=-1, max_steps=1000
        )
    finally:
        logger.setLevel(level)
