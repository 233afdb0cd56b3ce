"""What glue reads of modules while it is traced, and contexts that a graph doesn't hold."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FrameType, FunctionType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import fx, nn

__all__ = ["same_reads", "watched"]

# What they answer or set, a graph doesn't hold.
_SWITCHES = (
    *((torch, name) for name in ("is_grad_enabled", "is_autocast_enabled", "manual_seed", "seed")),
    (torch.random, "manual_seed"),
)
_PLAIN = (
    *(int, float, complex, str, type(None), np.generic, torch.dtype, torch.device),
    *(FunctionType, BuiltinFunctionType),
)


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
    own_parameters, thread = nn.Module.parameters, threading.get_ident()

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        path = paths.get(id(module))
        if path is None or name == "training" or threading.get_ident() != thread:
            return value
        if not isinstance(value, (*_PLAIN, list, tuple, dict)) or not _of_glue(sys._getframe(1)):
            return value
        own = name in object.__getattribute__(module, "__dict__")
        if isinstance(value, (torch.device, torch.dtype)) and not own:
            for weight, tensor in module.named_parameters(prefix=path):
                if tensor.is_floating_point() and getattr(tensor, name, None) == value:
                    proxy = tracer.create_proxy("get_attr", weight, (), {})
                    return tracer.create_proxy("call_function", getattr, (proxy, name), {})
        elif _is_plain(value) and (own or value is not None):
            plain[path, name] = copy.copy(value)
        return value

    def parameters(module: nn.Module, recurse: bool = True) -> Iterator[Any]:
        path = paths.get(id(module))
        if path is None or threading.get_ident() != thread:
            yield from own_parameters(module, recurse)
            return
        for name, _ in module.named_parameters(recurse=recurse):
            yield tracer.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})

    own_enter = torch.autocast.__enter__

    def enter(context: Any) -> Any:
        if threading.get_ident() != thread:
            return own_enter(context)  # type: ignore[no-untyped-call]  # torch's
        raise ValueError("glue under torch.autocast would run without it; move it into a submodule")

    with ExitStack() as stack:
        for owner, name, new in (
            (nn.Module, "__getattribute__", read),
            (nn.Module, "parameters", parameters),
            (torch.autocast, "__enter__", enter),
            *((owner, name, _refused(owner, name)) for owner, name in _SWITCHES),
        ):
            stack.enter_context(mock.patch.object(owner, name, new, create=True))
        yield


def _refused(owner: Any, name: str) -> Callable[..., Any]:
    """The function for torch and for us; glue may not call it."""
    function, thread = getattr(owner, name), threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and _of_glue(sys._getframe(1)):
            raise ValueError(f"glue calls torch.{name}, which a graph doesn't hold")
        return function(*args, **kwargs)

    return call


def _of_glue(frame: FrameType) -> bool:
    """Whether code runs there that is neither torch's nor Lightning's nor ours."""
    home = str(frame.f_globals.get("__name__")).partition(".")[0]
    return home not in ("torch", "lightning", "lightning_local")


def _is_plain(value: Any, depth: int = 2) -> bool:
    """Whether it is a number, a text, a function or a small container of these."""
    if isinstance(value, (list, tuple)):
        small = depth > 0 and len(value) < 100
        return small and all(_is_plain(each, depth - 1) for each in value)
    if isinstance(value, dict):
        return _is_plain(list(value.values()), depth)
    return isinstance(value, _PLAIN)


def same_reads(network: nn.Module, plain: dict[tuple[str, str], Any]) -> None:
    """Looks whether the plain attributes that glue read are as they were.

    Raises:
        ValueError: One has changed.
    """
    for (path, name), before in plain.items():
        try:
            now = getattr(network.get_submodule(path), name)
        except Exception as error:  # the module is another one, or a property fails
            now = error
        if now is not before and (type(now) is not type(before) or now != before):
            where = f"`{path}`" if path else type(network).__name__
            raise ValueError(
                f"The network was cut when {name} of {where} was {before!r}, its code between the "
                f"layers reads it, and now it is {now!r}: keep it as it was, or as a buffer "
                "(register_buffer), or move the code that reads it into a submodule of its own, or "
                "into a hook if it only logs."
            )
