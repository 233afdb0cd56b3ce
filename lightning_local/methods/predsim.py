"""PredSim: predict the class, and match the similarity of samples.

Paper: Nokland, Eidnes, ICML 2019, arXiv 1901.06656. Rule as in the authors' code; sizes as in
    AugLocal's re-implementation, which later tables use.
Rule: l_k = beta * MSE(S(P_k x_k), S(onehot(y))) + (1 - beta) * CE(linear(pool(x_k)), y)
    (`losses.PredSim`, `heads.Linear(pool_features)`).
Recipe: of the tables with ResNets, InfoPro's and AugLocal's (SGD 0.8, batch 1024, cosine, 400
    epochs on CIFAR-10), read in the latter's code; the paper's own is Adam per layer, 5e-4.
Reconstructed: nothing for maps and vectors; S and the pooling for tokens are ours.
"""

from __future__ import annotations

from lightning_local import losses
from lightning_local.couplings import Coupling
from lightning_local.heads import Linear
from lightning_local.methods.base import LocalMethod

__all__ = ["PredSim"]


class PredSim(LocalMethod):
    """Local modules learn from their prediction and from which samples look alike.

    Args:
        beta: Share of the similarity, 0 to 1; 0 is the prediction alone.
        pool_features: Features that are left before the linear layer, 1 or more.
        zero_init: Start the linear layer with weights of zero, as the authors' code does.
        parts: `"predsim"`, or one of the two: `"pred"`, `"sim"` (which has no head).
        coupling: Default none.
    """

    def __init__(
        self,
        *,
        beta: float = 0.99,
        pool_features: int = 512,
        zero_init: bool = False,
        parts: str = "predsim",
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            head=Linear(pool_features=pool_features, zero_init=zero_init),
            loss=losses.PredSim(beta=beta, parts=parts),
            coupling=coupling,
        )
