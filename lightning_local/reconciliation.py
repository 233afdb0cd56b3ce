"""SGR's coupling: gradients of neighbours at their boundary are made to agree.

Legend: x_{k-1} the input and x_k the hidden state of local module k, l_k its loss, theta_k its
body. e_k = d l_k / d x_{k-1} is the boundary error (travels one hop back); g_out(k) = d l_k / d x_k
is the boundary gradient (travels forward); g_in(k) = d l_k / d x_{k-1}.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lightning_local.ranges import count, number, one_of
from lightning_local.second_order import fast_second_derivatives
from lightning_local.work import Coupling, Work, unscaled

__all__ = ["DISTANCES", "GradientReconciliation", "gradient_distance"]

# What torch raises, without a class of its own, where it can't differentiate a gradient.
_NO_DERIVATIVE = re.compile("derivative for .* is not implemented|differentiate twice")
DISTANCES = ("squared_l2", "mse", "cosine", "normalized_l2")


def gradient_distance(
    own: torch.Tensor, received: torch.Tensor, distance: str = "squared_l2"
) -> torch.Tensor:
    """D(g_in, g_out), a scalar.

    Args:
        own: g_in(k) `(N, ...)`, gradient of a loss that averages over the batch.
        received: g_out(k-1) `(N, ...)`, a constant.
        distance: `"squared_l2"` sums squares over features and averages over samples, on
            per-sample gradients (times N, which undoes the loss's mean); `"mse"` averages both;
            `"cosine"` is 1 - cos; `"normalized_l2"` the L2 distance of unit vectors; where g_in is
            0 these two are 1 and without gradient.
    """
    n = own.shape[0]
    own, received = own.flatten(1), received.flatten(1)
    if distance == "cosine":
        cosines: torch.Tensor = _Cosines.apply(own, received)
        return (1 - cosines).mean()
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    received = received.to(own.dtype)
    if distance in ("squared_l2", "mse"):
        # mse_loss would keep both gradients, a square makes a third tensor of their size.
        squares: torch.Tensor = torch.linalg.vector_norm(own - received).square()
        return n * squares if distance == "squared_l2" else n**2 * squares / own.numel()
    unit, other = _directions(own), _directions(received)
    return ((unit - other).square().sum(1) + 1e-12).sqrt().mean()


class _Cosines(torch.autograd.Function):
    """Cosines `(N,)` of gradients `(N, D)`, with a derivative by the first.

    Keeps the gradients as they came, where products of unit vectors would keep four tensors of
    their size, in float32.
    """

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        """Sums in float32, or in float64 where the gradients are."""
        dtype = torch.promote_types(own.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(each, dim=1, dtype=dtype) for each in (own, received)]
        # A gradient that is 0, or whose square is, has no direction.
        some = (norms[0].square() > 0) & (norms[1].square() > 0)
        first, second = (torch.where(some, norm, 1.0).reciprocal() * some for norm in norms)
        dots = torch.linalg.vecdot(own.to(dtype), received.to(dtype), dim=1)
        cosines: torch.Tensor = dots * first * second
        ctx.save_for_backward(own, received, first * second, cosines * first * first)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The derivative of cos(a, b) by a is b / (|a| |b|) - cos a / |a|^2."""
        own, received, inverse, share = ctx.saved_tensors
        result = received * (gradient * inverse)[:, None]
        return result.addcmul_(own, (gradient * share)[:, None], value=-1).to(own.dtype), None


def _directions(gradients: torch.Tensor) -> torch.Tensor:
    """Unit vectors `(N, D)`; 0, and without gradient, where a gradient is 0 and has none.

    That is so behind weights that start at 0, where the derivative of a direction is infinite.
    """
    squared = gradients.square().sum(1, keepdim=True)
    some = squared > 0
    return gradients * torch.where(some, torch.where(some, squared, 1.0).rsqrt(), 0.0)


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
        owner = "GradientReconciliation"
        self.weight = number(owner, "weight", weight, what="a factor")
        self.distance = one_of(owner, "distance", distance, DISTANCES)
        self.every = count(owner, "every", every, 1, "a number of batches")
        self.warmup = number(owner, "warmup", warmup, what="a number of batches")

    def wants_input(self, k: int, step: int) -> bool:
        """Where and when R_k is formed."""
        return k > 0 and step % self.every == 0

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
        try:
            if work.input is None:
                loss, work.loss = work.loss, None
                work.run_backward(loss)
            else:
                self._add_penalty(work)
        finally:
            if handle is not None:
                # Left on, it would also see the second pass, which brings R_k's own share.
                handle.remove()
        return unscaled(sent[0].detach(), work.scale) if sent else None

    def _add_penalty(self, work: Work) -> None:
        assert work.loss is not None
        assert work.input is not None
        assert work.received is not None
        with fast_second_derivatives(work.loss):
            scaled = work.loss * work.scale
            own = torch.autograd.grad(scaled, work.input, create_graph=True)[0]
        own = unscaled(own, work.scale)
        received, work.received = work.received, None
        penalty = gradient_distance(own, received, self.distance)
        work.penalty = penalty.detach()
        weight = self.weight * min(1.0, (work.step + 1) / self.warmup if self.warmup else 1.0)
        work.loss = work.loss + weight * penalty

    def backward(self, work: Work) -> None:
        """Backward of J_k; the first local module's was its own pass.

        Raises:
            ValueError: torch can't differentiate the gradient of something in the local module.
        """
        loss, work.loss = work.loss, None
        if loss is None:
            return
        try:
            work.run_backward(loss)
        except RuntimeError as error:
            if not _NO_DERIVATIVE.search(str(error)):
                raise
            raise ValueError(
                f"SGR's reconciliation differentiates gradients once more, which torch can't for a "
                f"layer of this network ({error}): replace the layer (Hardswish by SiLU, "
                "Hardsigmoid by Sigmoid, say), or take a coupling without second derivatives."
            ) from error

    def backward_flops(self, body: float, head: float, *, units: int, first: bool) -> float:
        """g_in costs 1 forward, the backward of J_k 2 for each of the two passes in its graph."""
        plain = 2 * (body + head)
        return plain if first else plain + 3 * (body + head) / self.every
