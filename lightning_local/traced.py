"""A traced network: its graph's nodes, and where they may be cut.

Legend: a *value* is what one graph node returns; it is *alive* after node i when a node behind i
still reads it. A value *depends on parameters* when a weight can change it. A cut after node i is
legal when exactly one value that depends on parameters is alive there: the hidden state. Everything
else that is alive (inputs, masks, sizes, what is computed without gradient) rides along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from lightning_local.nodes import is_constant, reads_form

__all__ = ["Call", "Trace", "storages"]


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

    Attributes:
        plain: What glue read of the modules' plain attributes, by path and name: part of the code.
        views: Values that ride along and share memory with a parameter, which a step changes.
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
        self.plain: dict[tuple[str, str], Any] = {}
        self.views: set[fx.Node] = set()
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

    def forget_constants(self, values: Mapping[fx.Node, Any], weights: Set[int]) -> bool:
        """Lets values ride along through which no gradient comes back.

        Not those that share memory with a hidden state, which a later layer may overwrite.

        Args:
            values: Of all nodes, in a run in which every parameter asks for its gradient.
            weights: The memory of all parameters in that run, see `storages`.

        Returns:
            Whether there were such values, that seemed to depend on parameters.
        """
        constant = {node for node in self._depends if is_constant(values[node])}
        others = [node for node in self._depends - constant if node.op != "get_attr"]
        hidden = {key for node in others for key in storages(values[node])} - weights
        constant = {n for n in constant if hidden.isdisjoint(storages(values[n]))}
        self.views = {n for n in constant if not weights.isdisjoint(storages(values[n]))}
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


def storages(value: Any) -> Iterator[int]:
    """Which memory a value's tensors are in."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()._cdata
