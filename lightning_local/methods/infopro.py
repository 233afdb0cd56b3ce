"""InfoPro: keep what can rebuild the image, and what predicts the class.

Paper: Wang, Ni, Song, Yang, Huang, ICLR 2021, arXiv 2101.10832. Rule and shapes as in the authors'
    code.
Rule: l_k = lam1_k * BCE(decoder(x_k), image) + lam2_k * task; both weights go linearly from the
    first head to the last (`losses.InfoPro`); h_k is `heads.Conv` (1c2f).
Recipe: SGD 0.8, momentum 0.9 Nesterov, weight decay 1e-4, batch 1024, cosine with 10 epochs of
    warm-up, 160 epochs on CIFAR-10; the weights below are those of ResNet-32, K = 16, for
    `task="contrast"`, and of AugLocal's code for `"softmax"`.
Reconstructed: nothing for images and maps, but the authors' weights with `"softmax"` are not known;
    decoders for tokens and vectors, and heads for other widths than 16, 32 and 64, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_local import losses
from lightning_local.couplings import Coupling
from lightning_local.heads import Conv, Head
from lightning_local.methods.base import LocalMethod

__all__ = ["InfoPro"]


class InfoPro(LocalMethod):
    """Local modules rebuild the network's input beside the task.

    Args:
        denormalize: Mean and standard deviation per channel with which the data were normalised,
            in the scale in which the images are in [0, 1]. Required: they can't be guessed.
        task: `"softmax"` (any criterion) or `"contrast"` (supervised contrastive).
        lam_first: Weights (reconstruction, task) of the first local module.
        lam_last: The same of the last local module with a head.
        widen: Factor on the widths of head and decoder, above 0.
        head: Default `Conv` (1c2f), widened.
        coupling: Default none.
    """

    def __init__(
        self,
        *,
        denormalize: tuple[Sequence[float], Sequence[float]],
        task: str = "softmax",
        lam_first: tuple[float, float] = (5.0, 0.05),
        lam_last: tuple[float, float] = (0.2, 0.5),
        widen: float = 1.0,
        head: Head | None = None,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            head=head or Conv(widen=widen),
            loss=losses.InfoPro(
                denormalize=denormalize,
                task=task,
                lam_first=lam_first,
                lam_last=lam_last,
                widen=widen,
            ),
            coupling=coupling,
        )
