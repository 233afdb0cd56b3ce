"""Couplings: what neighbours tell each other besides the hidden state. Pure torch.

Legend: x_{k-1} the input and x_k the hidden state of local module k, l_k its loss, theta_k its
body. e_k = d l_k / d x_{k-1} is the boundary error (travels one hop back); g_out(k) = d l_k / d x_k
is the boundary gradient (travels forward); g_in(k) = d l_k / d x_{k-1}.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["BackwardLink", "Coupling", "GradientReconciliation", "Isolated", "Work"]


@dataclass
class Work:
    """One local module's share of one batch, from its forward to its step.

    Attributes:
        loss: l_k, a scalar with its graph; set to None as soon as nothing needs it.
        input: x_{k-1} as a leaf that requires grad, None for the first local module and for
            couplings that don't ask for it.
        hidden: x_k with its graph; None for the last local module.
        received: g_out(k-1), shape of x_{k-1}; None unless the coupling sends gradients.
        tail: Maps a length in units to the parameters of the last units of the body.
        run_backward: Runs the backward of a scalar multiplied by `scale`.
        scale: Factor on the loss in `.grad`: 1 / accumulated batches, times the fp16 scale, which
            is a tensor on the device.
        step: Number of the batch since the start of training.
        penalty: R_k for the log, without graph.
    """

    loss: torch.Tensor | None
    input: torch.Tensor | None
    hidden: torch.Tensor | None
    received: torch.Tensor | None
    tail: Callable[[int | None], Sequence[torch.nn.Parameter]]
    run_backward: Callable[..., None]
    scale: float | torch.Tensor = 1.0
    step: int = 0
    penalty: torch.Tensor | None = None


class Coupling(ABC):
    """What neighbours tell each other.

    The learner calls `prepare`, sends its result forward with the hidden state, calls `backward`,
    returns that result to the predecessor, and calls `link` once the successor's error is there.

    Attributes:
        needs_input_gradient: The input of every local module but the first requires grad.
        returns_error: `backward` makes a boundary error, and `link` takes the successor's.
        second_derivative: Gradients are differentiated again.
    """

    needs_input_gradient: bool = False
    returns_error: bool = False
    second_derivative: bool = False

    def prepare(self, work: Work) -> torch.Tensor | None:
        """What must be known before the message can leave.

        Returns:
            The boundary gradient to send forward, without graph, or None.
        """
        return None

    @abstractmethod
    def backward(self, work: Work) -> torch.Tensor | None:
        """Runs the local module's own backward.

        Returns:
            The boundary error for the predecessor, without graph and unscaled, or None.
        """

    def link(self, work: Work, error: torch.Tensor) -> None:
        """Adds what the successor's boundary error `error` asks of this local module."""
        raise AssertionError(f"{type(self).__name__} takes no error")

    def backward_flops(self, body: float, head: float, *, units: int, first: bool) -> float:
        """FLOPs of a local module's backward passes, by formula: 2 forwards for a plain one.

        Args:
            body: Forward FLOPs of the body.
            head: Forward FLOPs of the head; 0 for the last local module, which no error reaches.
            units: Number of units in the body.
            first: Whether it is the first local module, whose input needs no gradient.
        """
        return 2 * (body + head)


class Isolated(Coupling):
    """Neighbours exchange the hidden state alone: greedy local learning."""

    def backward(self, work: Work) -> None:
        """Backward of l_k; the whole graph is freed."""
        loss, work.loss = work.loss, None
        work.run_backward(loss)


def _number(name: str, value: float, owner: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{owner}({name}={value!r}): pass a finite number.")
    if value < 0:
        raise ValueError(f"{owner}({name}={value!r}) is negative: pass 0 (off) or more.")
    return float(value)


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
        self.weight = _number("weight", weight, "BackwardLink")
        if length is not None and (isinstance(length, bool) or length != int(length) or length < 0):
            raise ValueError(
                f"BackwardLink(length={length!r}): pass a number of units, 0 (greedy) or more, or "
                "None for the whole local module."
            )
        self.length = length

    def backward(self, work: Work) -> torch.Tensor | None:
        """Backward of l_k alone; keeps the body's graph for the successor's error."""
        loss, work.loss = work.loss, None
        work.run_backward(loss, retain_graph=work.hidden is not None)
        del loss  # the head's part of the graph is not needed again
        if work.input is None:
            return None
        error, work.input.grad = work.input.grad, None
        return error if error is None else _unscaled(error.detach(), work.scale)

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


def _unscaled(gradient: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """A gradient of the undivided loss, in float32 at least; its graph stays."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale


def gradient_distance(
    own: torch.Tensor, received: torch.Tensor, distance: str = "squared_l2"
) -> torch.Tensor:
    """D(g_in, g_out), a scalar.

    Args:
        own: g_in(k) `(N, ...)`, gradient of a loss that averages over the batch.
        received: g_out(k-1) `(N, ...)`, a constant.
        distance: `"squared_l2"` sums squares over features and averages over samples, on
            per-sample gradients (times N, which undoes the loss's mean); `"mse"` averages both;
            `"cosine"` is 1 - cos; `"normalized_l2"` the L2 distance of unit vectors.
    """
    n = own.shape[0]
    own = own.flatten(1).to(torch.promote_types(own.dtype, torch.float32))
    received = received.flatten(1).to(own.dtype)
    if distance == "squared_l2":
        return ((own - received) * n).square().sum(1).mean()
    if distance == "mse":
        return ((own - received) * n).square().mean()
    if distance == "cosine":
        return (1 - functional.cosine_similarity(own, received, dim=1, eps=1e-12)).mean()
    gap = functional.normalize(own, dim=1) - functional.normalize(received, dim=1)
    return (gap.square().sum(1) + 1e-12).sqrt().mean()


DISTANCES = ("squared_l2", "mse", "cosine", "normalized_l2")


class GradientReconciliation(Coupling):
    """Local modules agree on the gradient at their boundary (SGR, arXiv 2406.05222).

    J_k = l_k + weight * D(g_in(k), g_out(k-1)), k >= 2; g_out(k-1) arrives with the hidden state
    as a constant, so nothing flows back. Every formula here is reconstructed from summaries.
    Attention runs with the plain kernel, since the fused ones have no second derivative: with it,
    weight 0 equals greedy to rounding; without attention, bit for bit.

    Args:
        weight: Factor on the distance, 0 or more; 0 is greedy. No published value is known.
        distance: D, one of `"squared_l2"`, `"mse"`, `"cosine"`, `"normalized_l2"`.
        every: Regularise every n-th batch.
        warmup: Batches over which the weight grows linearly from 0.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> GradientReconciliation(weight=0.1, distance="cosine").second_derivative
        True
    """

    needs_input_gradient = True
    second_derivative = True

    def __init__(
        self,
        weight: float = 0.1,
        distance: str = "squared_l2",
        every: int = 1,
        warmup: int = 0,
    ) -> None:
        self.weight = _number("weight", weight, "GradientReconciliation")
        if distance not in DISTANCES:
            raise ValueError(
                f"GradientReconciliation(distance={distance!r}) is not known: pass one of "
                f"{DISTANCES}."
            )
        if isinstance(every, bool) or every != int(every) or every < 1:
            raise ValueError(
                f"GradientReconciliation(every={every!r}): pass a number of batches, 1 or more."
            )
        self.distance = distance
        self.every = every
        self.warmup = _number("warmup", warmup, "GradientReconciliation")

    def prepare(self, work: Work) -> torch.Tensor | None:
        """The pass of l_k alone: gives g_in(k) with its graph and g_out(k) without one."""
        if work.step % self.every:
            return None
        assert work.loss is not None
        sent: list[torch.Tensor] = []
        handle = None
        if work.hidden is not None:
            # torch leaves register_hook untyped.
            handle = work.hidden.register_hook(sent.append)  # type: ignore[no-untyped-call]
        if work.input is None:
            loss, work.loss = work.loss, None
            work.run_backward(loss)
        else:
            own = torch.autograd.grad(work.loss * work.scale, work.input, create_graph=True)[0]
            self._add_penalty(work, _unscaled(own, work.scale))
        if handle is not None:
            # Left on, it would also see the second pass, which brings R_k's own share.
            handle.remove()
        return _unscaled(sent[0].detach(), work.scale) if sent else None

    def _add_penalty(self, work: Work, own: torch.Tensor) -> None:
        assert work.loss is not None
        assert work.received is not None
        penalty = gradient_distance(own, work.received, self.distance)
        work.penalty = penalty.detach()
        weight = self.weight * min(1.0, (work.step + 1) / self.warmup if self.warmup else 1.0)
        work.loss = work.loss + weight * penalty

    def backward(self, work: Work) -> None:
        """Backward of J_k; the first local module's was its own pass."""
        loss, work.loss = work.loss, None
        if loss is not None:
            work.run_backward(loss)

    def backward_flops(self, body: float, head: float, *, units: int, first: bool) -> float:
        """g_in costs 1 forward, the backward of J_k 2 for each of the two passes in its graph."""
        plain = 2 * (body + head)
        return plain if first else plain + 3 * (body + head) / self.every
