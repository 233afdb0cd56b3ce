"""SGR: successive gradient reconciliation.

Paper: Yang, Li, Alfarra, Hammoud, Bibi, Torr, Ghanem, ICML 2024, arXiv 2406.05222. No public code
    is known.
Rule: J_k = l_k + weight * D(d l_k / d x_{k-1}, d l_{k-1} / d x_{k-1}), the second gradient a
    constant that arrives with x_{k-1}; k >= 2, the last local module included.
Recipe: ours (InfoPro's CIFAR recipe): none is known.
Reconstructed: the formula, D, weight, every, warmup and the head; only the idea is published.
"""

from __future__ import annotations

from lightning_local.couplings import GradientReconciliation
from lightning_local.heads import Conv, Head
from lightning_local.methods.base import LocalMethod

__all__ = ["SGR"]


class SGR(LocalMethod):
    """Neighbours agree on the gradient at their boundary.

    Args:
        weight: Factor on the distance, 0 or more; 0 is greedy with the same head. Ours: no
            published value is known.
        distance: `"squared_l2"`, `"mse"`, `"cosine"` or `"normalized_l2"`.
        every: Regularise every n-th batch.
        warmup: Batches over which the weight grows from 0.
        head: Default `Conv` (1c2f).
    """

    def __init__(
        self,
        *,
        weight: float = 0.1,
        distance: str = "squared_l2",
        every: int = 1,
        warmup: int = 0,
        head: Head | None = None,
    ) -> None:
        coupling = GradientReconciliation(
            weight=weight, distance=distance, every=every, warmup=warmup
        )
        super().__init__(head=head or Conv(), coupling=coupling)
