"""Functions that make tensors, or tell about types of numbers, while a network is traced."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

__all__ = ["factories_recorded"]

# Called during tracing these would run once and be frozen; as graph nodes they run in every step.
_FACTORY_NAMES = (
    "arange as_tensor asarray bernoulli empty eye full linspace logspace normal ones rand randint "
    "randn randperm scalar_tensor tensor tril_indices triu_indices zeros"
)
# They look into their argument, which may be a proxy: masks add `torch.finfo(x.dtype).min`.
_INFO_NAMES = ("finfo", "iinfo")
_FACTORIES = {getattr(torch, name) for name in _FACTORY_NAMES.split()}


class _Recorded(TorchFunctionMode):
    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@contextmanager
def factories_recorded(tracer: fx.Tracer) -> Iterator[None]:
    """Tensors made inside the block become graph nodes, so that they are made in every step."""
    names = (*_FACTORY_NAMES.split(), *_INFO_NAMES)
    originals = {name: getattr(torch, name) for name in names}
    thread = threading.get_ident()

    def recorded(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # of a loader, say
                return function(*args, **kwargs)
            proxies = any(isinstance(each, fx.Proxy) for each in (*args, *kwargs.values()))
            if function in _FACTORIES or proxies:
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    try:
        # The mode alone does not see a proxy among int sizes: torch's parser rejects it before.
        for name, function in originals.items():
            setattr(torch, name, recorded(function))
        with _Recorded(tracer):
            yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)
