"""Turns a network's glue into a `torch.fx` graph.

Only the glue is traced: a module that holds no cut stays one opaque call, so its own Python runs
as the user wrote it. Not here: what is traced (`traced.py`), requests (`partition.py`), code that
runs (`body.py`).
"""

from __future__ import annotations

import inspect
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lightning_local.decisions import Decide, Decisions, Undecided, failing_line
from lightning_local.factories import factories_recorded
from lightning_local.in_place import InPlaceProxy
from lightning_local.preserving import attributes_of, restore_attributes, training_mode
from lightning_local.reads import watched
from lightning_local.traced import Call, Trace

__all__ = ["REMEDY", "TraceError", "trace"]

# What is patched while a network is traced is the process's.
_lock = threading.RLock()

REMEDY = (
    "Move the code on that line into a submodule of its own (what is inside a module that is not "
    "cut is never traced), call the network's parts one by one in a module of yours, or train it "
    "as one module with partition=1."
)


class TraceError(ValueError):
    """A network, or a part of it, whose glue can't be followed."""


class _Tracer(fx.Tracer):
    """Opens the modules that `opens` names and remembers who made which node."""

    proxy_buffer_attributes = True

    def __init__(
        self, opens: Callable[[str, nn.Module], bool], num_inputs: int, decisions: Decisions
    ) -> None:
        super().__init__()
        self.opens, self.decisions = opens, decisions
        self.num_inputs = num_inputs
        self.context = _context()
        self.stack: list[str] = [""]
        self.calls: list[Call] = []
        self.node_scopes: dict[fx.Node, str] = {}
        self.opened: list[str] = [""]
        self.plain: dict[tuple[str, str], Any] = {}
        # Lists and dicts of glue, with the nodes that they are passed to; kept, so that an id is
        # no other one's later.
        self._passed: list[Any] = []
        self._users: dict[int, tuple[Any, list[fx.Node]]] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decisions.ask(obj, "truth"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([getitem(obj, i) for i in range(self.decisions.ask(obj, "length"))])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.opens(module_qualified_name, m)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """One placeholder per input; Python fills in the defaults of the other arguments."""
        parameters = list(inspect.signature(self.root.forward).parameters.values())
        named = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        names = [*named, *(f"input_{i}" for i in range(self.num_inputs))][: self.num_inputs]
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        given: list[Any] = proxies[:1]
        for proxy in proxies[1:]:  # Python's `is None` never asks a proxy
            given.append(None if self.decisions.ask(proxy, "none") else proxy)
        return root_fn, [self.root, *given]

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        self._passed = []
        proxy = super().create_proxy(*args, **kwargs)
        for container in self._passed:
            _, nodes = self._users.setdefault(id(container), (container, []))
            nodes.append(proxy.node)
            if len(nodes) > 1:
                for node in nodes:
                    node.meta["shares"] = True
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise ValueError(
                "glue under torch.no_grad or torch.autocast would run without it; use detach(), or "
                "move it into a submodule"
            )
        node = super().create_node(*args, **kwargs)
        self.node_scopes[node] = self.stack[-1]
        return node

    def create_arg(self, a: Any) -> Any:
        """Dicts that are dataclasses keep their class, since users read attributes of them."""
        if isinstance(a, (list, dict)):
            self._passed.append(a)
        if isinstance(a, dict) and is_dataclass(a):
            given = {f.name: self.create_arg(getattr(a, f.name)) for f in fields(a)}
            return self.create_node("call_function", type(a), (), given)
        try:
            return super().create_arg(a)
        except RuntimeError:  # torch.fx's for what a graph can't hold, and for keys of dicts
            if isinstance(a, dict):
                raise
            raise ValueError(
                f"glue makes a {type(a).__name__} for a module, which a body can't for each batch; "
                "switch it off if the network has an option for that, such as use_cache=False"
            ) from None

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.submodule_paths is not None and m not in self.submodule_paths:
            return forward(*args, **kwargs)  # made in glue, as in nn.ReLU()(x): it is glue too
        leaf = self.is_leaf_module(m, path := self.path_of_module(m))
        if not leaf:
            self.opened.append(path)
            self.stack.append(path)
        # Left in place when the call raises: the stack then says which module failed.
        out = super().call_module(m, forward, args, kwargs)
        if not leaf:
            self.stack.pop()
        self.calls.append(Call(path, len(self.graph.nodes), leaf))
        return out


def _context() -> tuple[Any, ...]:
    """What a context manager around glue changes, and a graph does not hold."""
    kinds = ("cpu", "cuda")
    return torch.is_grad_enabled(), *(torch.is_autocast_enabled(kind) for kind in kinds)


def trace(
    network: nn.Module,
    opens: Callable[[str, nn.Module], bool],
    *,
    training: bool,
    num_inputs: int = 1,
    strict: bool = False,
    decide: Callable[[bool], Decide],
) -> Trace:
    """Traces the glue of a network.

    A module that can't be followed (data-dependent control flow, say) becomes one opaque call.

    Args:
        network: The network; its modules' modes and attributes are left as they were.
        opens: Says for a path and a module whether its forward is traced through.
        training: The mode in which the glue is traced.
        num_inputs: Number of positional inputs the network gets; further arguments keep their
            defaults.
        strict: Raise for a module inside too, instead of making it opaque.
        decide: Makes what answers the glue's questions about shapes and types, for a mode.

    Raises:
        TraceError: The network's own forward can't be followed; names the line and the remedy.
    """
    try:
        inspect.signature(network.forward).bind(*range(num_inputs))
    except TypeError as error:
        raise ValueError(
            f"{num_inputs} inputs don't fit the forward of {type(network).__name__}: {error}."
        ) from None
    opaque: dict[str, str] = {}
    decisions = Decisions(decide(training))
    while True:
        decisions.restart()
        tracer = _Tracer(
            lambda path, module: path not in opaque and opens(path, module), num_inputs, decisions
        )
        kept, draws = attributes_of(network), _draws()
        try:
            with training_mode(network, training):
                before = attributes_of(network)  # the user's own train() may set some
                with _lock, factories_recorded(tracer), watched(network, tracer, tracer.plain):
                    graph = tracer.trace(network)
                if _draws() != draws:
                    raise ValueError(
                        "random numbers of Python or NumPy would be drawn once only: use torch.rand"
                    )
                changed = restore_attributes(before)
            restore_attributes(kept)
            if changed:
                raise ValueError(f"the forward changes {', '.join(changed)}, which a body can't")
        except BaseException as error:
            _set_draws(draws)
            restore_attributes(kept)
            if not isinstance(error, (Exception, Undecided)):
                raise
            if isinstance(error, Undecided):
                with suppress(Exception):  # what fakes can't tell can't be followed
                    inside = not strict and _is_small_part(network, tracer.stack[-1])
                    decisions.settle(error, inside=inside)
                    continue
            where = type(network.get_submodule(tracer.stack[-1])).__name__
            reason = (
                f"The forward of {where} can't be followed by torch.fx "
                f"({type(error).__name__}: {error}) at\n    "
                f"{failing_line(traceback.extract_tb(error.__traceback__))}\n"
            )
            if tracer.stack[-1] and not strict:
                opaque[tracer.stack[-1]] = reason
                decisions = Decisions(decide(training))
                continue
            raise TraceError(f"{reason}{REMEDY}") from error
        break
    nodes = list(graph.nodes)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    found = Trace(nodes, tracer.calls, tracer.node_scopes, tracer.opened, parameters)
    found.opaque = opaque
    found.plain = tracer.plain
    return found


def _is_small_part(network: nn.Module, path: str) -> bool:
    """Whether little is lost if that module is left whole: less than half of the weights."""
    whole, part = (
        sum(p.numel() for p in module.parameters())
        for module in (network, network.get_submodule(path))
    )
    return 2 * part < whole


def _draws() -> Any:
    """The states of Python's and NumPy's generators, as plain types."""
    numpy: Any = np.random.get_state(legacy=True)
    name, keys, *rest = numpy
    return random.getstate(), (name, keys.tolist(), *rest)


def _set_draws(states: Any) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
