"""Leaves the user's network as it was: modes, attributes and tensors around a dry run."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["Attributes", "attributes_kept", "attributes_of", "restore_attributes", "training_mode"]

# Attributes of every module, such as its dicts of hooks.
_TORCHS = frozenset(vars(nn.Module()))
_KNOWN = (
    *(list, dict, set, deque),
    *(random.Random, np.random.Generator, np.random.RandomState, torch.Generator),
)
# Parts of longer lists are not looked into.
_MANY = 1000
# Of each module: itself, its attributes, its tensors by kind, and what changes inside of the first.
Attributes = list[tuple[nn.Module, dict[str, Any], list[dict[str, Any]], dict[str, "_Inside"]]]


class _Inside:
    """What a container holds, an object's attributes are or a generator draws next.

    Args:
        value: The container, object or generator.
        depth: How many containers deep it is looked at.
    """

    def __init__(self, value: Any, depth: int) -> None:
        self._value = value
        self._held: Any = _held(value)
        self._parts: list[_Inside] = []
        if depth and isinstance(value, (dict, list, deque)) and len(value) <= _MANY:
            parts = value.values() if isinstance(value, dict) else value
            found = [_inside(part, depth - 1) for part in parts if isinstance(part, _KNOWN)]
            self._parts = [inside for inside in found if inside is not None]

    def restore(self) -> bool:
        """Makes it as it was; returns whether it was not."""
        changed = any([part.restore() for part in self._parts])
        if not _same(_held(self._value), self._held):
            _put(self._value, self._held)
            changed = True
        return changed


def _inside(value: Any, depth: int = 3) -> _Inside | None:
    """None for what has nothing inside that a forward of the user's would change."""
    if isinstance(value, _KNOWN):
        return _Inside(value, depth)
    home = type(value).__module__.partition(".")[0]
    plain = isinstance(value, (nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__")
    own = home not in ("torch", "lightning", "builtins", "functools", "numpy")
    return _Inside(value, 0) if own and not plain else None


def _held(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, deque, set)):
        return list(value)
    if isinstance(value, random.Random):
        return (value.getstate(),)
    if isinstance(value, np.random.Generator):
        return (value.bit_generator.state,)
    if isinstance(value, np.random.RandomState):
        return (value.get_state(legacy=False),)
    if isinstance(value, torch.Generator):
        return (value.get_state().tolist(),)
    return dict(vars(value))


def _same(now: Any, before: Any) -> bool:
    """Whether the same objects are held, or a generator's state is the same."""
    if isinstance(before, tuple):
        return str(now) == str(before)
    if len(now) != len(before):
        return False
    if isinstance(before, dict):
        return all(key in now and now[key] is before[key] for key in before)
    return all(a is b for a, b in zip(now, before, strict=True))


def _put(value: Any, held: Any) -> None:
    if isinstance(value, (dict, set, list, deque)):
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(held)
    elif isinstance(value, random.Random):
        value.setstate(held[0])
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = held[0]
    elif isinstance(value, np.random.RandomState):
        value.set_state(held[0])
    elif isinstance(value, torch.Generator):
        value.set_state(torch.tensor(held[0], dtype=torch.uint8))
    else:
        vars(value).clear()
        vars(value).update(held)


def attributes_of(network: nn.Module) -> Attributes:
    """Attributes, parameters and buffers of all modules, and what is inside of the first.

    torch's `functional_call` leaves its own parameters in a module that has two names.
    """
    found: Attributes = []
    for module in network.modules():
        inside = {
            name: kept
            for name, value in vars(module).items()
            if name not in _TORCHS and (kept := _inside(value)) is not None
        }
        tensors: list[dict[str, Any]] = [dict(module._parameters), dict(module._buffers)]
        found.append((module, dict(vars(module)), tensors, inside))
    return found


def restore_attributes(kept: Attributes) -> list[str]:
    """Puts attributes, parameters and buffers back; returns what had changed."""
    changed = []
    for module, attributes, (parameters, buffers), insides in kept:
        for now, before in (
            (vars(module), attributes),
            (module._parameters, parameters),
            (module._buffers, buffers),
        ):
            names = [n for n in {**now, **before} if now.get(n) is not before.get(n)]
            names += [n for n in now if n not in before and n not in names]
            for name in names:
                changed.append(f"{type(module).__name__}.{name}")
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]
        changed += [f"{type(module).__name__}.{n}" for n, each in insides.items() if each.restore()]
    return changed


@contextmanager
def attributes_kept(network: nn.Module) -> Iterator[None]:
    """Attributes and tensors of all modules are the same objects again afterwards."""
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
