"""`compile=True`: every body and head of its own is compiled, in place and for the run.

The whole LightningModule can't be: its step runs K backwards. A compiled body is exact up to the
compiler's own rounding. What is differentiated twice stays eager, since compiled code has no second
derivative. Two of the compiler's modes also capture CUDA graphs, whose tensors live in memory that
the next step writes over: a mark at each step's start tells torch when that is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch._functorch.config
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["CAPTURING", "Compiled"]

# The modes in which torch captures CUDA graphs.
CAPTURING = ("reduce-overhead", "max-autotune")


class Compiled:
    """Compiles local modules, until `close`.

    Args:
        learner: Whose local modules, or whose network if there is only one; nothing is compiled
            unless it was asked to.

    Raises:
        ValueError: Graphs are to be captured, but gradients accumulate or tensors travel.
    """

    def __init__(self, learner: LocalLearner) -> None:
        self._targets: list[nn.Module] = []
        self._before: list[Any] = []
        self._captures = False
        if not learner.compiles:
            return
        mode = _mode(learner)
        self._captures = mode in CAPTURING
        modules, coupling = learner.modules_in_order(), learner.method.coupling
        # The first local module's input needs no gradient, so it has no second derivative either.
        chosen = modules[:1] if coupling.second_derivative else modules
        for module in chosen:
            parts = (*(module.pieces or (module.body,)), module.head)
            self._targets += [part for part in parts if part is not None]
        if learner.num_modules == 1 and all(m.recompute == "none" for m in modules):
            self._targets = [learner.network]
        if len(chosen) < len(modules):
            rank_zero_warn(
                f"compile=True: {type(coupling).__name__} differentiates local modules 1 to "
                f"{len(modules) - 1} twice, which compiled code can't do, so they stay eager; "
                "local module 0 is compiled."
            )
        self._before = [target._compiled_call_impl for target in self._targets]
        for number, target in enumerate(self._targets):
            # In the place that torch's own Module.compile fills.
            target._compiled_call_impl = functools.partial(_compiled(number, mode), target)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around each step: code compiled inside may be run backward as often as the loop does."""
        if not self._targets:
            yield
            return
        if self._captures:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch's
        # By default the compiler frees what one backward has used, and a backward link comes twice.
        with torch._functorch.config.patch(donated_buffer=False):
            yield

    def close(self) -> None:
        """Makes everything as it was before."""
        for target, before in zip(self._targets, self._before, strict=True):
            target._compiled_call_impl = before
        self._targets, self._before = [], []


def _mode(learner: LocalLearner) -> str:
    """The compiler's mode on this device and under this Trainer.

    Raises:
        ValueError: Graphs are to be captured where their memory would be written over too early.
    """
    mode, trainer = learner.compiles, learner.trainer
    if mode not in CAPTURING:
        return mode
    if learner.device.type != "cuda":
        instead = "default" if mode == "reduce-overhead" else "max-autotune-no-cudagraphs"
        rank_zero_warn(
            f"compile={mode!r} captures CUDA graphs, and the learner is on "
            f"{learner.device.type!r}: compiled with the mode {instead!r} instead."
        )
        return instead
    if trainer.world_size > 1:
        raise ValueError(
            f"compile={mode!r} on {trainer.world_size} processes: a boundary tensor would be "
            "written over while it is being sent; pass compile=True."
        )
    if trainer.accumulate_grad_batches > 1:
        # https://github.com/pytorch/pytorch/issues/169545
        raise ValueError(
            f"compile={mode!r} keeps gradients in memory that the next batch writes over, so they "
            "can't accumulate: pass accumulate_grad_batches=1, or compile=True."
        )
    return mode


def _compiled(number: int, mode: str) -> Callable[..., Any]:
    """`module(*values)`, compiled under a code object of its own.

    The compiler keeps 8 variants per code object and then falls back to eager; Module.compile
    would put all local modules under one.
    """
    name = f"local_{number}"
    # A copy of a function of this file, not an exec: what has no file, torch before 2.10 compiles
    # under a wrapper that they share.
    code = _call.__code__.replace(co_name=name)
    compiled: Callable[..., Any] = torch.compile(FunctionType(code, globals(), name), mode=mode)
    return compiled


def _call(module: nn.Module, *values: Any) -> Any:
    return module._call_impl(*values)  # type: ignore[no-untyped-call]  # torch's own, untyped
