"""Turns a network's glue into a `torch.fx` graph, and says where that graph may be cut.

Only the glue is traced: a module that holds no cut stays one opaque call, so its own Python runs
as the user wrote it. Not here: requests (`partition.py`), code that runs (`body.py`).

Legend: a *value* is what one graph node returns; it is *alive* after node i when a node behind i
still reads it. A value *depends on parameters* when a weight can change it. A cut after node i is
legal when exactly one value that depends on parameters is alive there: the hidden state. Everything
else that is alive (inputs, masks, sizes, what is computed without gradient) rides along.
"""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from lightning_local.decisions import Decide, Decisions, Undecided, failing_line
from lightning_local.factories import factories_recorded
from lightning_local.in_place import InPlaceProxy
from lightning_local.nodes import is_constant, reads_form
from lightning_local.preserving import attributes_of, restore_attributes, training_mode

__all__ = ["REMEDY", "Trace", "TraceError", "trace"]

REMEDY = (
    "Move the code on that line into a submodule of its own (what is inside a module that is not "
    "cut is never traced), call the network's parts one by one in a module of yours, or train it "
    "as one module with partition=1."
)


class TraceError(ValueError):
    """A network, or a part of it, whose glue can't be followed."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its path and the position of the first node after it returned."""

    path: str
    stop: int
    leaf: bool


class Trace:
    """A traced network in one mode.

    Args:
        nodes: All nodes in execution order, the output node last.
        calls: Every module call, in the order in which the calls returned.
        scopes: For each node the path of the module in whose forward it was made.
        opened: Paths of the modules that were traced through (the root is `""`).
        parameters: Names of the network's parameters.
    """

    def __init__(
        self,
        nodes: list[fx.Node],
        calls: list[Call],
        scopes: dict[fx.Node, str],
        opened: list[str],
        parameters: set[str],
    ) -> None:
        self.nodes = nodes
        self.calls = calls
        self.scopes = scopes
        self.opened = opened
        self.index = {node: i for i, node in enumerate(nodes)}
        counts: dict[str, int] = {}
        for call in calls:
            counts[call.path] = counts.get(call.path, 0) + 1
        self.call_counts = counts
        self.cuts: dict[str, int | None] | None = None  # filled by `units.cut_places`
        self.opaque: dict[str, str] = {}  # modules that could not be followed, and why
        self._last_use = {
            node: max((self.index[user] for user in node.users), default=-1) for node in nodes
        }
        self._depends = self._dependence(parameters)

    def _dependence(self, parameters: set[str]) -> set[fx.Node]:
        self._owners = {name.rpartition(".")[0] for name in parameters}
        depends: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "get_attr":
                own = str(node.target) in parameters
            elif node.op == "call_module":
                own = self.has_parameters(node)
            elif reads_form(node):
                continue
            else:
                own = False
            if own or any(source in depends for source in node.all_input_nodes):
                depends.add(node)
        return depends

    def forget_constants(self, values: Mapping[fx.Node, Any]) -> bool:
        """Lets values ride along through which no gradient comes back.

        Args:
            values: Of all nodes, in a run in which every parameter asks for its gradient.

        Returns:
            Whether there were such values, that seemed to depend on parameters.
        """
        constant = {node for node in self._depends if is_constant(values[node])}
        self._depends -= constant
        return bool(constant)

    def has_parameters(self, node: fx.Node) -> bool:
        """Whether the module that the node calls has parameters."""
        target = str(node.target)
        return any(o == target or o.startswith(target + ".") for o in self._owners)

    def depends_on_parameters(self, node: fx.Node) -> bool:
        """Whether a weight of the network can change this value."""
        return node in self._depends

    def alive(self, i: int) -> list[fx.Node]:
        """Values that are still read behind node `i`, parameters and buffers excluded."""
        return [
            node
            for node in self.nodes[: i + 1]
            if self._last_use[node] > i and node.op != "get_attr"
        ]

    def hidden(self, i: int) -> fx.Node | None:
        """The hidden state if the network can be cut after node `i`, else None."""
        crossing = [node for node in self.alive(i) if node in self._depends]
        return crossing[0] if len(crossing) == 1 else None


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
        return root_fn, [self.root, *proxies]

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
    decide: Decide,
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
        decide: Answers what the glue asks about shapes and types.

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
    decisions = Decisions()
    while True:
        decisions.restart()
        tracer = _Tracer(
            lambda path, module: path not in opaque and opens(path, module), num_inputs, decisions
        )
        kept, draws = attributes_of(network), random.getstate()
        try:
            with training_mode(network, training), factories_recorded(tracer):
                graph = tracer.trace(network)
            if random.getstate() != draws:
                raise ValueError("Python's random numbers would be drawn once only: use torch.rand")
            changed = restore_attributes(kept)
            if changed:
                raise ValueError(f"the forward changes {', '.join(changed)}, which a body can't")
        except Exception as error:
            random.setstate(draws)
            restore_attributes(kept)
            if isinstance(error, Undecided):
                with suppress(Exception):  # what fakes can't tell can't be followed
                    decisions.settle(error, decide, training)
                    continue
            where = type(network.get_submodule(tracer.stack[-1])).__name__
            reason = (
                f"The forward of {where} can't be followed by torch.fx "
                f"({type(error).__name__}: {error}) at\n    "
                f"{failing_line(traceback.extract_tb(error.__traceback__))}\n"
            )
            if tracer.stack[-1] and not strict:
                opaque[tracer.stack[-1]] = reason
                decisions = Decisions()
                continue
            raise TraceError(f"{reason}{REMEDY}") from error
        break
    nodes = list(graph.nodes)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    found = Trace(nodes, tracer.calls, tracer.node_scopes, tracer.opened, parameters)
    found.opaque = opaque
    return found
