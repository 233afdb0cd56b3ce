"""What glue reads of modules while it is traced, and contexts that a graph doesn't hold."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

__all__ = ["same_reads", "watched"]

# What they answer or set, a graph doesn't hold.
_SWITCHES = ("is_grad_enabled", "is_autocast_enabled", "manual_seed")
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def watched(
    network: nn.Module, tracer: fx.Tracer, plain: dict[tuple[str, str], Any]
) -> Iterator[None]:
    """Notes plain attributes that are read, and makes parameters that are asked for graph nodes.

    A number that glue reads of a module becomes part of the graph; `same_reads` looks whether it is
    still the same. Of `self.device` and `next(self.parameters()).device` the graph asks in every
    step.

    Args:
        network: What is traced.
        tracer: Makes the nodes.
        plain: Filled with the values that were read, by path and name.
    """
    paths = {id(module): path for path, module in network.named_modules()}
    own_parameters = nn.Module.parameters

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name == "training" or name.startswith("_"):
            return value
        path = paths.get(id(module))
        if path is None:
            return value
        if type(value) in _PLAIN:
            own = name in object.__getattribute__(module, "__dict__")
            if own or isinstance(getattr(type(module), name, None), property):
                plain[path, name] = value
        elif isinstance(value, (torch.device, torch.dtype)):
            for weight, tensor in module.named_parameters(prefix=path):
                if tensor.is_floating_point() and getattr(tensor, name, None) == value:
                    proxy = tracer.create_proxy("get_attr", weight, (), {})
                    return tracer.create_proxy("call_function", getattr, (proxy, name), {})
        return value

    def parameters(module: nn.Module, recurse: bool = True) -> Iterator[Any]:
        path = paths.get(id(module))
        if path is None:
            yield from own_parameters(module, recurse)
            return
        for name, _ in module.named_parameters(recurse=recurse):
            yield tracer.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})

    def enter(context: Any) -> Any:
        raise ValueError("glue under torch.autocast would run without it; move it into a submodule")

    with ExitStack() as stack:
        for owner, name, new in (
            (nn.Module, "__getattribute__", read),
            (nn.Module, "parameters", parameters),
            (torch.autocast, "__enter__", enter),
            *((torch, name, _refused(name)) for name in _SWITCHES),
        ):
            stack.enter_context(mock.patch.object(owner, name, new, create=True))
        yield


def _refused(name: str) -> Callable[..., Any]:
    """The function for torch and for us; glue may not call it."""
    function = getattr(torch, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if caller.partition(".")[0] not in ("torch", "lightning_local"):
            raise ValueError(f"glue calls torch.{name}, which a graph doesn't hold")
        return function(*args, **kwargs)

    return call


def same_reads(network: nn.Module, plain: dict[tuple[str, str], Any]) -> None:
    """Looks whether the plain attributes that glue read are as they were.

    Raises:
        ValueError: One has changed.
    """
    for (path, name), before in plain.items():
        now = getattr(network.get_submodule(path), name, None)
        if now is not before and now != before:
            where = f"`{path}`" if path else type(network).__name__
            raise ValueError(
                f"The network was cut when {name} of {where} was {before!r}, its code between the "
                f"layers reads it, and now it is {now!r}: keep it as it was, or as a buffer "
                "(register_buffer), or move the code that reads it into a submodule of its own."
            )
