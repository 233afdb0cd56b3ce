"""Runs of a network on fake copies of all tensors, which have a shape and no numbers.

Nothing real is computed and nothing of the network changes: a forward on the real network in train
mode would move BatchNorm's running statistics.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_local.nodes import run_nodes
from lightning_local.preserving import attributes_kept, training_mode

__all__ = ["FakeRun", "check_real", "on_a_copy", "on_fakes"]

_logger = logging.getLogger(__name__)


class _Host(nn.Module):
    """Lets `functional_call` put fake tensors into the network while other code drives it."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.network, *inputs)


@contextmanager
def _undisturbed(network: nn.Module, training: bool, on_devices: bool = False) -> Iterator[None]:
    """Modes, attributes and random numbers are as before; inside, the same numbers are drawn."""
    states = random.getstate(), np.random.get_state()
    with (
        attributes_kept(network),
        training_mode(network, training),
        torch.random.fork_rng(devices=None if on_devices else []),
    ):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _fakes(host: nn.Module, mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    tensors = {**dict(host.named_parameters()), **dict(host.named_buffers())}
    return {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}


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
    inputs = _at_least_two(inputs)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _undisturbed(network, training), mode:
            host = _Host(network, function)
            arguments = tuple(
                mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in inputs
            )
            return torch.func.functional_call(host, _fakes(host, mode), arguments)
    except Exception as error:  # whatever fakes can't run may still run
        if not real:
            raise
        _logger.info("dry run on a real copy, since fake tensors gave: %s", error)
        return on_a_copy(network, function, inputs, training)


def on_a_copy(
    network: nn.Module, function: Callable[..., Any], inputs: Sequence[Any], training: bool
) -> Any:
    """Calls `function` with a deep copy of the network and the inputs, at least two samples."""
    copied = copy.deepcopy(network)
    with _undisturbed(copied, training, on_devices=True):
        return function(copied, *_at_least_two(inputs))


def _at_least_two(inputs: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(inputs[0], torch.Tensor) or inputs[0].shape[:1] != (1,):
        return inputs
    return [
        torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.shape[:1] == (1,) else v
        for v in inputs
    ]


def check_real(k: int, *tensors: torch.Tensor | None) -> None:
    """Looks whether a fake tensor has stayed behind in the network.

    Raises:
        ValueError: What local module `k` computed is one.
    """
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise ValueError(
            f"Local module {k} computes with a tensor without numbers, which has stayed in a cache "
            "outside of the network's modules (functools.lru_cache, say) when the network was "
            "looked at, and would not train: keep that table as a buffer or an attribute of the "
            "module, or call the network once before it is wrapped, so that real tensors are there."
        )


class FakeRun:
    """A run of a graph's nodes on fakes that goes on where it stopped when the graph has grown.

    Args:
        network: The network; it is not changed.
        inputs: Its inputs, real tensors.
        training: The mode to run in.
        resize: From an input's shape to the shape it shall have here.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Sequence[Any],
        training: bool,
        resize: Callable[[torch.Tensor], tuple[int, ...]],
    ) -> None:
        self._network, self._training = network, training
        self._inputs, self._resize = inputs, resize
        self._forget()

    def _forget(self) -> None:
        self._done: list[str] = []
        self._values: list[Any] = []
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._tensors: dict[str, torch.Tensor] | None = None

    def value(self, nodes: Sequence[fx.Node]) -> Any:
        """What the last of the nodes returns.

        Raises:
            Exception: Fakes, or the network, can't run it.
        """
        if self._done != [node.name for node in nodes[: len(self._done)]]:
            self._forget()
        rest = nodes[len(self._done) :]
        values = dict(zip(nodes, self._values, strict=False))

        def run(host: nn.Module, *arguments: Any) -> None:
            run_nodes(host, rest, arguments, values, lambda i: ())

        with _undisturbed(self._network, self._training), self._mode:
            host = _Host(self._network, run)
            if self._tensors is None:
                self._tensors = _fakes(host, self._mode)
            arguments = [
                torch.empty(self._resize(v), dtype=v.dtype, device=v.device)
                if isinstance(v, torch.Tensor)
                else v
                for v in self._inputs
            ]
            torch.func.functional_call(host, self._tensors, tuple(arguments))
        self._done += [node.name for node in rest]
        self._values += [values[node] for node in rest]
        return self._values[-1]
