"""Leaves the user's network as it was: modes, attributes and buffers around a dry run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Attributes", "attributes_kept", "attributes_of", "restore_attributes", "training_mode"]

# Attributes of every module, such as its dicts of hooks.
_TORCHS = frozenset(vars(nn.Module()))
# Of each module: itself, its attributes, its buffers, and what its containers hold.
Attributes = list[
    tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, "list[Any] | dict[Any, Any]"]]
]


def attributes_of(network: nn.Module) -> Attributes:
    """Attributes and buffers of all modules, and what lists, dicts and sets among them hold."""
    return [
        (
            module,
            dict(vars(module)),
            dict(module._buffers),
            {
                name: dict(value) if isinstance(value, dict) else list(value)
                for name, value in vars(module).items()
                if isinstance(value, (list, dict, set)) and name not in _TORCHS
            },
        )
        for module in network.modules()
    ]


def restore_attributes(kept: Attributes) -> list[str]:
    """Puts attributes and buffers back; returns what had changed."""
    changed = []
    for module, attributes, buffers, contents in kept:
        for now, before in ((vars(module), attributes), (module._buffers, buffers)):
            names = [n for n in {**now, **before} if now.get(n) is not before.get(n)]
            names += [n for n in now if n not in before and n not in names]
            for name in names:
                changed.append(f"{type(module).__name__}.{name}")
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]
        for name, held in contents.items():
            container = attributes[name]
            if not _holds(container, held):
                changed.append(f"{type(module).__name__}.{name}")
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(held)
    return changed


def _holds(container: Any, held: list[Any] | dict[Any, Any]) -> bool:
    """Whether a container holds the same objects as before."""
    if len(container) != len(held):
        return False
    if isinstance(held, dict):
        return all(key in container and container[key] is held[key] for key in held)
    if isinstance(container, list):
        return all(now is before for now, before in zip(container, held, strict=True))
    return all(item in container for item in held)


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
