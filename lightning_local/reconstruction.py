"""InfoPro: rebuild the network's input from a hidden state, beside the task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lightning_local.decoders import MapDecoder, build_decoder, channel_dim
from lightning_local.layers import without_autocast
from lightning_local.objectives import (
    Criterion,
    Loss,
    Objective,
    form_of,
    ignored_index,
    own,
    per_item,
)
from lightning_local.place import Place
from lightning_local.ranges import number, one_of
from lightning_local.similarity import supervised_contrastive

__all__ = ["InfoPro"]

EMBEDDING = 128
# How far outside of [0, 1] rounding and resizing may put a pixel.
_SLACK = 0.01


def _numbers(lists: Any) -> list[tuple[float, ...]]:
    """Lists of finite numbers as tuples; empty if they are something else."""
    try:
        found = [tuple(float(v) for v in values) for values in lists]
    except (TypeError, ValueError):
        return []
    return found if all(math.isfinite(v) for values in found for v in values) else []


def _pair(name: str, value: Sequence[float]) -> tuple[float, float]:
    (numbers,) = _numbers([value]) or [()]
    if len(numbers) != 2 or min(numbers) < 0:
        raise ValueError(
            f"InfoPro({name}={value!r}): pass two numbers, 0 or more: the weight of the "
            "reconstruction and that of the task."
        )
    return numbers[0], numbers[1]


class InfoPro(Loss):
    """Reconstruction of the input, and the task (Wang et al. 2021, arXiv 2101.10832).

    l_k = lam1_k * BCE(decoder(x_k), input de-normalised to [0, 1]) + lam2_k * task; both weights go
    linearly from the first head to the last one. A term of weight 0 is not computed, and without a
    reconstruction there is no decoder.

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
        self.task = one_of("InfoPro", "task", task, ("softmax", "contrast"))
        pair = _numbers(denormalize)
        if len(pair) != 2 or len(pair[0]) != len(pair[1]) or not pair[0] or min(pair[1]) <= 0:
            raise ValueError(
                f"InfoPro(denormalize={denormalize!r}): pass two lists of one number per channel, "
                "the means and the standard deviations (above 0) your data were normalised with."
            )
        self.widen = number("InfoPro", "widen", widen, positive=True, what="a factor")
        self.mean, self.std = pair
        self.lam_first, self.lam_last = _pair("lam_first", lam_first), _pair("lam_last", lam_last)
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
        task = own(criterion) if self.task == "softmax" else None
        if not lam[0]:
            return _InfoPro(None, None, task, ignored_index(criterion), 0.0, lam[1])
        decoder = build_decoder(place, self.widen)
        assert place.input is not None
        dim = channel_dim(place.input, place)
        if len(self.mean) not in (1, place.input.shape[dim]):
            raise ValueError(
                f"InfoPro(denormalize=...) has {len(self.mean)} channels, and the network's input "
                f"of shape {tuple(place.input.shape)} has {place.input.shape[dim]}: pass as many, "
                "or one for all."
            )
        form = [-1 if d == dim else 1 for d in range(place.input.ndim)]
        dtype = place.input.dtype
        pixels = torch.stack([torch.tensor(v, dtype=dtype) for v in (self.mean, self.std)])
        pixels = pixels.view(2, *form)
        return _InfoPro(decoder, pixels, task, ignored_index(criterion), lam[0], lam[1])


class _InfoPro(Objective):
    pixels: torch.Tensor

    def __init__(
        self,
        decoder: nn.Module | None,
        pixels: torch.Tensor | None,
        criterion: Criterion | None,
        ignored: int,
        lam1: float,
        lam2: float,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("pixels", pixels, persistent=False)  # mean and standard deviation
        self.criterion = criterion
        self.ignored = ignored
        self.lam1, self.lam2 = lam1, lam2
        self.predicts = criterion is not None and lam2 > 0

    def networks(self) -> list[nn.Module]:
        return [] if self.decoder is None else [self.decoder]

    def check(self, output: torch.Tensor, target: Any, input: Any) -> None:
        low, high = (float(v) for v in self._image(input).aminmax()) if self.lam1 else (0.0, 1.0)
        if math.isnan(low) or math.isnan(high):
            raise ValueError("InfoPro rebuilds the network's input, and the first has NaN in it.")
        if not (low >= -_SLACK and high <= 1 + _SLACK):
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
        return input * self.pixels[1] + self.pixels[0]

    def forward(
        self, output: torch.Tensor, hidden: torch.Tensor, target: Any, input: Any
    ) -> torch.Tensor:
        terms = []
        if self.lam1:
            terms.append(self.lam1 * self._reconstruction(hidden, input))
        if self.lam2:
            output, target = per_item(output, target)
            if self.criterion is not None:
                task = self.criterion(output, target)
            else:
                output = output.flatten(0, -2)
                task = supervised_contrastive(output, target.flatten(), ignored=self.ignored)
            terms.append(self.lam2 * task)
        return terms[0] + terms[1] if len(terms) == 2 else terms[0]

    def _reconstruction(self, hidden: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        assert self.decoder is not None
        resized = isinstance(self.decoder, MapDecoder)
        logits = self.decoder(hidden, input.shape[2:]) if resized else self.decoder(hidden)
        with without_autocast(logits):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # With logits: the same as the authors' sigmoid and BCE, and stable.
            return functional.binary_cross_entropy_with_logits(
                logits, self._image(input).to(logits.dtype)
            )
