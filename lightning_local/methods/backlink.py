"""BackLink: a local module also learns from its successor's boundary error.

Paper: Guo, Fouda, Eltawil, Salama, IEEE TAI 2023, arXiv 2205.07141. No public code is known.
Rule: grad_k = d l_k / d theta_k + weight * e_{k+1} d x_k / d theta_k, the second term through the
    last `length` units of k; e_{k+1} = d l_{k+1} / d x_k comes from l_{k+1} alone.
Symbols: theta_k body, x_k hidden state, l_k local loss, e_k boundary error.
Recipe: ours (InfoPro's CIFAR recipe): none is known.
Reconstructed: the formula, weight, length, the one hop and the head; only the idea is published.
"""

from __future__ import annotations

from lightning_local.couplings import BackwardLink
from lightning_local.heads import Conv, Head
from lightning_local.methods.base import LocalMethod

__all__ = ["BackLink"]


class BackLink(LocalMethod):
    """Errors flow one local module back.

    Args:
        weight: Factor on the successor's error, 0 or more; 0 is greedy with the same head.
        length: Units the error passes, from the end of the local module; None is all, 0 greedy.
        head: Default `Conv` (1c2f).
    """

    def __init__(
        self, *, weight: float = 1.0, length: int | None = None, head: Head | None = None
    ) -> None:
        super().__init__(head=head or Conv(), coupling=BackwardLink(weight=weight, length=length))
