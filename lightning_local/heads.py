"""Heads: auxiliary networks that make a local prediction from a hidden state. Pure torch.

A `Head` is a recipe; `build` makes the module for one place in the network. `Augmented`, which
imitates later units, builds on `augmented.py`.

Legend: a hidden state is `(N, C)`, `(N, C, ...)` with channels first, `(N, ..., C)` with channels
last or tokens `(N, T, C)`. A head that pools returns logits `(N, out)`, else `(N, T, out)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from lightning_local.augmented import build_augmented
from lightning_local.layers import BatchNorm1d, BatchNorm2d, ChannelsFirst, Pool
from lightning_local.place import Place

__all__ = ["Augmented", "Conv", "Head", "Linear"]


class Head(ABC):
    """Recipe for an auxiliary network.

    Attributes:
        tail_units: How many units before the last one the learner joins with it into one local
            module, since a head there would equal the remaining network.
    """

    tail_units: int = 0

    @abstractmethod
    def build(self, place: Place) -> nn.Module:
        """Makes the head for one place; maps the hidden state to logits."""


class Linear(Head):
    """Pool and one linear layer (0c1f): the head of greedy learning.

    Example:
        >>> Linear().tail_units
        0
    """

    def build(self, place: Place) -> nn.Module:
        """Makes pool -> linear."""
        return nn.Sequential(
            Pool(place.hidden.channel_dim, place.pools),
            nn.Linear(place.hidden.channels, place.out_features),
        )


class Conv(Head):
    """One 3x3 convolution and two linear layers (1c2f, InfoPro's head).

    Convolution C -> width (no bias), BN, ReLU, pool, linear to `hidden_features`, ReLU, linear.
    Width and stride are InfoPro's for 16, 32 and 64 channels and continued for others: fewer than
    64 channels double (at least 32) with stride 2, the rest keep width with stride 1. Vectors,
    tokens, and a prediction per token get a linear layer in the convolution's place (with LayerNorm
    for tokens): a convolution over tokens would show a language model its next token.

    Args:
        hidden_features: Width between the two linear layers, 1 or more.

    Raises:
        ValueError: `hidden_features` is below 1.
    """

    def __init__(self, hidden_features: int = 128) -> None:
        if hidden_features < 1:
            raise ValueError(f"Conv(hidden_features={hidden_features}): pass 1 or more.")
        self.hidden_features = hidden_features

    def build(self, place: Place) -> nn.Module:
        """Makes the head for maps or vectors."""
        channels, space = place.hidden.channels, place.hidden.space
        narrow = channels < 64
        width = max(32, 2 * channels) if narrow else channels
        tokens = len(space) == 1 and place.hidden.channel_dim == 2
        layers: list[nn.Module]
        if space and place.pools and not tokens:
            conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(space) - 1]
            norm = (BatchNorm1d, BatchNorm2d, nn.BatchNorm3d)[len(space) - 1]
            layers = [
                ChannelsFirst(place.hidden.channel_dim),
                conv(channels, width, 3, stride=2 if narrow else 1, padding=1, bias=False),
                norm(width),
                nn.ReLU(inplace=True),
                Pool(1, True),
            ]
        elif space:
            layers = [
                Pool(place.hidden.channel_dim, False),
                nn.Linear(channels, width, bias=False),
                nn.LayerNorm(width),
                nn.ReLU(inplace=True),
                Pool(len(space) + 1, place.pools),
            ]
        else:
            layers = [
                nn.Linear(channels, width, bias=False),
                BatchNorm1d(width),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(
            *layers,
            nn.Linear(width, self.hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(self.hidden_features, place.out_features),
        )


class Augmented(Head):
    """A head with the architecture of later units (AugLocal, arXiv 2402.17318).

    In a CIFAR-style ResNet it is the authors' head, weight for weight in shape. In any other
    network (our form) a sampled unit is a copy with weights of its own, behind an adapter where
    shapes differ (average pooling, 1x1 convolution); the last unit's copy brings the network's own
    classifier.

    Args:
        depth: Units in the first head, 0 or more; 0 is pool, BatchNorm and a linear layer. The
            last `depth + 1` units of the network become one local module.
        pyramid: How far the depth falls towards the last head, 0 (constant) to 1.
        init: `"fresh"` or `"copy"` (starts from the imitated units' weights).
        block: `"auto"` turns a unit of two 3x3 convolutions into a fresh residual block, as the
            authors do; `"copy"` copies every unit.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self, depth: int = 2, pyramid: float = 0.5, init: str = "fresh", block: str = "auto"
    ) -> None:
        if isinstance(depth, bool) or depth != int(depth) or depth < 0:
            raise ValueError(f"Augmented(depth={depth!r}): pass a number of units, 0 or more.")
        if not 0 <= pyramid <= 1:
            raise ValueError(f"Augmented(pyramid={pyramid!r}): pass 0 (constant depth) to 1.")
        for name, value, allowed in (
            ("init", init, ("fresh", "copy")),
            ("block", block, ("auto", "copy")),
        ):
            if value not in allowed:
                raise ValueError(f"Augmented({name}={value!r}): pass one of {allowed}.")
        if init == "copy" and block == "auto":
            block = "copy"  # the authors' block has no weights to start from
        self.depth, self.pyramid, self.init, self.block = depth, pyramid, init, block
        self.tail_units = depth

    def depth_at(self, k: int, num_modules: int) -> int:
        """Units in the head of local module k of K: a line from depth to depth - pyramid*(depth-1).

        Rounds half to even and is at least 1, unless `pyramid` is 0.
        """
        if self.pyramid == 0:
            return self.depth
        share = self.pyramid * k / max(1, num_modules - 2)
        return max(1, round(self.depth * (1 - share) + share))

    def build(self, place: Place) -> nn.Module:
        """Makes the head: sampled units, pool, linear."""
        depth = self.depth_at(place.k, place.num_modules)
        return build_augmented(place, depth, fresh=self.init == "fresh", copy=self.block == "copy")
