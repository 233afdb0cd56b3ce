"""Bodies: slices of a network as code that runs on the user's own modules.

A body registers nothing and copies nothing. It is a function generated from the traced glue and
called with the network, so it sees every layer that is replaced later, and the network's
`state_dict` keeps each tensor once under the user's names.
"""

from __future__ import annotations

import importlib
import linecache
from collections.abc import Iterator, Sequence
from itertools import count
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from lightning_local.nodes import reads_form
from lightning_local.reads import same_reads
from lightning_local.traced import Trace

__all__ = ["Body", "Code", "crossing", "prediction", "slice_code"]

_numbers = count()


class Code:
    """A generated function `forward(network, *values)`; can be copied and pickled.

    Args:
        source: Python source of the function.
        names: What the source refers to.
    """

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source = source
        self.names = names
        file = f"<lightning_local body {next(_numbers)}>"
        # Tracebacks through a body show its lines, as they do for code in a file.
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        scope = dict(names)
        exec(compile(source, file, "exec"), scope)
        self.function: Any = scope["forward"]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the source, not the function."""
        modules = {n: v.__name__ for n, v in self.names.items() if isinstance(v, ModuleType)}
        others = {n: v for n, v in self.names.items() if not isinstance(v, ModuleType)}
        return _load_code, (self.source, others, modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        """Code has no state, so a copy may share it."""
        return self


def _load_code(source: str, names: dict[str, Any], modules: dict[str, str]) -> Code:
    imported = {name: importlib.import_module(path) for name, path in modules.items()}
    return Code(source, {**names, **imported})


def slice_code(trace: Trace, start: int, stop: int) -> tuple[Code, list[str], list[str]]:
    """Code for the nodes after `start` up to and including `stop`.

    Args:
        trace: The traced network.
        start: Position of the cut before the slice; -1 for the network's input.
        stop: Position of the cut after it; the output node's for the last slice.

    Returns:
        The code, which takes `(hidden, *carried)` (the network's inputs for the first slice) and
        returns the same for the next slice, the last one the network's output; the names of the
        parameters, buffers and modules it uses; and of those of which it takes the form alone.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    used: list[str] = []
    last = trace.nodes[stop].op == "output"
    if start < 0:
        inputs = [node for node in trace.nodes if node.op == "placeholder"]
    else:
        inputs = crossing(trace, start)
    for node in inputs:
        env[node] = graph.placeholder(node.name)

    def lookup(node: fx.Node) -> fx.Node:
        if node not in env and node.op == "get_attr":
            used.append(str(node.target))
            env[node] = graph.get_attr(str(node.target))
        return env[node]

    for node in trace.nodes[start + 1 : stop + 1]:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], lookup))
            continue
        if node.op == "call_module":
            used.append(str(node.target))
        env[node] = graph.node_copy(node, lookup)
    if not last:
        graph.output(tuple(lookup(node) for node in crossing(trace, stop)))
    code = graph.python_code("self")
    inside = set(trace.nodes[start + 1 : stop + 1])
    form = {str(n.target) for n in env if n.op == "get_attr" and not _is_read(n, inside)}
    names = [name for name in dict.fromkeys(used) if name not in form]
    return Code(code.src, dict(code.globals)), names, sorted(form)


def _is_read(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether code takes more of a parameter than its form, for which it needn't own it."""
    return not all(reads_form(user) for user in node.users if user in inside)


def prediction(output: Any) -> Any:
    """The tensor in what a network returns, if there is one alone; else all that it returns."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return tensors[0] if len(tensors) == 1 else output


def crossing(trace: Trace, i: int) -> list[fx.Node]:
    """What crosses the cut after node `i`: the hidden state, then what rides along."""
    hidden = trace.hidden(i)
    assert hidden is not None
    return [hidden] + [node for node in trace.alive(i) if node is not hidden]


class Body(nn.Module):
    """One slice of a network.

    Args:
        network: The network it runs on; not registered.
        train: Code traced in train mode.
        eval_: Code traced in eval mode.
        parameters: Names of the parameters it owns, as the network calls them.
        buffers: Names of the buffers it owns.
        used: Paths of the modules, parameters and buffers its code reads.
        opened: Paths of the modules that tracing went through.
        units: What each unit (or piece of a unit) inside reads, in order; paths as in `used`.

    Attributes:
        in_place: Whether it changes the hidden state it receives in place.
        overwrites: Whether it changes any of the values it takes in place.
        plain: What glue read of plain attributes in each mode; the first body's is all of it.
        views: Which of the values that ride on, counted from 0, are views of its parameters.
        changes: Buffers that it changes in train mode, as a trial run has shown.
        forms: Parameters and buffers whose shape, type or device its code asks for.
        num_inputs: Number of values it takes.
        num_carried: Number of values it takes besides the hidden state.
        out_features: Features of the network's output, for the body that makes it.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Code,
        eval_: Code,
        parameters: Sequence[str],
        buffers: Sequence[str],
        used: Sequence[str],
        opened: Sequence[str] = ("",),
        units: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__()
        # A tuple hides the network from registration: its tensors have one name each.
        self._network = (network,)
        self.codes = {True: train, False: eval_}
        self._one_code = train.source == eval_.source
        self._opened = tuple(opened)
        self.parameter_names = tuple(parameters)
        self.buffer_names = tuple(buffers)
        self.used = tuple(used)
        self.units = tuple(tuple(unit) for unit in units)
        self.in_place = self.overwrites = False
        self.num_inputs = self.num_carried = 0
        self.views: tuple[int, ...] = ()
        self.forms: tuple[str, ...] = ()
        self.changes: tuple[str, ...] = ()
        self.plain: dict[bool, dict[tuple[str, str], Any]] = {True: {}, False: {}}
        self.out_features: int | None = None

    @property
    def network(self) -> nn.Module:
        """The network it runs on."""
        return self._network[0]

    def forward(self, *values: Any) -> Any:
        """Runs the slice.

        Args:
            values: The network's inputs for the first body, else the hidden state and what rides
                along with it.

        Returns:
            The tuple (hidden, *carried) for the next body; the last body returns the network's
            output.
        """
        network = self._network[0]
        if not self._one_code:
            self._check_modes(network)
        return self.codes[network.training].function(network, *values)

    def check_reads(self) -> None:
        """Looks whether plain attributes that glue read are as they were.

        Raises:
            ValueError: One has changed.
        """
        network = self._network[0]
        same_reads(network, self.plain[network.training])

    def original(self, path: str) -> Any:
        """The network's module, parameter or buffer at `path`."""
        owner, _, name = path.rpartition(".")
        return getattr(self._network[0].get_submodule(owner), name)

    def layers(self) -> list[nn.Module]:
        """All modules of the network that the body calls, with the modules inside them."""
        originals = [self.original(path) for path in self.used]
        return [m for o in originals if isinstance(o, nn.Module) for m in o.modules()]

    def holders(self) -> list[nn.Module]:
        """All modules whose own buffers the body may read or change: its layers, and glue."""
        network = self._network[0]
        tensors = [p for p in self.used if not isinstance(self.original(p), nn.Module)]
        owners = [network.get_submodule(path.rpartition(".")[0]) for path in tensors]
        return [*self.layers(), *owners]

    def _check_modes(self, network: nn.Module) -> None:
        for path in self._opened:
            if network.get_submodule(path).training != network.training:
                raise RuntimeError(
                    f"`{path}` is in {'eval' if network.training else 'train'} mode while the "
                    "network is not, and code between the network's modules depends on the mode: "
                    "put the whole network in one mode, or move that code into a submodule."
                )

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's own parameters that belong to this body, under the network's names."""
        network, seen = self._network[0], set()
        for name in self._current():
            parameter = network.get_parameter(name)
            if not remove_duplicate or id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{prefix}.{name}" if prefix else name), parameter

    def _current(self) -> list[str]:
        """Names of the parameters, of layers that were replaced too."""
        names = []
        for path in self.used:
            original = self.original(path)
            if isinstance(original, nn.Parameter):
                names.append(path)
            elif isinstance(original, nn.Module):
                names += [f"{path}.{name}" for name, _ in original.named_parameters()]
        used = [
            n
            for n in self.parameter_names
            if any(n == p or n.startswith(p + ".") for p in self.used)
        ]
        return names + [n for n in self.parameter_names if n not in used]

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The network's own buffers that belong to this body, under the network's names.

        Those too that its layers have made since the network was cut.
        """
        network = self._network[0]
        layers = [(p, o) for p in self.used if isinstance(o := self.original(p), nn.Module)]
        made = (f"{path}.{name}" for path, layer in layers for name, _ in layer.named_buffers())
        for name in dict.fromkeys((*self.buffer_names, *made)):
            owner, _, own = name.rpartition(".")
            buffer = getattr(network.get_submodule(owner), own, None)
            if isinstance(buffer, torch.Tensor):
                yield (f"{prefix}.{name}" if prefix else name), buffer

    def tail(self, length: int | None) -> list[nn.Parameter]:
        """Parameters of the last `length` units that are trained; None means the whole body."""
        units = self.units if length is None else self.units[max(0, len(self.units) - length) :]
        found: dict[int, nn.Parameter] = {}
        for path in (path for unit in units for path in unit):
            original = self.original(path)
            inside = original.parameters() if isinstance(original, nn.Module) else [original]
            found |= {id(p): p for p in inside if isinstance(p, nn.Parameter)}
        return [parameter for parameter in found.values() if parameter.requires_grad]
