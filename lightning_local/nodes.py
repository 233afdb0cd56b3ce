"""Nodes of a traced graph: how they run, what they read, whether a gradient passes them.

A list that glue makes is made anew wherever generated code passes it on, and here too, so a module
may change the one that it gets as long as nobody looks at what it replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from lightning_local.decisions import same_as_traced

__all__ = ["GlueError", "is_constant", "reads_form", "run_nodes"]

# They take the form of their argument, not its values.
_FORM_METHODS = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}
_FORM_FUNCTIONS = {
    getattr(torch, f"{name}_like")
    for name in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")
}
_SIZE_METHODS = {"size", "dim", "numel", "ndimension", "get_device", "element_size", "stride"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"}
# What holds no tensor.
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device)


class GlueError(Exception):
    """A node fails: glue was traced as if it got something else, or a module of the user's fails.

    Args:
        node: It.
        text: How.
    """

    def __init__(self, node: fx.Node, text: str) -> None:
        super().__init__(text)
        self.node = node


def run_nodes(
    host: nn.Module,
    nodes: Sequence[fx.Node],
    inputs: Iterable[Any],
    values: dict[fx.Node, Any],
    alive: Callable[[int], Sequence[fx.Node]],
    before: Callable[[int], None] = lambda i: None,
) -> None:
    """Runs nodes and keeps every value.

    Args:
        host: The network that they call.
        nodes: What to run, in order.
        inputs: The network's.
        values: Filled with what each node returned.
        alive: Nodes that are read behind the i-th.
        before: Called with i before the i-th node runs.

    Raises:
        ValueError: A module changes a list that is read again.
        GlueError: A node fails.
    """
    remaining = iter(inputs)
    for i, node in enumerate(nodes):
        before(i)
        args, kwargs = _filled((node.args, node.kwargs), values)
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            values[node] = getattr(host.get_submodule(path), name)
        elif node.op == "call_module":
            values[node] = _called(node, host.get_submodule(str(node.target)), args, kwargs)
            _check_lists(node, (args, kwargs), values, alive(i))
        elif node.op == "output":
            values[node] = args[0]
        elif node.target is same_as_traced:
            values[node] = None  # the form may be another one here
        else:
            values[node] = _glue(node, args, kwargs)


def _glue(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "call_method":
        args, target = args[1:], getattr(args[0], str(node.target), None)
        if target is None:
            raise GlueError(node, f"there is no {node.target}")
    return _called(node, target, args, kwargs)


def _called(node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
    try:
        return target(*args, **kwargs)
    except Exception as error:
        raise GlueError(node, f"{type(error).__name__}: {error}") from error


def _filled(arguments: Any, values: Mapping[fx.Node, Any]) -> Any:
    """A node's arguments with the nodes' values; lists and dicts are new ones, as generated code's.

    torch.fx keeps the graph's own in classes that can't be changed.
    """
    if isinstance(arguments, fx.Node):
        return values[arguments]
    if isinstance(arguments, dict):
        return {key: _filled(value, values) for key, value in arguments.items()}
    if isinstance(arguments, list):
        return [_filled(value, values) for value in arguments]
    if type(arguments) is tuple:
        return tuple(_filled(value, values) for value in arguments)
    return fx.node.map_arg(arguments, values.__getitem__)


def _check_lists(
    node: fx.Node, given: Any, values: Mapping[fx.Node, Any], alive: Sequence[fx.Node]
) -> None:
    """Looks whether a call changed a list that others read: generated code gives it one of its own.

    Args:
        node: The call.
        given: Its arguments as `_filled` made them, after the call.
        values: The nodes' values.
        alive: Nodes that are read behind the call.

    Raises:
        ValueError: It took something out of a list or dict that is read again, or changed one that
            glue passes to others too.
    """
    arguments = (node.args, node.kwargs)
    if any(taken in alive for taken in _taken(arguments, given, values)) or (
        node.meta.get("shares") and _changed(arguments, given, values)
    ):
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


def _changed(arguments: Any, given: Any, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a list or dict in `given` holds something else than `arguments` says."""
    if isinstance(arguments, fx.Node):
        return given is not values[arguments]
    if isinstance(arguments, dict):
        return arguments.keys() != given.keys() or any(
            _changed(argument, given[key], values) for key, argument in arguments.items()
        )
    if isinstance(arguments, (list, tuple)):
        return len(arguments) != len(given) or any(
            map(partial(_changed, values=values), arguments, given)
        )
    return bool(isinstance(arguments, (bool, int, float, str)) and arguments != given)


def reads_form(node: fx.Node) -> bool:
    """Whether a node takes the form of its argument and not its numbers."""
    if node.op == "call_method":
        return str(node.target) in _SIZE_METHODS | _FORM_METHODS
    if node.op == "call_function" and node.target in _FORM_FUNCTIONS:
        return True
    return (
        node.op == "call_function"
        and node.target is getattr
        and len(node.args) > 1
        and node.args[1] in _SIZE_ATTRIBUTES
    )


def is_constant(value: Any) -> bool:
    """Whether it is made of plain values, and of tensors that ask for no gradient."""
    leaves = tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    plain = [leaf for leaf in leaves if isinstance(leaf, _PLAIN)]
    return len(tensors) + len(plain) == len(leaves) and not any(t.requires_grad for t in tensors)
