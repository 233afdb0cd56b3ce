"""Decoders: networks that rebuild the network's input from a hidden state (InfoPro).

For maps the decoder is the authors' (Wang et al. 2021, arXiv 2101.10832): up to the image's size,
3x3 convolution to 12 channels, BN, ReLU, 3x3 convolution to the image's channels. The forms for
tokens and vectors are ours. A decoder returns logits; the sigmoid is in the loss.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from lightning_local.layers import CONV, NORM, BatchNorm1d, ChannelsFirst, Pool
from lightning_local.place import Place

__all__ = ["MapDecoder", "build_decoder", "channel_dim"]

_MODES = ("linear", "bilinear", "trilinear")
_WIDTH = 12


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
    """Brings a map up to the image's size, and rebuilds the image."""

    def __init__(self, first: nn.Module, size: tuple[int, ...], layers: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.size = size
        self.layers = layers

    def forward(
        self, hidden: torch.Tensor, size: tuple[int, ...] | torch.Size | None = None
    ) -> torch.Tensor:
        """A hidden state to logits `(N, channels, *size)`; default the size at the start."""
        maps = self.first(hidden)
        mode = _MODES[maps.ndim - 3]
        maps = functional.interpolate(maps, size or self.size, mode=mode, align_corners=True)
        logits: torch.Tensor = self.layers(maps)
        return logits


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
        widen: Factor on the 12 channels between the convolutions.

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
    dims = image.ndim - 2
    if len(hidden.space) == dims and 1 <= dims <= 3 and not place.tokens:
        first = ChannelsFirst(hidden.channel_dim)
    elif place.tokens and image.ndim == 4:
        grid = _grid(hidden.space[0], *image.shape[2:])
        first = _TokensToMap(*grid) if grid is not None else None
    if first is None:
        raise ValueError(
            f"InfoPro can't rebuild an input of shape {tuple(image.shape[1:])} from a hidden state "
            f"of shape {hidden.shape} (both without the batch): it can from maps of the input's "
            "number of dimensions, from the tokens of an image's patches, from one token per token "
            "of the input, and from vectors."
        )
    width = max(1, int(_WIDTH * widen))
    conv = CONV[dims - 1]
    layers = [
        conv(channels, width, 3, padding=1),
        NORM[dims - 1](width),
        nn.ReLU(inplace=True),
        conv(width, image.shape[1], 3, padding=1),
    ]
    return MapDecoder(first, tuple(image.shape[2:]), nn.Sequential(*layers))
