"""What changes in place in traced glue: augmented assignment (`x += y`), lists given to a module.

torch.fx would trace `x + y`, which allocates another tensor and leaves other names of `x` as they
were. Its own in-place operators become statements in generated code, which also change names that
hold numbers; as calls they change tensors only.

A list that glue makes is made anew wherever generated code passes it on, so a module may change
the one that it gets as long as nobody looks at what it replaced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

__all__ = ["InPlaceProxy", "check_lists", "filled"]

_NAMES = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)


class InPlaceProxy(fx.Proxy):
    """A proxy that knows augmented assignment."""


def filled(arguments: Any, values: Mapping[fx.Node, Any]) -> Any:
    """A node's arguments with the nodes' values; lists and dicts are new ones, as generated code's.

    torch.fx keeps the graph's own in classes that can't be changed.
    """
    if isinstance(arguments, fx.Node):
        return values[arguments]
    if isinstance(arguments, dict):
        return {key: filled(value, values) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [filled(value, values) for value in arguments]
    if type(arguments) is tuple:
        return tuple(filled(value, values) for value in arguments)
    return fx.node.map_arg(arguments, values.__getitem__)


def check_lists(
    node: fx.Node, given: Any, values: Mapping[fx.Node, Any], alive: Sequence[fx.Node]
) -> None:
    """Looks whether a call changed a list that others read: generated code gives it one of its own.

    Args:
        node: The call.
        given: Its arguments as `filled` made them, after the call.
        values: The nodes' values.
        alive: Nodes that are read behind the call.

    Raises:
        ValueError: It took something out of a list or dict that is read again.
    """
    if any(taken in alive for taken in _taken((node.args, node.kwargs), given, values)):
        raise ValueError(
            f"`{node.target}` changes a list that it is given, and what it replaced in it is read "
            "again behind it, which a body can't follow: give it a copy, list(...)."
        )


def _taken(arguments: Any, given: Any, values: Mapping[fx.Node, Any]) -> list[fx.Node]:
    if isinstance(arguments, fx.Node):
        return [] if given is values[arguments] else [arguments]
    if isinstance(arguments, dict):
        pairs = [(argument, given.get(key)) for key, argument in arguments.items()]
    elif isinstance(arguments, (list, tuple)):
        # Of another length: what glue takes from it next may be another item.
        items = given if len(given) == len(arguments) else [None] * len(arguments)
        pairs = list(zip(arguments, items, strict=True))
    else:
        return []
    return [node for argument, item in pairs for node in _taken(argument, item, values)]


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
