"""Leaves the user's network as it was: modes, attributes and buffers around a dry run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Attributes", "attributes_kept", "attributes_of", "restore_attributes", "training_mode"]

Attributes = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


def attributes_of(network: nn.Module) -> Attributes:
    """Attributes and buffers of all modules."""
    return [(module, dict(vars(module)), dict(module._buffers)) for module in network.modules()]


def restore_attributes(kept: Attributes) -> list[str]:
    """Puts attributes and buffers back; returns what had changed."""
    changed = []
    for module, attributes, buffers in kept:
        for now, before in ((vars(module), attributes), (module._buffers, buffers)):
            names = [n for n in {**now, **before} if now.get(n) is not before.get(n)]
            names += [n for n in now if n not in before and n not in names]
            for name in names:
                changed.append(f"{type(module).__name__}.{name}")
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]
    return changed


@contextmanager
def attributes_kept(network: nn.Module) -> Iterator[None]:
    """Attributes and buffers of all modules are the same objects again afterwards."""
    kept = attributes_of(network)
    try:
        yield
    finally:
        restore_attributes(kept)


@contextmanager
def training_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Puts the network in train or eval mode and gives every module its own mode back."""
    modes = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
