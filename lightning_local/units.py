"""Units: the smallest pieces of a network that are cut, as a person would draw them.

A *block* (a module of a user's class of which a container holds two or more) is a unit as a
whole. Elsewhere each stretch with a weight of two or more dimensions opens a unit, and the norm,
activation or pool behind it belongs to it. What follows the last hidden state with space or
sequence dimensions belongs to the last unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lightning_local.body import prediction
from lightning_local.dryrun import Values
from lightning_local.traced import Trace

__all__ = ["cut_places", "find_units", "opens_candidates"]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED_FUNCTIONS = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    torch.matmul,
    torch.conv2d,
}


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks hang on the module itself; they would not run if it were opened.

    Those of Lightning's PyTorchProfiler only time it, and are no reason not to open it.
    """
    hooks = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]
    functions = [getattr(hook, "func", hook) for hook in hooks]
    return any(
        not str(getattr(function, "__module__", "")).startswith("lightning.pytorch.profilers")
        for function in functions
    )


def _has_weight(module: nn.Module) -> bool:
    return any(
        parameter.ndim >= 2
        for child in module.modules()
        if not isinstance(child, _NORMS)
        for parameter in child.parameters(recurse=False)
    )


def _is_plain(module: nn.Module) -> bool:
    """A layer of torch.nn, or a container that only holds."""
    return type(module).__module__.startswith("torch.nn") or (
        isinstance(module, _CONTAINERS)
        and type(module).forward in {kind.forward for kind in _CONTAINERS}
    )


def _block_classes(network: nn.Module) -> set[type[nn.Module]]:
    classes: set[type[nn.Module]] = set()
    for container in network.modules():
        kinds = [type(c) for c in container.children() if not _is_plain(c) and _has_weight(c)]
        classes.update(kind for kind in kinds if kinds.count(kind) > 1)
    return classes


def opens_candidates(
    network: nn.Module, leaves: Sequence[str], granularity: str
) -> Callable[[str, nn.Module], bool]:
    """Which modules to trace through when looking for every place that could be cut."""
    blocks = _block_classes(network) if granularity == "blocks" else set()

    def opens(path: str, module: nn.Module) -> bool:
        if path in leaves or type(module) in blocks or has_hooks(module):
            return False
        held = next(module.children(), None) is not None
        return held and (isinstance(module, _CONTAINERS) or not _is_plain(module))

    return opens


def cut_places(traced: Trace) -> dict[str, int | None]:
    """For each module that is called once: where a cut after it lies; None where it can't be.

    Glue behind a module (an activation function, a reshape) in the forward of a module around it
    belongs to it, so that one name means one place whatever else is cut.
    """
    if traced.cuts is not None:
        return traced.cuts
    cuts = traced.cuts = {}
    last = len(traced.nodes) - 1
    for call in traced.calls:
        if traced.call_counts[call.path] > 1:
            continue
        end = call.stop
        while end < last and _is_glue(traced, traced.nodes[end], call.path):
            end += 1
        legal = [i for i in range(max(call.stop - 1, 0), end) if traced.hidden(i) is not None]
        # Nothing but the network's output behind it: no place for another local module.
        legal = [i for i in legal if i < last - 1]
        cuts[call.path] = legal[-1] if legal else None
    return cuts


def _is_glue(traced: Trace, node: fx.Node, path: str) -> bool:
    scope = traced.scopes[node]
    around = scope == "" or path.startswith(scope + ".")
    own_call = node.op == "call_module" and (
        traced.call_counts[str(node.target)] == 1 or traced.has_parameters(node)
    )
    return around and not own_call


def _openers(network: nn.Module, traced: Trace) -> list[int]:
    """Positions of the nodes with a weight of two or more dimensions."""
    found = []
    for i, node in enumerate(traced.nodes):
        if node.op == "call_module":
            weighted = _has_weight(network.get_submodule(str(node.target)))
        else:
            weighted = node.target in _WEIGHTED_FUNCTIONS and any(
                source.op == "get_attr" for source in node.all_input_nodes
            )
        if weighted:
            found.append(i)
    return found


def _reaches(source: fx.Node, target: fx.Node) -> bool:
    seen, queue = {target}, [target]
    for node in queue:
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        queue.extend(new)
    return source in seen


def find_units(network: nn.Module, traced: Trace, values: Values) -> list[str]:
    """Split points that cut the network into its n units: n - 1 names.

    Args:
        network: The network.
        traced: Its trace with every candidate visible (`opens_candidates`).
        values: What a dry run of that trace saw.
    """
    leaves = [call.path for call in traced.calls if call.leaf]
    cuts = cut_places(traced)
    places = sorted((i, path) for path in leaves if (i := cuts.get(path)) is not None)
    openers = _openers(network, traced)

    def dims(value: Any) -> int:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.ndim if floating else 0

    wide = [
        i
        for i in range(len(traced.nodes) - 1)
        if (hidden := traced.hidden(i)) is not None and dims(values.nodes[hidden]) >= 3
    ]
    if wide:
        # What follows the last hidden state with space or sequence dims is the classifier.
        openers = [i for i in openers if i <= wide[-1]]
        output = prediction(values.nodes[traced.nodes[-1]])
        plain = [i for i in openers if _is_plain_call(network, traced.nodes[i])]
        if dims(output) >= 3 and len(openers) > 1 and plain[-1:] == openers[-1:]:
            openers.pop()
    points = []
    for previous, opener in zip(openers, openers[1:], strict=False):
        for i, path in reversed(places):
            hidden = traced.hidden(i)
            assert hidden is not None
            if previous <= i < opener and _reaches(hidden, traced.nodes[opener]):
                if dims(values.nodes[hidden]) >= 2:
                    points.append(path)
                break
    return points


def _is_plain_call(network: nn.Module, node: fx.Node) -> bool:
    return node.op != "call_module" or _is_plain(network.get_submodule(str(node.target)))
