"""Layers that heads are made of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional

from lightning_local.recompute import recomputing

__all__ = [
    "ADAPTIVE",
    "AVERAGE",
    "CONV",
    "NORM",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ChannelsFirst",
    "FixedSize",
    "Pool",
    "norm_relu_conv",
    "without_autocast",
]


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm that trains on a batch of one sample: with its running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises `(N, C)` or `(N, C, L)`."""
        if self.training and input.numel() == input.shape[1]:
            return _running_norm(self, input)
        return super().forward(input)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that trains on one sample with a map of one pixel: with its running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises `(N, C, H, W)`."""
        if self.training and input.numel() == input.shape[1]:
            return _running_norm(self, input)
        return super().forward(input)


class BatchNorm3d(nn.BatchNorm3d):
    """BatchNorm that trains on one sample of one voxel: with its running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises `(N, C, D, H, W)`."""
        if self.training and input.numel() == input.shape[1]:
            return _running_norm(self, input)
        return super().forward(input)


def _running_norm(norm: nn.modules.batchnorm._BatchNorm, input: torch.Tensor) -> torch.Tensor:
    return functional.batch_norm(
        input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


def norm_relu_conv(input: torch.Tensor, norm: BatchNorm2d, conv: nn.Conv2d) -> torch.Tensor:
    """`conv(relu(norm(input)))`, which keeps its input for the backward, not what is in between.

    The norm runs once more in the backward, on the same values, so gradients are the same bits. A
    compiler decides by itself what it keeps.
    """
    normed: torch.Tensor = norm(input)
    hooks: AbstractContextManager[object] = nullcontext()
    # One number per channel is normed by running statistics, which will be others by then.
    again = norm.training and torch.is_grad_enabled() and input.numel() > input.shape[1]
    # Statistics over several devices are not the input's own.
    again = again and type(norm) is BatchNorm2d
    if again and not torch.compiler.is_compiling() and not recomputing():
        middle = _Middle(input.detach(), norm, normed)
        hooks = torch.autograd.graph.saved_tensors_hooks(middle.pack, middle.unpack)
    with hooks:
        result: torch.Tensor = conv(functional.relu_(normed))
    return result


class _Middle:
    """What lies between a norm and a convolution: made anew when a backward asks for it."""

    def __init__(self, input: torch.Tensor, norm: BatchNorm2d, middle: torch.Tensor) -> None:
        self._input, self._weights, self._eps = input, (norm.weight, norm.bias), norm.eps
        self._storage = middle.untyped_storage()._cdata
        self._made: torch.Tensor | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Nothing is kept of the middle."""
        return None if tensor.untyped_storage()._cdata == self._storage else tensor

    def unpack(self, kept: torch.Tensor | None) -> torch.Tensor:
        """What was packed; the convolution asks first, then the activation, which is the same."""
        if kept is not None:
            return kept
        made, self._made = self._made, None
        if made is None:
            with torch.no_grad():
                made = functional.batch_norm(
                    self._input, None, None, *self._weights, training=True, eps=self._eps
                )
                self._made = functional.relu_(made)
        return made


class FixedSize(nn.Module):
    """Says what is wrong with a hidden state of another size than at the start.

    Args:
        shape: The size, without the batch.
        owner: What fixes it.
        remedy: What takes any size.
    """

    def __init__(self, shape: tuple[int, ...], owner: str, remedy: str) -> None:
        super().__init__()
        self.shape, self.owner, self.remedy = shape, owner, remedy

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden state as it is.

        Raises:
            ValueError: It has another size.
        """
        if tuple(hidden.shape[1:]) != self.shape:
            raise ValueError(
                f"{self.owner} was made for hidden states of shape {self.shape}, and got "
                f"{tuple(hidden.shape[1:])}: give it inputs of one size, or use {self.remedy}, "
                "which takes any."
            )
        return hidden


class ChannelsFirst(nn.Module):
    """Moves the channels to dimension 1."""

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(N, ..., C)` to `(N, C, ...)`."""
        return hidden.movedim(self.channel_dim, 1)


class Pool(nn.Module):
    """Averages over space or sequence, or (per token) moves the channels last."""

    def __init__(self, channel_dim: int, pools: bool) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.pools = pools

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A hidden state to `(N, C)`, or to `(N, ..., C)` per token."""
        if not self.pools:
            return hidden.movedim(self.channel_dim, -1)
        dims = [d for d in range(1, hidden.ndim) if d != self.channel_dim]
        return hidden.mean(dims) if dims else hidden


# Layers by number of space dimensions, from 1.
CONV: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORM: tuple[type[nn.Module], ...] = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
ADAPTIVE: tuple[type[nn.Module], ...] = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
AVERAGE: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Full precision for what is computed from a tensor on its device."""
    return torch.autocast(tensor.device.type, enabled=False)
