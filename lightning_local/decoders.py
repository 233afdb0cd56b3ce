"""Decoders: networks that rebuild the network's input from a hidden state (InfoPro).

For maps the decoders are the authors' (Wang et al. 2021, arXiv 2101.10832, and its code). For small
images: up to the image's size, 3x3 convolution to 12 channels, BN, ReLU, 3x3 convolution to the
image's channels. For large ones: 1x1 convolution, BN, ReLU, then twice the size and a 3x3
convolution, as often as it takes, from 128 to 32, 12 and the image's channels. The code has the
first up to 96 pixels, the second for 224 and maps of an eighth of that. Ours: where one ends and
the other begins, more or fewer steps, and the forms for tokens and vectors. A decoder returns
logits; the sigmoid is in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from lightning_local.layers import CONV, NORM, BatchNorm1d, ChannelsFirst, Pool
from lightning_local.place import Place

__all__ = ["MapDecoder", "build_decoder", "channel_dim"]

_MODES = ("linear", "bilinear", "trilinear")
# Channels in front of the last convolution, of the one before that, and so on.
_WIDTHS = (12, 32, 128)
_LARGE = 128  # pixels


class _TokensToMap(nn.Module):
    """The last h * w of T tokens as a map, without those before them, such as a class token."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(N, T, C)` to `(N, C, h, w)`."""
        patches = tokens[:, -self.height * self.width :]
        samples, _, channels = patches.shape
        return patches.movedim(2, 1).reshape(samples, channels, self.height, self.width)


class MapDecoder(nn.Module):
    """Brings maps up to the image's size, and rebuilds the image.

    Args:
        first: Makes maps `(N, C, ...)` of a hidden state.
        size: The image's, without channels.
        steps: Layers, each behind a step up: the last to the image's size, the one before to half
            of it, and so on.
    """

    def __init__(self, first: nn.Module, size: tuple[int, ...], steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first = first
        self.size = size
        self.steps = nn.ModuleList(steps)

    def forward(
        self, hidden: torch.Tensor, size: tuple[int, ...] | torch.Size | None = None
    ) -> torch.Tensor:
        """A hidden state to logits `(N, channels, *size)`; default the size at the start."""
        maps: torch.Tensor = self.first(hidden)
        mode = _MODES[maps.ndim - 3]
        for left, step in zip(reversed(range(len(self.steps))), self.steps, strict=True):
            target = [math.ceil(side / 2**left) for side in size or self.size]
            maps = functional.interpolate(maps, target, mode=mode, align_corners=True)
            maps = step(maps)
        return maps


def channel_dim(input: torch.Tensor, place: Place) -> int:
    """Where the channels of the network's input are: last in tokens, else dimension 1."""
    return 2 if _per_token(input, place) else 1


def _per_token(input: torch.Tensor, place: Place) -> bool:
    return place.tokens and input.ndim == 3 and input.shape[1] == place.hidden.space[0]


def _grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The largest grid of square patches of an image that `tokens` tokens can hold."""
    for patch in range(1, min(height, width) + 1):
        rows, columns = height // patch, width // patch
        if height % patch == 0 and width % patch == 0 and rows * columns <= tokens:
            return (rows, columns) if tokens - rows * columns < rows * columns else None
    return None


def build_decoder(place: Place, widen: float) -> nn.Module:
    """The decoder for one place.

    Args:
        place: Where the hidden state is, and what the network's input looks like.
        widen: Factor on the channels between the convolutions.

    Returns:
        A module that maps the hidden state to logits in the shape of the input.

    Raises:
        ValueError: The input is no tensor of floating-point numbers, or its form can't be had from
            the hidden state's.
    """
    image, hidden = place.input, place.hidden
    if image is None or not image.is_floating_point():
        found = "no single tensor" if image is None else f"of type {image.dtype}"
        raise ValueError(
            f"InfoPro reconstructs the network's input, and this one is {found}: it needs a tensor "
            "of floating-point numbers; PredSim, DGL and AugLocal need no reconstruction."
        )
    channels = hidden.channels
    if not hidden.space:
        return nn.Sequential(
            nn.Linear(channels, channels),
            BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, math.prod(image.shape[1:])),
            nn.Unflatten(1, image.shape[1:]),
        )
    if _per_token(image, place):
        return nn.Sequential(
            Pool(2, False),
            nn.Linear(channels, channels),
            nn.LayerNorm(channels),
            nn.ReLU(inplace=True),
            nn.Linear(channels, image.shape[2]),
        )
    first: nn.Module | None = None
    dims, space = image.ndim - 2, hidden.space
    if len(space) == dims and 1 <= dims <= 3 and not place.tokens:
        first = ChannelsFirst(hidden.channel_dim)
    elif place.tokens and image.ndim == 4:
        grid = _grid(hidden.space[0], *image.shape[2:])
        if grid is not None:
            first, space = _TokensToMap(*grid), grid
    if first is None:
        raise ValueError(
            f"InfoPro can't rebuild an input of shape {tuple(image.shape[1:])} from a hidden state "
            f"of shape {hidden.shape} (both without the batch): it can from maps of the input's "
            "number of dimensions, from the tokens of an image's patches, from one token per token "
            "of the input, and from vectors."
        )
    if max(image.shape[2:]) < _LARGE:
        return MapDecoder(first, tuple(image.shape[2:]), [_whole(channels, image, widen)])
    ratio = max(large / small for large, small in zip(image.shape[2:], space, strict=True))
    up = _steps(channels, image, widen, max(1, round(math.log2(ratio))))
    return MapDecoder(nn.Sequential(first, up[0]), tuple(image.shape[2:]), up[1:])


def _width(index: int, widen: float) -> int:
    return max(1, int(_WIDTHS[min(index, len(_WIDTHS) - 1)] * widen))


def _normed(dims: int, before: int, after: int, kernel: int) -> nn.Sequential:
    conv = CONV[dims - 1](before, after, kernel, padding=kernel // 2)
    return nn.Sequential(conv, NORM[dims - 1](after), nn.ReLU(inplace=True))


def _whole(channels: int, image: torch.Tensor, widen: float) -> nn.Sequential:
    """All of a small image's decoder behind its only step up."""
    dims, width = image.ndim - 2, _width(0, widen)
    last = CONV[dims - 1](width, image.shape[1], 3, padding=1)
    return nn.Sequential(*_normed(dims, channels, width, 3), last)


def _steps(channels: int, image: torch.Tensor, widen: float, count: int) -> list[nn.Module]:
    """The layers in front of the first of `count` steps up, and behind each."""
    dims = image.ndim - 2
    widths = [channels, *(_width(index, widen) for index in reversed(range(count)))]
    kernels = [1] + [3] * (count - 1)
    layers: list[nn.Module] = [
        _normed(dims, *sizes) for sizes in zip(widths, widths[1:], kernels, strict=False)
    ]
    return [*layers, CONV[dims - 1](widths[-1], image.shape[1], 3, padding=1)]
