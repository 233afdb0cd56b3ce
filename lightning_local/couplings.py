"""Couplings: what neighbours tell each other besides the hidden state. Pure torch.

`GradientReconciliation` stands in `reconciliation.py`, what a coupling is in `work.py`, where the
symbols are explained too.
"""

from __future__ import annotations

import torch

from lightning_local.ranges import count, number
from lightning_local.reconciliation import GradientReconciliation
from lightning_local.work import Coupling, Work, unscaled

__all__ = ["BackwardLink", "Coupling", "GradientReconciliation", "Isolated", "Work"]


class Isolated(Coupling):
    """Neighbours exchange the hidden state alone: greedy local learning."""

    def backward(self, work: Work) -> None:
        """Backward of l_k; the whole graph is freed."""
        loss, work.loss = work.loss, None
        work.run_backward(loss)


class BackwardLink(Coupling):
    """A local module also learns from its successor's boundary error (BackLink, arXiv 2205.07141).

    grad theta_k = d l_k / d theta_k + weight * e_{k+1} d x_k / d theta_k, the second term through
    the last `length` units of k only; e_{k+1} comes from l_{k+1} alone, so errors travel one hop.
    Heads never see it. The formula is reconstructed from the abstracts.

    Args:
        weight: Factor on the successor's error, 0 or more; 0 is greedy.
        length: Number of units, counted from the end of the local module, that the error passes;
            None is all of them, 0 is greedy.

    Raises:
        ValueError: A negative or non-finite weight or length.

    Example:
        >>> BackwardLink(weight=0.5, length=1).returns_error
        True
    """

    needs_input_gradient = True
    returns_error = True

    def __init__(self, weight: float = 1.0, length: int | None = None) -> None:
        self.weight = number("BackwardLink", "weight", weight, what="a factor")
        if length is not None:
            what = "None (the whole local module) or a number of units"
            length = count("BackwardLink", "length", length, 0, what)
        self.length = length

    def backward(self, work: Work) -> torch.Tensor | None:
        """Backward of l_k alone; keeps the body's graph for the successor's error."""
        loss, work.loss = work.loss, None
        work.run_backward(loss, retain_graph=work.hidden is not None)
        del loss  # the head's part of the graph is not needed again
        if work.input is None:
            return None
        error, work.input.grad = work.input.grad, None
        if error is None:  # the body detaches what it gets
            return torch.zeros_like(work.input)
        return unscaled(error.detach(), work.scale)

    def link(self, work: Work, error: torch.Tensor) -> None:
        """Adds weight * error * d x_k / d theta to the gradients of the tail."""
        tail = work.tail(self.length)
        hidden, work.hidden = work.hidden, None
        assert hidden is not None
        if tail:
            gradient = (error * (self.weight * work.scale)).to(hidden.dtype)
            torch.autograd.backward([hidden], [gradient], inputs=list(tail))

    def backward_flops(self, body: float, head: float, *, units: int, first: bool) -> float:
        """The link's pass through the tail costs 2 of its forwards more."""
        tail = units if self.length is None else min(self.length, units)
        return 2 * (body + head) + (2 * body * tail / units if head else 0)
