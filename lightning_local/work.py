"""A local module's share of a batch, and what a coupling makes of it. Pure torch.

Legend: x_{k-1} the input and x_k the hidden state of local module k, l_k its loss, theta_k its
body. e_k = d l_k / d x_{k-1} is the boundary error (travels one hop back); g_out(k) = d l_k / d x_k
is the boundary gradient (travels forward); g_in(k) = d l_k / d x_{k-1}.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Coupling", "Work", "unscaled"]


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
        needs_input_gradient: Inputs of local modules may require grad (see `wants_input`).
        returns_error: `backward` makes a boundary error, and `link` takes the successor's.
        second_derivative: Gradients are differentiated again.
    """

    needs_input_gradient: bool = False
    returns_error: bool = False
    second_derivative: bool = False

    def wants_input(self, k: int, step: int) -> bool:
        """Whether in this batch the input of local module k is a leaf that requires grad.

        With `second_derivative` gradients of that module are then differentiated again.
        """
        return self.needs_input_gradient and k > 0

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


def unscaled(gradient: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """A gradient of the undivided loss, in float32 at least; its graph stays."""
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    # To look at a scale that is a tensor would wait for its device.
    return gradient if isinstance(scale, float) and scale == 1.0 else gradient / scale
