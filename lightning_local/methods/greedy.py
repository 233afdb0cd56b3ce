"""Greedy: every local module learns from its own loss alone.

Rule: l_k = CE(h_k(x_k), y), x_k from a detached x_{k-1}. The baseline "Greedy SL" of InfoPro
    (Wang et al. 2021, arXiv 2101.10832): head 0c1f, pool and one linear layer.
Recipe: InfoPro's (SGD 0.8, batch 1024, cosine, 160 epochs on CIFAR-10), read in its code.
"""

from __future__ import annotations

from lightning_local.couplings import Coupling
from lightning_local.heads import Head, Linear
from lightning_local.methods.base import LocalMethod

__all__ = ["Greedy"]


class Greedy(LocalMethod):
    """Gradient-isolated local modules, each with a small head.

    Args:
        head: Default `Linear`, as InfoPro's baseline.
        coupling: Default none.
    """

    def __init__(self, *, head: Head | None = None, coupling: Coupling | None = None) -> None:
        super().__init__(head=head or Linear(), coupling=coupling)
