"""The user's module inside: its network, its batch, its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

__all__ = [
    "as_inputs",
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
        if not children:
            choices = "(it has no submodule with parameters yet)"
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


def run_step(
    step: Callable[..., Any], batch: Any, batch_idx: int, may_skip: bool
) -> tuple[torch.Tensor | None, Any]:
    """Calls the user's `training_step`.

    Args:
        step: It.
        batch: Its first argument.
        batch_idx: Its second, if it takes one.
        may_skip: Whether it may return None, for a batch not to learn from.

    Returns:
        The loss, None for a batch that is skipped, and what the step returned.

    Raises:
        ValueError: The step returned None or no loss.
    """
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    result = step(batch, batch_idx) if takes_index else step(batch)
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if result is None and may_skip:
        return None, None
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
