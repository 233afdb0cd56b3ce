"""Heads: auxiliary networks that make a local prediction from a hidden state. Pure torch.

A `Head` is a recipe; `build` makes the module for one place in the network. `Augmented`, which
imitates later units, builds on `augmented.py`.

Legend: a hidden state is `(N, C)`, `(N, C, ...)` with channels first, `(N, ..., C)` with channels
last or tokens `(N, T, C)`. A head that pools returns logits `(N, out)`, else `(N, T, out)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import nn

from lightning_local.augmented import build_augmented
from lightning_local.layers import (
    ADAPTIVE,
    AVERAGE,
    CONV,
    NORM,
    BatchNorm1d,
    ChannelsFirst,
    FixedSize,
    Pool,
)
from lightning_local.place import Place
from lightning_local.ranges import count, number, one_of

__all__ = ["MLP", "Augmented", "Conv", "Head", "Linear", "Pool"]


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

    Args:
        pool_features: None averages each channel over all positions. A number keeps some of the
            positions (PredSim): maps are averaged in windows, which double in height and width in
            turns until at most that many features are left, and flattened; the size of the input
            is then fixed. Tokens and vectors are not affected.
        zero_init: Start with weights of zero.

    Raises:
        ValueError: `pool_features` is below 1.

    Example:
        >>> Linear().tail_units
        0
    """

    def __init__(self, pool_features: int | None = None, zero_init: bool = False) -> None:
        if pool_features is not None:
            pool_features = count("Linear", "pool_features", pool_features, 1)
        if not isinstance(zero_init, bool):
            raise ValueError(f"Linear(zero_init={zero_init!r}): pass True or False.")
        self.pool_features, self.zero_init = pool_features, zero_init

    def build(self, place: Place) -> nn.Module:
        """Makes pool -> linear."""
        hidden, space = place.hidden, place.hidden.space
        features = hidden.channels
        layers: list[nn.Module] = [Pool(hidden.channel_dim, place.pools)]
        if self.pool_features is not None and space and place.pools and not place.tokens:
            kernel = pooling_kernel(features, space, self.pool_features)
            # Half a window of zeros on each side where windows don't fit, as Nokland & Eidnes.
            padding = [k // 2 if side % k else 0 for side, k in zip(space, kernel, strict=True)]
            average = AVERAGE[len(space) - 1](kernel, stride=kernel, padding=tuple(padding))
            sized = FixedSize(hidden.shape, "heads.Linear(pool_features=...)", "pool_features=None")
            layers = [sized, ChannelsFirst(hidden.channel_dim), average, nn.Flatten()]
            features *= math.prod(math.ceil(s / k) for s, k in zip(space, kernel, strict=True))
        linear = nn.Linear(features, place.out_features)
        if self.zero_init:
            nn.init.zeros_(linear.weight)
        return nn.Sequential(*layers, linear)


def pooling_kernel(channels: int, space: tuple[int, ...], features: int) -> tuple[int, ...]:
    """Windows that leave at most `features` numbers: sides double in turns, the first one first.

    Args:
        channels: C.
        space: Sizes of the space dimensions.
        features: The number to reach; C of them are always left.
    """
    kernel = [1] * len(space)
    while any(k < side for k, side in zip(kernel, space, strict=True)):
        for i in range(len(space)):
            left = math.prod(math.ceil(s / k) for s, k in zip(space, kernel, strict=True))
            if channels * left <= features:
                return tuple(kernel)
            if kernel[i] < space[i]:
                kernel[i] *= 2
    return tuple(kernel)


class Conv(Head):
    """One 3x3 convolution and two linear layers (1c2f, InfoPro's head).

    Convolution C -> width (no bias), BN, ReLU, pool, linear to `hidden_features`, ReLU, linear.
    Width and stride are InfoPro's for 16, 32 and 64 channels and continued for others: fewer than
    64 channels double (at least 32) with stride 2, the rest keep width with stride 1. Vectors,
    tokens, and a prediction per token get a linear layer in the convolution's place (with LayerNorm
    for tokens): a convolution over tokens would show a language model its next token.

    Args:
        hidden_features: Width between the two linear layers, 1 or more.
        widen: Factor on this width and that of the convolution, above 0.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, hidden_features: int = 128, widen: float = 1.0) -> None:
        count("Conv", "hidden_features", hidden_features, 1)
        self.widen = number("Conv", "widen", widen, positive=True, what="a factor")
        self.hidden_features = max(1, int(hidden_features * widen))

    def build(self, place: Place) -> nn.Module:
        """Makes the head for maps or vectors."""
        channels, space = place.hidden.channels, place.hidden.space
        narrow = channels < 64
        width = max(1, int(self.widen * (max(32, 2 * channels) if narrow else channels)))
        stride = 2 if narrow else 1
        layers: list[nn.Module]
        if space and place.pools and not place.tokens:
            layers = [
                ChannelsFirst(place.hidden.channel_dim),
                CONV[len(space) - 1](channels, width, 3, stride=stride, padding=1, bias=False),
                NORM[len(space) - 1](width),
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


class MLP(Head):
    """1x1 convolutions and a multi-layer perceptron (DGL's MLP-SR head).

    Maps are averaged down to a quarter of their sides; `convs` times 1x1 convolution C -> C (no
    bias), BN, ReLU; average down to 2 per side, flatten; `hidden` times linear, BN, ReLU at that
    width; linear. Tokens (our form) get the same with linear layers and LayerNorm per token and one
    average over the sequence, vectors the perceptron alone. The defaults are those of AugLocal's
    re-implementation, which later tables use; DGL's own code has `hidden=3, bias=True`.

    Args:
        convs: Number of 1x1 convolutions, 0 or more.
        hidden: Number of hidden linear layers, 0 or more.
        bias: Whether hidden linear layers have one.

    Raises:
        ValueError: A negative number.
    """

    def __init__(self, convs: int = 3, hidden: int = 2, bias: bool = False) -> None:
        self.convs = count("MLP", "convs", convs, 0)
        self.hidden = count("MLP", "hidden", hidden, 0)
        if not isinstance(bias, bool):
            raise ValueError(f"MLP(bias={bias!r}): pass True or False.")
        self.bias = bias

    def build(self, place: Place) -> nn.Module:
        """Makes the head for maps, tokens or vectors."""
        width, space = place.hidden.channels, place.hidden.space
        layers: list[nn.Module] = []
        norm: type[nn.Module] = BatchNorm1d
        if space and place.pools and not place.tokens:
            dims = len(space) - 1
            layers = [
                ChannelsFirst(place.hidden.channel_dim),
                ADAPTIVE[dims](tuple(math.ceil(side / 4) for side in space)),
            ]
            for _ in range(self.convs):
                conv = CONV[dims](width, width, 1, bias=False)
                layers += [conv, NORM[dims](width), nn.ReLU(inplace=True)]
            layers += [ADAPTIVE[dims]((2,) * len(space)), nn.Flatten()]
            width *= 2 ** len(space)
        elif space:
            layers = [Pool(place.hidden.channel_dim, False)]
            for _ in range(self.convs):
                linear = nn.Linear(width, width, bias=False)
                layers += [linear, nn.LayerNorm(width), nn.ReLU(inplace=True)]
            layers.append(Pool(len(space) + 1, place.pools))
            norm = BatchNorm1d if place.pools else nn.LayerNorm
        for _ in range(self.hidden):
            linear = nn.Linear(width, width, bias=self.bias)
            layers += [linear, norm(width), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Linear(width, place.out_features))


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
        self.depth = count("Augmented", "depth", depth, 0, "a number of units")
        what = "a share from 0 (constant depth)"
        self.pyramid = number("Augmented", "pyramid", pyramid, 1, what=what)
        self.init = one_of("Augmented", "init", init, ("fresh", "copy"))
        one_of("Augmented", "block", block, ("auto", "copy"))
        if init == "copy" and block == "auto":
            block = "copy"  # the authors' block has no weights to start from
        self.block = block
        self.tail_units = self.depth

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
