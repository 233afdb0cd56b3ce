"""AugLocal: heads that imitate the rest of the network.

Paper: Ma, Wu, Si, Tan, ICLR 2024, arXiv 2402.17318. Rule and shapes as in the authors' code.
Rule: l_k = CE(h_k(x_k), y); h_k has the architecture of d_k units sampled evenly from the later
    ones, the last unit always among them; d_k falls along a line from d to d - pyramid * (d - 1).
    The last d + 1 units are one local module (`heads.Augmented.tail_units`).
Recipe: SGD 0.8, momentum 0.9 Nesterov, weight decay 1e-4, batch 1024, cosine with 10 epochs of
    warm-up, 400 epochs on CIFAR-10, d = 1, 3, 5 (code), 2 for ResNet-32 and 3 for ResNet-110 (its
    README).
Reconstructed: nothing for CIFAR ResNets; the form for other networks is ours (`heads.Augmented`).
"""

from __future__ import annotations

from lightning_local.couplings import Coupling
from lightning_local.heads import Augmented
from lightning_local.methods.base import LocalMethod

__all__ = ["AugLocal"]


class AugLocal(LocalMethod):
    """Heads of `depth` units, sampled from the later units of the network.

    Args:
        depth: Number of units in the first head, 0 or more.
        pyramid: How far the depth falls towards the last head, 0 (constant) to 1.
        init: `"fresh"` (the authors') or `"copy"` (weights of the units that are imitated, for
            pretrained networks).
        block: `"auto"` turns a unit of two 3x3 convolutions into the authors' block and copies any
            other, `"copy"` copies all.
        coupling: Default none.
    """

    def __init__(
        self,
        *,
        depth: int = 2,
        pyramid: float = 0.5,
        init: str = "fresh",
        block: str = "auto",
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            head=Augmented(depth=depth, pyramid=pyramid, init=init, block=block),
            coupling=coupling,
        )
