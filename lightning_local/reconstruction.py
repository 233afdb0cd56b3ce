"""InfoPro: rebuild the network's input from a hidden state, beside the task.

For maps the decoder is the authors' (Wang et al. 2021, arXiv 2101.10832): up to the image's size,
3x3 convolution to 12 channels, BN, ReLU, 3x3 convolution to the image's channels. The forms for
tokens and vectors are ours. A decoder returns logits; the sigmoid is in the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lightning_local.layers import CONV, NORM, BatchNorm1d, ChannelsFirst, Pool, without_autocast
from lightning_local.objectives import Criterion, Loss, Objective, form_of, per_item
from lightning_local.place import Place
from lightning_local.similarity import supervised_contrastive

__all__ = ["InfoPro", "build_decoder"]

EMBEDDING = 128
# How far outside of [0, 1] rounding and resizing may put a pixel.
_SLACK = 0.01
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


def _channel_dim(input: torch.Tensor, place: Place) -> int:
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
    return nn.Sequential(
        first,
        nn.Upsample(tuple(image.shape[2:]), mode=_MODES[dims - 1], align_corners=True),
        conv(channels, width, 3, padding=1),
        NORM[dims - 1](width),
        nn.ReLU(inplace=True),
        conv(width, image.shape[1], 3, padding=1),
    )


def _pair(name: str, value: Sequence[float]) -> tuple[float, float]:
    numbers = tuple(float(v) for v in value)
    if len(numbers) != 2 or not all(math.isfinite(v) and v >= 0 for v in numbers):
        raise ValueError(
            f"InfoPro({name}={value!r}): pass two numbers, 0 or more: the weight of the "
            "reconstruction and that of the task."
        )
    return numbers[0], numbers[1]


class InfoPro(Loss):
    """Reconstruction of the input, and the task (Wang et al. 2021, arXiv 2101.10832).

    l_k = lam1_k * BCE(decoder(x_k), input de-normalised to [0, 1]) + lam2_k * task; both weights go
    linearly from the first head to the last one. A term of weight 0 is not computed.

    Args:
        denormalize: Mean and standard deviation per channel that turn the network's input back into
            numbers in [0, 1]: input * std + mean. Of length 1 for all channels, which an image has
            first.
        task: `"softmax"`, any criterion on the head's output; or `"contrast"`, the supervised
            contrastive loss (temperature 0.07) on a 128-dimensional output, normalised.
        lam_first: (lam1, lam2) of the first local module.
        lam_last: The same of the last local module with a head.
        widen: Factor on the width of the decoder.

    Raises:
        ValueError: An argument is out of its range.
    """

    needs_input = True

    def __init__(
        self,
        denormalize: tuple[Sequence[float], Sequence[float]],
        task: str = "softmax",
        lam_first: tuple[float, float] = (5.0, 0.05),
        lam_last: tuple[float, float] = (0.2, 0.5),
        widen: float = 1.0,
    ) -> None:
        if task not in ("softmax", "contrast"):
            raise ValueError(f"InfoPro(task={task!r}): pass 'softmax' or 'contrast'.")
        try:
            pair = [tuple(float(v) for v in values) for values in denormalize]
        except TypeError:
            pair = []
        if len(pair) != 2 or len(pair[0]) != len(pair[1]) or not pair[0] or min(pair[1]) <= 0:
            raise ValueError(
                f"InfoPro(denormalize={denormalize!r}): pass two lists of one number per channel, "
                "the means and the standard deviations (above 0) your data were normalised with."
            )
        if not widen > 0:
            raise ValueError(f"InfoPro(widen={widen!r}): pass a factor above 0.")
        self.mean, self.std = pair
        self.lam_first, self.lam_last = _pair("lam_first", lam_first), _pair("lam_last", lam_last)
        self.task, self.widen = task, widen
        self.embedding = EMBEDDING if task == "contrast" else None

    def build(self, place: Place, criterion: Criterion) -> Objective:
        """Makes the loss and its decoder; see `build_decoder` for its errors."""
        share = place.k / max(1, place.num_modules - 2)
        lam = [a + (b - a) * share for a, b in zip(self.lam_first, self.lam_last, strict=True)]
        if not any(lam):
            raise ValueError(
                f"InfoPro(lam_first={self.lam_first}, lam_last={self.lam_last}): local module "
                f"{place.k} of {place.num_modules} would learn nothing, since both its weights are "
                "0: pass a weight above 0."
            )
        decoder = build_decoder(place, self.widen)
        assert place.input is not None
        dim = _channel_dim(place.input, place)
        if len(self.mean) not in (1, place.input.shape[dim]):
            raise ValueError(
                f"InfoPro(denormalize=...) has {len(self.mean)} channels, and the network's input "
                f"of shape {tuple(place.input.shape)} has {place.input.shape[dim]}: pass as many, "
                "or one for all."
            )
        form = [-1 if d == dim else 1 for d in range(place.input.ndim)]
        dtype = place.input.dtype
        mean, std = (torch.tensor(v, dtype=dtype).view(form) for v in (self.mean, self.std))
        task = copy.deepcopy(criterion) if self.task == "softmax" else None
        return _InfoPro(decoder, mean, std, task, lam[0], lam[1])


class _InfoPro(Objective):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        decoder: nn.Module,
        mean: torch.Tensor,
        std: torch.Tensor,
        criterion: Criterion | None,
        lam1: float,
        lam2: float,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.criterion = criterion
        self.lam1, self.lam2 = lam1, lam2
        self.predicts = criterion is not None and lam2 > 0

    def networks(self) -> list[nn.Module]:
        return [self.decoder] if self.lam1 else []

    def check(self, output: torch.Tensor, target: Any, input: Any) -> None:
        low, high = (float(v) for v in self._image(input).aminmax())
        if self.lam1 and not (low >= -_SLACK and high <= 1 + _SLACK):
            raise ValueError(
                f"InfoPro(denormalize=...) turns the first batch into numbers from {low:.3g} to "
                f"{high:.3g}, and the reconstruction needs [0, 1]: pass the mean and the standard "
                "deviation, in that scale, with which your data were normalised."
            )
        indices = isinstance(target, torch.Tensor) and not target.is_floating_point()
        if (
            self.lam2
            and self.criterion is None
            and not (indices and target.shape == output.shape[:-1])
        ):
            raise ValueError(
                f"InfoPro(task='contrast') needs a class index per prediction, and got "
                f"{form_of(target)}: use task='softmax', which takes any criterion."
            )

    def _image(self, input: torch.Tensor) -> torch.Tensor:
        return input * self.std + self.mean

    def forward(
        self, output: torch.Tensor, hidden: torch.Tensor, target: Any, input: Any
    ) -> torch.Tensor:
        terms = []
        if self.lam1:
            terms.append(self.lam1 * self._reconstruction(hidden, input))
        if self.lam2:
            output, target = per_item(output, target)
            contrast = self.criterion is None
            task = supervised_contrastive if self.criterion is None else self.criterion
            if contrast and output.ndim > 2:
                output, target = output.flatten(0, -2), target.flatten()
            terms.append(self.lam2 * task(output, target))
        return terms[0] + terms[1] if len(terms) == 2 else terms[0]

    def _reconstruction(self, hidden: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        logits = self.decoder(hidden)
        with without_autocast(logits):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # With logits: the same as the authors' sigmoid and BCE, and stable.
            return functional.binary_cross_entropy_with_logits(
                logits, self._image(input).to(logits.dtype)
            )
