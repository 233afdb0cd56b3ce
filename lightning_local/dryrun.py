"""The dry run: what every value of a traced network looks like, found on fake copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_local.fake_run import on_fakes
from lightning_local.nodes import run_nodes
from lightning_local.traced import Trace, storages

__all__ = ["Boundary", "Values", "boundary", "run_values"]

_CHANNEL_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
# Attributes with the number of channels that a layer takes, and that it returns.
_NORMS = ("num_features", "num_channels")
_SIZES = (("in_channels", "in_features", *_NORMS), ("out_channels", "out_features", *_NORMS))
_CHANNEL_LAST = (nn.LayerNorm, nn.Linear, nn.RMSNorm, nn.Embedding)


@dataclass(frozen=True)
class Boundary:
    """The form of a hidden state.

    Attributes:
        shape: Its shape without the batch dimension.
        channel_dim: Position of the channels or features, the batch being 0.
    """

    shape: tuple[int, ...]
    channel_dim: int

    @property
    def channels(self) -> int:
        """Number of channels (features)."""
        return self.shape[self.channel_dim - 1]

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes of the space or sequence dimensions; empty for a vector."""
        return tuple(s for i, s in enumerate(self.shape) if i != self.channel_dim - 1)


@dataclass(frozen=True)
class _Event:
    position: int
    module: nn.Module
    input: tuple[int, ...] | None
    output: tuple[int, ...] | None


@dataclass(frozen=True)
class Values:
    """What a dry run saw.

    Attributes:
        nodes: Each node's value.
        events: The calls of plain layers with their shapes.
        weights: The memory of the parameters.
    """

    nodes: dict[fx.Node, Any]
    events: list[_Event]
    weights: set[int]


def run_values(
    network: nn.Module, trace: Trace, inputs: Sequence[Any], training: bool = True
) -> Values:
    """Runs a trace node by node on fake copies and keeps every value (shapes, no data).

    All parameters ask for gradients, frozen ones too, so that values tell whether these reach them.
    """
    values: dict[fx.Node, Any] = {}
    events: list[_Event] = []
    weights: set[int] = set()
    position = 0

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, _CHANNEL_FIRST + _CHANNEL_LAST):
            events.append(
                _Event(position, module, _shape(args[0] if args else None), _shape(output))
            )

    def at(i: int) -> None:
        nonlocal position
        position = i

    def run(host: nn.Module, *arguments: Any) -> None:
        events.clear()
        weights.clear()
        weights.update(storages(list(host.parameters())))
        for parameter in host.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            run_nodes(host, trace.nodes, arguments, values, trace.alive, at)

    handle = register_module_forward_hook(hook)
    try:
        on_fakes(network, run, inputs, training)
    finally:
        handle.remove()
    return Values(values, events, weights)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _channel_dim(module: nn.Module, shape: tuple[int, ...], before: bool) -> int:
    """Where a layer has the channels of what it returned (`before` the cut) or takes; 0 if unclear.

    A subclass of torch's layers may permute: it has them where their number is, if that is clear.
    """
    last = len(shape) - 1
    if type(module).__module__.startswith("torch.nn"):
        return last if isinstance(module, _CHANNEL_LAST) else 1
    sizes = {getattr(module, name, None) for name in _SIZES[before]}
    normalized: Any = getattr(module, "normalized_shape", ())
    if len(normalized) == 1:
        sizes |= {normalized[0]}
    found = [dim for dim in (1, last) if shape[dim] in sizes]
    return found[0] if len(found) == 1 else 0


def boundary(trace: Trace, values: Values, i: int, name: str, layout: str = "auto") -> Boundary:
    """The form of the hidden state at the cut after node `i`.

    Where the channels are is read from the last layer before the cut that returned this shape and
    from the first one behind it that took this shape; a layer that does not tell is passed over.

    Raises:
        ValueError: The two disagree, or there is no such layer.
    """
    node = trace.hidden(i)
    assert node is not None
    hidden = values.nodes[node]
    if not isinstance(hidden, torch.Tensor):
        raise ValueError(
            f"What crosses the cut after `{name}` is a {type(hidden).__name__}, but a hidden state "
            "is one tensor: cut elsewhere, or keep the modules around it whole."
        )
    shape = tuple(hidden.shape)
    inputs = [values.nodes[n] for n in trace.nodes if n.op == "placeholder"]
    batch = next((v.shape[0] for v in inputs if isinstance(v, torch.Tensor) and v.ndim), None)
    if batch is not None and shape[:1] != (batch,):
        raise ValueError(
            f"The hidden state after `{name}` has shape {shape} for a batch of {batch}: its first "
            "dimension has to be the batch (batch_first=True in torch's layers). Cut elsewhere."
        )
    if layout != "auto":
        channel_dim = 1 if layout == "channels_first" else len(shape) - 1
        return Boundary(shape[1:], channel_dim)
    if len(shape) == 2:
        return Boundary(shape[1:], 1)
    before = [e for e in values.events if e.position <= i and e.output == shape]
    behind = [e for e in values.events if e.position > i and e.input == shape]
    found = [
        [_channel_dim(e.module, shape, True) for e in reversed(before)],
        [_channel_dim(e.module, shape, False) for e in behind],
    ]
    dims = {next(filter(None, side)) for side in found if any(side)}
    if len(dims) != 1:
        kinds = [type(e.module).__name__ for e in before[-1:] + behind[:1]]
        raise ValueError(
            f"The hidden state after `{name}` has shape {shape} and its layout is not clear: the "
            f"layers around it ({', '.join(kinds) or 'none takes or returns that shape'}) don't "
            "tell where its channels are. Cut elsewhere, or pass "
            "Partition(layout='channels_first') or Partition(layout='channels_last')."
        )
    return Boundary(shape[1:], dims.pop())
