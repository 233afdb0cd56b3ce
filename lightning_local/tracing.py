"""Turns a network's glue into a `torch.fx` graph, and says where that graph may be cut.

Only the glue is traced: a module that holds no cut stays one opaque call, so its own Python runs
as the user wrote it. What is not here: requests (`partition.py`), code that runs (`body.py`).

Legend: a *value* is what one graph node returns; it is *alive* after node i when a node behind i
still reads it. A value *depends on parameters* when a weight can change it. A cut after node i is
legal when exactly one value that depends on parameters is alive there: the hidden state. Everything
else that is alive (inputs, masks, sizes) rides along.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Trace", "TraceError", "trace", "training_mode"]

# Called during tracing these would run once and be frozen; as graph nodes they run in every step.
_FACTORY_NAMES = (
    "arange bernoulli empty eye full linspace logspace normal ones rand randint randn randperm "
    "tensor tril_indices triu_indices zeros"
)
_FACTORIES = {getattr(torch, name) for name in _FACTORY_NAMES.split()}
_SIZE_METHODS = {"size", "dim", "numel", "ndimension", "get_device", "element_size", "stride"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"}


class TraceError(ValueError):
    """A network, or a part of it, whose glue can't be followed."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its path and the position of the first node after it returned."""

    path: str
    start: int
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
        self._last_use = {
            node: max((self.index[user] for user in node.users), default=-1) for node in nodes
        }
        self._depends = self._dependence(parameters)

    def _dependence(self, parameters: set[str]) -> set[fx.Node]:
        owners = {name.rpartition(".")[0] for name in parameters}
        depends: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "get_attr":
                own = str(node.target) in parameters
            elif node.op == "call_module":
                target = str(node.target)
                own = any(o == target or o.startswith(target + ".") for o in owners)
            elif _reads_size(node):
                continue
            else:
                own = False
            if own or any(source in depends for source in node.all_input_nodes):
                depends.add(node)
        return depends

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


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target) in _SIZE_METHODS
    return (
        node.op == "call_function"
        and node.target is getattr
        and len(node.args) > 1
        and node.args[1] in _SIZE_ATTRIBUTES
    )


class _Factories(TorchFunctionMode):
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


class _Tracer(fx.Tracer):
    """Opens the modules that `opens` names and remembers who made which node."""

    proxy_buffer_attributes = True

    def __init__(self, opens: Callable[[str, nn.Module], bool]) -> None:
        super().__init__()
        self.opens = opens
        self.stack: list[str] = [""]
        self.calls: list[Call] = []
        self.node_scopes: dict[fx.Node, str] = {}
        self.opened: list[str] = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.opens(module_qualified_name, m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.node_scopes[node] = self.stack[-1]
        return node

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        leaf = self.is_leaf_module(m, path)
        start = len(self.graph.nodes)
        if not leaf:
            self.opened.append(path)
            self.stack.append(path)
        # Left in place when the call raises: the stack then says which module failed.
        out = super().call_module(m, forward, args, kwargs)
        if not leaf:
            self.stack.pop()
        self.calls.append(Call(path, start, len(self.graph.nodes), leaf))
        return out


def _defaults(network: nn.Module, num_inputs: int) -> dict[str, Any]:
    """Defaults of the arguments that the batch does not give; without them fx would trace them."""
    parameters = [
        p
        for p in inspect.signature(network.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return {p.name: p.default for p in parameters[num_inputs:] if p.default is not p.empty}


def _drop_default_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Removes the inputs that were fixed to their default, with fx's checks of their value."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and str(node.target) in names:
            users = [node]
            for user in users:
                users.extend(u for u in user.users if u not in users)
            for user in reversed(users):
                if not user.users:
                    graph.erase_node(user)


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


def _failing_line(error: BaseException) -> str:
    skipped = ("torch/fx/", "torch/nn/modules/module.py", "lightning_local/tracing.py")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename.replace("\\", "/") for part in skipped)
    ]
    last = frames[-1] if frames else None
    return f"{last.filename}:{last.lineno}: {last.line}" if last else "line unknown"


def trace(
    network: nn.Module,
    opens: Callable[[str, nn.Module], bool],
    *,
    training: bool,
    num_inputs: int = 1,
    strict: bool = False,
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

    Raises:
        TraceError: The network's own forward can't be followed; names the line and the remedy.
    """
    opaque: set[str] = set()
    while True:
        tracer = _Tracer(lambda path, module: path not in opaque and opens(path, module))
        attributes = set(vars(network))
        try:
            with training_mode(network, training), _Factories(tracer):
                defaults = _defaults(network, num_inputs)
                graph = tracer.trace(network, concrete_args=defaults or None)
        except Exception as error:
            for name in set(vars(network)) - attributes:
                delattr(network, name)
            if tracer.stack[-1] and not strict:
                opaque.add(tracer.stack[-1])
                continue
            where = type(network.get_submodule(tracer.stack[-1])).__name__
            raise TraceError(
                f"The forward of {where} can't be followed by torch.fx "
                f"({type(error).__name__}: {error}) at\n    {_failing_line(error)}\n"
                "Move the code on that line into a submodule of its own (what is inside a module "
                "that is not cut is never traced), or train it as one module with partition=1."
            ) from error
        break
    if constants := set(vars(network)) - attributes:
        for name in constants:
            delattr(network, name)
        raise TraceError(
            f"The forward of {type(network).__name__} makes a tensor that tracing can't reproduce "
            f"({', '.join(sorted(constants))}): register it as a buffer, or move that code into a "
            "submodule of its own."
        )
    _drop_default_inputs(graph, list(defaults))
    nodes = list(graph.nodes)
    calls = _shift(tracer.calls, tracer.node_scopes, nodes)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return Trace(nodes, calls, tracer.node_scopes, tracer.opened, parameters)


def _shift(calls: list[Call], scopes: dict[fx.Node, str], nodes: list[fx.Node]) -> list[Call]:
    """Call positions after erased nodes are taken out (positions counted every node made)."""
    alive = set(nodes)
    made = list(scopes)
    kept_before = [0]
    for node in made:
        kept_before.append(kept_before[-1] + (node in alive))
    return [
        Call(call.path, kept_before[call.start], kept_before[call.stop], call.leaf)
        for call in calls
    ]
