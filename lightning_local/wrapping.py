"""The user's module inside: its network, its batch, its step while the loop runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

__all__ = [
    "Substitute",
    "default_unpack",
    "find_network",
    "run_step",
]

_INPUT_KEYS = ("input", "inputs", "x", "image", "images", "img", "pixel_values", "input_ids")
_TARGET_KEYS = ("target", "targets", "y", "label", "labels")


def find_network(module: pl.LightningModule, name: str | None) -> str:
    """The path of the submodule that is cut; `"."` is the module's own forward.

    Raises:
        ValueError: No such submodule, or several could be meant.
    """
    children = {
        path: child
        for path, child in module.named_children()
        if next(child.parameters(), None) is not None
    }
    choices = ", ".join(repr(path) for path in children)
    if name == ".":
        return name
    if name is not None:
        if name not in dict(module.named_modules()):
            raise ValueError(
                f"network={name!r} is no submodule of {type(module).__name__}: pass one of "
                f"{choices}, or '.' to cut the module's own forward."
            )
        return name
    direct = any(True for _ in module.parameters(recurse=False))
    if len(children) == 1 and not direct:
        return next(iter(children))
    plain = all(type(child).__module__.startswith("torch.nn") for child in children.values())
    if (children or direct) and plain and is_overridden("forward", module):
        return "."
    if not children:
        raise ValueError(
            f"{type(module).__name__} has no submodule with parameters yet, so there is nothing "
            "to cut: make the network in __init__, or name it with network=..."
        )
    raise ValueError(
        f"{type(module).__name__} has several submodules with parameters; say which is cut: "
        f"network={choices.replace(', ', ' or ')}, or network='.' to cut the module's own forward. "
        "The others belong to the last local module."
    )


def default_unpack(batch: Any) -> tuple[Any, Any]:
    """Input and target of an `(x, y)` pair or of a dict with the usual keys.

    Raises:
        ValueError: The batch is neither.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        inputs = [key for key in _INPUT_KEYS if key in batch]
        targets = [key for key in _TARGET_KEYS if key in batch]
        if len(inputs) == 1 and len(targets) == 1:
            return batch[inputs[0]], batch[targets[0]]
        found = f"a dict with the keys {list(batch)}"
    else:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        found = f"a {type(batch).__name__}{size}"
    raise ValueError(
        f"The batch is {found}; local losses need its input and its target. Expected are (x, y) or "
        f"a dict with one of {_INPUT_KEYS} and one of {_TARGET_KEYS}: pass LocalLearner(unpack=...)"
        ", a function from the batch to (input, target)."
    )


def as_inputs(value: Any) -> tuple[Any, ...]:
    """The network's positional inputs: a tuple as it is, anything else as the only one."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def run_step(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[torch.Tensor, Any]:
    """Calls the user's `training_step`.

    Returns:
        The loss, and what the step returned.

    Raises:
        ValueError: The step returned None or no loss.
    """
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    result = step(batch, batch_idx) if takes_index else step(batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, torch.Tensor):
        raise ValueError(
            f"training_step returned {type(result).__name__} without a loss tensor: return the "
            "loss, or a dict with 'loss'. Skipping a batch by returning None is not possible, "
            "since the local modules before the last one have already learned from it."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"training_step returned a loss of shape {tuple(loss.shape)}: return a scalar."
        )
    return loss, result


class Substitute:
    """Stands in for the network's forward while the user's step runs for the last local module.

    Args:
        network: The network whose forward is replaced.
        run: Makes the network's output from what the last local module received.
        expected: The unpacked inputs; with `check_values` the step has to pass the same.
        check_values: Compare values; costs a host-device synchronisation, so for the first step.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Callable[[], Any],
        expected: tuple[Any, ...],
        check_values: bool,
    ) -> None:
        self._network = network
        self._run = run
        self._expected = expected
        self._check_values = check_values
        self._calls = 0
        self.output: Any = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """The network's forward is replaced inside the block.

        Raises:
            ValueError: The network was not called exactly once.
        """
        before = self._network.__dict__.get("forward")
        self._network.__dict__["forward"] = self._call
        try:
            yield
        finally:
            if before is None:
                del self._network.__dict__["forward"]
            else:
                self._network.__dict__["forward"] = before
        if self._calls == 0:
            raise ValueError(
                "training_step did not call the network that is cut (or called parts of it "
                "directly), so its loss knows nothing of the local modules: call the network once, "
                "or pass network=... with the attribute that training_step calls."
            )

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._calls > 1:
            raise ValueError(
                "training_step called the network twice for one batch (two views, say); local "
                "modules have seen one input: join the views into one batch in "
                "on_after_batch_transfer, so that the network is called once."
            )
        given = (*args, *kwargs.values())
        if self._check_values and not _same(given, self._expected):
            raise ValueError(
                "training_step called the network with another input than the batch's: an input "
                "changed inside the step (augmentation, mixup, permute, a slice) reaches the last "
                "local module only. Move the change to on_after_batch_transfer, or pass "
                "LocalLearner(unpack=...) that returns what the network is called with."
            )
        self.output = self._run()
        return self.output


def _same(given: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    if len(given) != len(expected):
        return False
    for a, b in zip(given, expected, strict=True):
        if a is b:
            continue
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or a != b:
            return False
    return True
