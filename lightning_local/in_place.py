"""Augmented assignment (`x += y`) in traced glue.

torch.fx would trace `x + y`, which allocates another tensor and leaves other names of `x` as they
were. Its own in-place operators become statements in generated code, which also change names that
hold numbers; as calls they change tensors only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["InPlaceProxy"]

_NAMES = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)


class InPlaceProxy(fx.Proxy):
    """A proxy that knows augmented assignment, and asks for its length."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        """An attribute that asks for its length as well, such as a shape."""
        return _Attribute(self, name)

    def __len__(self) -> int:
        """What the tracer knows of it."""
        # Ours, in `tracing.py`; torch.fx's own has no decisions.
        tracer: Any = self.tracer
        return int(tracer.decisions.ask(self, "length"))


class _Attribute(fx.proxy.Attribute):
    __len__ = InPlaceProxy.__len__


def _function(name: str) -> Callable[[Any, Any], Any]:
    apply = getattr(operator, name)

    def function(left: Any, right: Any) -> Any:
        return apply(left, right)

    # Under its own name, so that generated code finds and pickles it.
    function.__name__ = function.__qualname__ = name
    return function


def _method(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        proxy: fx.Proxy = self.tracer.create_proxy("call_function", function, (self, other), {})
        return proxy

    return method


for _name in _NAMES:
    globals()[_name] = _function(_name)
    setattr(InPlaceProxy, f"__{_name}__", _method(globals()[_name]))
