"""What `heads.Augmented` is made of: sampled units, residual blocks, copies and adapters.

Shapes and rules of the residual form are those of AugLocal's code (arXiv 2402.17318); the form for
other networks is ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lightning_local.body import Body, Code, prediction
from lightning_local.dryrun import Boundary
from lightning_local.layers import BatchNorm1d, BatchNorm2d, Pool, norm_relu_conv
from lightning_local.place import Place, Unit

__all__ = ["build_augmented", "sample_units"]


def sample_units(unit: int, num_units: int, depth: int) -> list[int]:
    """Indices of the `depth` units that a head after unit `unit` of n imitates.

    All later units when there are no more than `depth`, else evenly spaced ones, rounded half to
    even; the last one is always n - 1.

    Example:
        >>> sample_units(0, 16, 5)
        [3, 6, 9, 12, 15]
    """
    later = num_units - 1 - unit
    if depth >= later:
        return list(range(unit + 1, num_units))
    return [round(unit + i * later / depth) for i in range(1, depth + 1)]


class ResidualBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus shortcut (1x1 convolution and BN when the shape changes)."""

    overwrites = False

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride=stride, bias=False), BatchNorm2d(width)
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(N, C, H, W)` to `(N, width, H / stride, W / stride)`."""
        # First, so that its backward comes last: its gradient has the size of the input, and would
        # wait while the other path still has all its activations.
        shortcut = self.shortcut(hidden)
        out = self.bn2(norm_relu_conv(self.conv1(hidden), self.bn1, self.conv2))
        # In place: BN saves its input, not its result, so nothing that backward reads is lost.
        out += shortcut
        del shortcut
        return functional.relu_(out)


class Adapter(nn.Module):
    """Brings a hidden state into the form another unit takes.

    Space is averaged down to the other size, channels are mapped by a linear layer per position
    (a 1x1 convolution); maps become tokens, or tokens maps, by keeping their order.
    """

    def __init__(self, source: Boundary, target: Boundary) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.mix: nn.Module = nn.Identity()
        if source.channels != target.channels:
            self.mix = nn.Linear(source.channels, target.channels, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A hidden state of the source's form to one of the target's."""
        hidden = hidden.movedim(self.source.channel_dim, 1)
        if tuple(hidden.shape[2:]) != self.target.space:
            hidden = _resize(hidden, self.target.space)
        hidden = self.mix(hidden.movedim(1, -1))
        return hidden.movedim(-1, self.target.channel_dim)


def _resize(hidden: torch.Tensor, space: tuple[int, ...]) -> torch.Tensor:
    """Averages `(N, C, ...)` to `(N, C, *space)`."""
    if not space:
        return hidden.flatten(2).mean(2)
    if hidden.ndim == 2:
        return hidden[(...,) + (None,) * len(space)].expand(*hidden.shape, *space)
    if hidden.ndim - 2 != len(space):
        hidden = functional.adaptive_avg_pool1d(hidden.flatten(2), math.prod(space))
        return hidden.reshape(*hidden.shape[:2], *space)
    pools: list[Callable[..., torch.Tensor]] = [
        functional.adaptive_avg_pool1d,
        functional.adaptive_avg_pool2d,
        functional.adaptive_avg_pool3d,
    ]
    return pools[len(space) - 1](hidden, space)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _drop_hooks(network: nn.Module) -> None:
    """Takes the user's hooks off a copy, which would count or log twice; torch's are part of it."""
    for module in network.modules():
        for hooks in (getattr(module, name) for name in _HOOKS):
            for key, hook in list(hooks.items()):
                kinds = [type(hook), *type(hook).__mro__, hook]
                homes = [str(getattr(kind, "__module__", "")) for kind in kinds]
                if not any(home.startswith("torch.") for home in homes):
                    del hooks[key]


class UnitCopy(nn.Module):
    """A unit with parameters of its own: the network's code on copies of the modules it uses.

    Attributes:
        overwrites: Whether it changes its input in place.
    """

    overwrites = False

    def __init__(self, unit: Body, fresh: bool) -> None:
        super().__init__()
        self.network = nn.Module()
        memo: dict[int, Any] = {}
        for path in unit.used:
            *parents, name = path.split(".")
            owner = self.network
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            original = unit.original(path)
            duplicate = copy.deepcopy(original, memo)
            if isinstance(duplicate, (nn.Module, nn.Parameter)):
                setattr(owner, name, duplicate)
            else:
                owner.register_buffer(name, duplicate)
        _drop_hooks(self.network)
        self._codes: dict[bool, Code] = unit.codes
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        if fresh:
            for module in self.network.modules():
                reset = getattr(module, "reset_parameters", None) or getattr(
                    module, "_reset_parameters", None
                )
                if callable(reset):
                    reset()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Runs the unit; the last unit returns the network's prediction."""
        out = prediction(self._codes[self.training].function(self.network, hidden))
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


def _residual_width(unit: Unit) -> int | None:
    """Width of a unit of exactly two 3x3 convolutions on channels-first maps, else None."""
    wide = [
        module
        for module in unit.body.layers()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    ]
    plain = all(conv.kernel_size == (3, 3) and conv.groups == 1 for conv in wide)
    maps = unit.input is not None and len(unit.input.space) == 2 and unit.input.channel_dim == 1
    return wide[-1].out_channels if len(wide) == 2 and plain and maps else None


def build_augmented(place: Place, depth: int, *, fresh: bool, copy: bool) -> nn.Module:
    """Makes an augmented head.

    Args:
        place: Where it sits.
        depth: Number of units.
        fresh: Initialise copies anew.
        copy: Copy every unit, also those that have a residual form.

    Raises:
        ValueError: A unit takes more than the hidden state.
    """
    num_units = place.unit + 1 + len(place.later)
    sampled = [place.later[u - place.unit - 1] for u in sample_units(place.unit, num_units, depth)]
    widths = [None if copy else _residual_width(unit) for unit in sampled]
    layers: list[nn.Module] = []
    form = place.hidden
    halvings = 0.0
    width_before = form.channels
    for unit, width in zip(sampled, widths, strict=True):
        if width is not None and form.channel_dim == 1 and len(form.space) == 2:
            # One halving per block; what is left waits for the next one, or never happens.
            halvings += math.log2(width / width_before)
            stride = 2 if halvings >= 1 else 1
            halvings -= stride - 1
            layers.append(ResidualBlock(form.channels, width, stride))
            space = tuple(-(-size // stride) for size in form.space)
            form, width_before = Boundary((width, *space), 1), width
            continue
        _check_copy(unit, place)
        assert unit.input is not None
        if form != unit.input:
            layers.append(Adapter(form, unit.input))
        layers.append(UnitCopy(unit.body, fresh))
        if unit.last:
            return nn.Sequential(*layers, *_resized(layers[-1], unit.body.out_features, place))
        assert unit.output is not None
        form, halvings, width_before = unit.output, 0.0, unit.output.channels
    layers.append(Pool(form.channel_dim, place.pools))
    if depth <= 1 and place.pools and all(width is not None for width in widths):
        layers.append(BatchNorm1d(form.channels))
    layers.append(nn.Linear(form.channels, place.out_features))
    return nn.Sequential(*layers)


def _resized(copied: nn.Module, features: int | None, place: Place) -> list[nn.Module]:
    """Gives the last unit's copy the head's number of outputs; returns what must follow it."""
    if features is None or features == place.out_features:
        return []
    classifiers = [
        (name, module)
        for name, module in copied.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == features
    ]
    if not classifiers:
        return [nn.Linear(features, place.out_features)]
    (path, last) = classifiers[-1]
    owner, _, name = path.rpartition(".")
    linear = nn.Linear(last.in_features, place.out_features, bias=last.bias is not None)
    setattr(copied.get_submodule(owner), name, linear)
    return []


def _check_copy(unit: Unit, place: Place) -> None:
    if unit.body.num_carried:
        raise ValueError(
            "heads.Augmented can't imitate a unit that takes more than the hidden state (masks, "
            "sizes that ride along): use heads.Conv or heads.Linear for this network."
        )
    if unit.input is None or (unit.output is None and not unit.last):
        raise ValueError(
            "heads.Augmented can't imitate a unit of which it is not clear where its channels are: "
            "say so with Partition(layout=...), or use heads.Conv or heads.Linear."
        )
