"""The dry run: what every value of a traced network looks like, found on fake copies.

Nothing real is computed and nothing of the network changes: a forward on the real network in train
mode would move BatchNorm's running statistics.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_local.nodes import run_nodes
from lightning_local.preserving import attributes_kept, training_mode
from lightning_local.tracing import Trace

__all__ = ["Boundary", "Values", "boundary", "check_composition", "on_fakes", "run_values"]

_logger = logging.getLogger(__name__)
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
    """What a dry run saw: each node's value, and the calls of plain layers with their shapes."""

    nodes: dict[fx.Node, Any]
    events: list[_Event]


class _Host(nn.Module):
    """Lets `functional_call` put fake tensors into the network while other code drives it."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.network, *inputs)


def on_fakes(
    network: nn.Module,
    function: Callable[..., Any],
    inputs: Sequence[Any],
    training: bool = True,
    mode: FakeTensorMode | None = None,
    real: bool = True,
) -> Any:
    """Calls `function(network, *inputs)` with fake copies of all tensors.

    A network that fakes can't run (its modules read values) runs for real on a deep copy, unless
    `real` is false.

    Args:
        network: The network; it is not changed.
        function: What to run; must reach the network only through its first argument.
        inputs: Real inputs; a batch of one sample is doubled, as BatchNorm needs two.
        training: The mode to run in.
        mode: Of the fakes, if some exist already.
        real: Whether to fall back to the copy.
    """
    if isinstance(inputs[0], torch.Tensor) and inputs[0].shape[:1] == (1,):
        inputs = [_two_samples(value) for value in inputs]
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with (
            attributes_kept(network),
            mode,
            training_mode(network, training),
            torch.random.fork_rng(devices=[]),
        ):
            host = _Host(network, function)
            tensors = {**dict(host.named_parameters()), **dict(host.named_buffers())}
            fakes: dict[str, torch.Tensor] = {
                name: mode.from_tensor(tensor) for name, tensor in tensors.items()
            }
            arguments = tuple(
                mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in inputs
            )
            return torch.func.functional_call(host, fakes, arguments)
    except Exception as error:  # whatever fakes can't run may still run
        if not real:
            raise
        _logger.info("dry run on a real copy, since fake tensors gave: %s", error)
        copied = copy.deepcopy(network)
        with training_mode(copied, training), torch.random.fork_rng():
            return function(copied, *inputs)


def _two_samples(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def run_values(
    network: nn.Module, trace: Trace, inputs: Sequence[Any], training: bool = True
) -> Values:
    """Runs a trace node by node on fake copies and keeps every value (shapes, no data).

    All parameters ask for gradients, frozen ones too, so that values tell whether these reach them.
    """
    values: dict[fx.Node, Any] = {}
    events: list[_Event] = []
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
        for parameter in host.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            run_nodes(host, trace.nodes, arguments, values, trace.alive, at)

    handle = register_module_forward_hook(hook)
    try:
        on_fakes(network, run, inputs, training)
    finally:
        handle.remove()
    return Values(values, events)


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


# torch leaves TorchDispatchMode untyped, hence the two ignores.
class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith("profiler."):  # marks of a profiler on containers
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def check_composition(network: nn.Module, bodies: Any, inputs: Sequence[Any]) -> None:
    """The chained bodies have to run the same operations as the network.

    Raises:
        ValueError: They don't.
    """

    def whole(host: nn.Module, *values: Any) -> list[str]:
        log = _Log()
        with log:
            host(*values)
        return log.operations

    def chained(host: nn.Module, *values: Any) -> list[str]:
        log = _Log()
        with log:
            for body in bodies:
                values = body.codes[host.training].function(host, *values)
        return log.operations

    one_code = all(body.codes[True].source == body.codes[False].source for body in bodies)
    for training in (True,) if one_code else (True, False):
        expected = on_fakes(network, whole, inputs, training)
        found = on_fakes(network, chained, inputs, training)
        if expected != found:
            pairs = zip(expected, found, strict=False)
            parting = next(((a, b) for a, b in pairs if a != b), ("one more", "one more"))
            raise ValueError(
                f"Traced, {type(network).__name__} runs other operations than by itself "
                f"({parting[1]} instead of {parting[0]}): its forward asks for types or other "
                "things that tracing can't follow. Move that code into a submodule of its own."
            )
