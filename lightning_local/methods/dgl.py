"""DGL: decoupled greedy learning, with heads that are small multi-layer perceptrons.

Paper: Belilovsky, Eickenberg, Oyallon, ICML 2020, arXiv 1901.08164. Head as in the authors' code,
    and as in AugLocal's re-implementation of it, which later tables use.
Rule: l_k = CE(h_k(x_k), y), x_k from a detached x_{k-1}; h_k is `heads.MLP` (MLP-SR).
Recipe: of the tables with ResNets, InfoPro's and AugLocal's (SGD 0.8, batch 1024, cosine, 160 and
    400 epochs on CIFAR-10), read in their code.
Reconstructed: nothing for maps; the head's form for tokens and vectors is ours. The last local
    module has the network's own classifier, as in the later tables, also with
    `variant="original"`. The replay buffers of the paper's asynchronous variant are not here.
"""

from __future__ import annotations

from lightning_local.couplings import Coupling
from lightning_local.heads import MLP
from lightning_local.methods.base import LocalMethod

__all__ = ["DGL"]

_VARIANTS = {"auglocal": (2, False), "original": (3, True)}


class DGL(LocalMethod):
    """Gradient-isolated local modules with MLP-SR heads.

    Args:
        variant: `"auglocal"` (2 hidden layers without bias) or `"original"` (3 with).
        convs: Number of 1x1 convolutions in a head, 0 or more.
        hidden: Number of hidden linear layers; default the variant's.
        bias: Whether these have one; default the variant's.
        coupling: Default none.

    Raises:
        ValueError: An unknown variant, or a negative number.
    """

    def __init__(
        self,
        *,
        variant: str = "auglocal",
        convs: int = 3,
        hidden: int | None = None,
        bias: bool | None = None,
        coupling: Coupling | None = None,
    ) -> None:
        if variant not in _VARIANTS:
            raise ValueError(f"DGL(variant={variant!r}): pass one of {list(_VARIANTS)}.")
        layers, has_bias = _VARIANTS[variant]
        super().__init__(
            head=MLP(
                convs=convs,
                hidden=layers if hidden is None else hidden,
                bias=has_bias if bias is None else bias,
            ),
            coupling=coupling,
        )
