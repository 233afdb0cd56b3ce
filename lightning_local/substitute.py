"""What stands in for the network while the user's step runs for the last local module.

The local modules before it have already seen the batch, so the step has to call the network with
that very input. This is looked at in every step, without waiting for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_local.body import prediction

__all__ = ["OTHER_INPUT", "Expected", "Substitute", "in_order", "inputs_of_call", "replaced"]


@dataclass
class Expected:
    """The unpacked inputs of a batch, and the state they were in.

    Attributes:
        values: The network's positional inputs.
        versions: How often each tensor had been changed in place; None for other things.
    """

    values: tuple[Any, ...]
    versions: tuple[int | None, ...]

    @staticmethod
    def of(values: tuple[Any, ...]) -> Expected:
        """Inputs as they are now."""
        return Expected(values, tuple(_version(value) for value in values))


def _version(value: Any) -> int | None:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


class Substitute:
    """Stands in for the network's forward while the user's step runs for the last local module.

    Args:
        network: The network whose forward is replaced.
        run: Makes the network's output from what the last local module received.
        expected: What the step has to pass; None is not looked at.
        read_values: Whether values may be read to compare them, which the host has to wait for;
            otherwise `changed` tells, on the device.
        step: The name of the user's step.

    Attributes:
        output: What `run` returned, as a prediction.
        changed: Whether an input was another one, if that is not known yet.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Callable[[], Any],
        expected: Expected | None,
        read_values: bool = False,
        step: str = "training_step",
    ) -> None:
        self._network = network
        self._run = run
        self._expected = expected
        self._read_values = read_values
        self._step = step
        self._calls = 0
        self.output: Any = None
        self.changed: torch.Tensor | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """The network's forward is replaced inside the block.

        Raises:
            ValueError: The network was not called exactly once.
        """
        forward = self._network.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(in_order(forward, args, kwargs))

        with replaced(self._network, "forward", call):
            yield
        if self._calls == 0:
            raise ValueError(
                f"{self._step} did not call the network that is cut (or called parts of it "
                "directly), so what it returns knows nothing of the local modules: call the "
                f"network once, or pass network=... with the attribute that {self._step} calls."
            )

    def _call(self, given: tuple[Any, ...]) -> Any:
        self._calls += 1
        if self._calls > 1:
            raise ValueError(self._called_twice(given))
        known = given if self._expected is None else self._expected.values
        if len(given) != len(known):
            raise ValueError(
                f"training_step called the network with {len(given)} inputs, where unpacking the "
                f"batch gives {len(known)}: pass LocalLearner(unpack=...) that returns (inputs, "
                "target), the inputs as a tuple in the order of the network's forward. A network "
                "that takes the target as well (labels=...) has to leave the loss to training_step."
            )
        if self._is_other(given):
            raise ValueError(OTHER_INPUT)
        output = self._run()
        self.output = prediction(output)
        return output

    def _called_twice(self, given: tuple[Any, ...]) -> str:
        """What to do instead: the calls may be for one output, or for two."""
        keep = "keep its output in a variable"
        if self._step != "training_step":
            return (
                f"{self._step} called the network twice for one batch. With its local modules in "
                "several processes it runs once per batch: if both calls have the same input, "
                f"{keep}; else run the {self._step.removesuffix('_step')} without "
                "LocalParallelStrategy, on one device."
            )
        self._read_values = True
        same = self._expected is not None and len(given) == len(self._expected.values)
        if same and not self._is_other(given):
            return (
                "training_step called the network twice for one batch, with the same input. Local "
                f"modules run once per batch: {keep}, for the loss and, say, an accuracy."
            )
        return (
            "training_step called the network twice for one batch (two views, say); local modules "
            "have seen one input: join the views into one batch in on_after_batch_transfer, so "
            "that the network is called once."
        )

    def _is_other(self, given: tuple[Any, ...]) -> bool:
        """Whether this is surely another input; what only values tell goes to `changed`."""
        if self._expected is None:
            return False
        for a, b, version in zip(
            given, self._expected.values, self._expected.versions, strict=True
        ):
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                if a is not b and (isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor)):
                    return True
                if a is not b and a != b:
                    return True
                continue
            if _version(b) != version or a.shape != b.shape or a.dtype != b.dtype:
                return True
            if a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
                continue
            differs = ((a != b) & ~((a != a) & (b != b))).any()
            if self._read_values:
                if differs:
                    return True
            else:
                self.changed = differs if self.changed is None else self.changed | differs
        return False


OTHER_INPUT = (
    "training_step called the network with another input than the batch's: an input changed inside "
    "the step (augmentation, mixup, permute, a slice) reaches the last local module only. Move the "
    "change to on_after_batch_transfer, or pass LocalLearner(unpack=...) that returns what the "
    "network is called with."
)


def in_order(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call in the order of the function's parameters."""
    if not kwargs:
        return args
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return (*args, *kwargs.values())
    return (*bound.args, *bound.kwargs.values())


class _Called(BaseException):
    """Carries what the network was called with out of the user's code."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.inputs = inputs


def inputs_of_call(network: nn.Module, run: Callable[[], Any]) -> tuple[Any, ...] | None:
    """What the user's code calls the network with first; it is run up to there.

    Args:
        network: The network that is cut.
        run: Runs the user's code.

    Returns:
        The positional inputs; None if the code ended without a call.
    """
    forward = network.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        raise _Called(in_order(forward, args, kwargs))

    with replaced(network, "forward", call):
        try:
            run()
        except _Called as called:
            return called.inputs
    return None


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance has another value inside the block."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before
