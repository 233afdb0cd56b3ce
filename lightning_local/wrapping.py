"""The user's module inside: its network, its batch, its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

__all__ = [
    "Unpack",
    "as_inputs",
    "default_unpack",
    "find_network",
    "run_step",
]

_INPUT_KEYS = ("input", "inputs", "x", "image", "images", "img", "pixel_values", "input_ids")
_TARGET_KEYS = ("target", "targets", "y", "label", "labels")


def find_network(module: pl.LightningModule, name: str | None, traced: bool = True) -> str:
    """The path of the submodule that is cut; `"."` is the module's own forward.

    Args:
        module: The user's.
        name: What the user named, if anything.
        traced: Whether its forward will be looked at, and has to be there.

    Raises:
        ValueError: No such submodule, several could be meant, or there is no forward to cut.
    """
    forward = is_overridden("forward", module)
    children = {
        path: child
        for path, child in module.named_children()
        if next(child.parameters(), None) is not None
    }
    choices = ", ".join(repr(path) for path in children)
    if name == "." and (forward or not traced):
        return name
    if name == ".":
        raise ValueError(
            f"network='.' cuts the forward of {type(module).__name__}, which defines none: define "
            "forward, and let training_step call it"
            + (f"; or pass one of {choices}, whichever training_step calls." if choices else ".")
        )
    if name is not None:
        if not children:
            choices = "(it has no submodule with parameters yet)"
        if name not in dict(module.named_modules()):
            raise ValueError(
                f"network={name!r} is no submodule of {type(module).__name__}: pass one of "
                f"{choices}" + (", or '.' to cut the module's own forward." if forward else ".")
            )
        return name
    direct = any(True for _ in module.parameters(recurse=False))
    if len(children) == 1 and not direct:
        return next(iter(children))
    plain = all(type(child).__module__.startswith("torch.nn") for child in children.values())
    if (children or direct) and plain and forward:
        return "."
    if not children:
        raise ValueError(
            f"{type(module).__name__} has no submodule with parameters yet, so there is nothing "
            "to cut: make the network in __init__, or name it with network=..."
        )
    whole = "network='.' to cut the module's own forward"
    if not forward:
        whole = "define forward, let training_step call it, and pass network='.' to cut it"
    raise ValueError(
        f"{type(module).__name__} has several submodules with parameters; say which is cut: "
        f"network={choices.replace(', ', ' or ')}, or {whole}. The others belong to the last local "
        "module."
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
        if inputs and targets:
            several = zip(("input", "target"), (inputs, targets), strict=True)
            found = " and ".join(f"{keys} could be the {n}" for n, keys in several if keys[1:])
            raise ValueError(
                f"The batch is a dict in which more than one key matches: {found}. Say which: pass "
                f"LocalLearner(unpack=lambda batch: (batch[{inputs[0]!r}], batch[{targets[0]!r}]))."
            )
    raise ValueError(
        f"The batch is {_form(batch)}; local losses need its input and its target. Expected are "
        f"(x, y) or a dict with one of {_INPUT_KEYS} and one of {_TARGET_KEYS}: pass "
        "LocalLearner(unpack=...), a function from the batch to (input, target)."
    )


class Unpack:
    """The user's `unpack`, whose answer is looked at in every batch.

    Args:
        function: From a batch to `(input, target)`.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, batch: Any) -> tuple[Any, Any]:
        """Input and target of a batch.

        Raises:
            ValueError: The answer is no pair.
        """
        found = self.function(batch)
        # A tensor of two samples is a pair to Python.
        if isinstance(found, (tuple, list)) and len(found) == 2:
            return found[0], found[1]
        raise ValueError(
            f"LocalLearner(unpack=...) returned {_form(found)}: it has to return a tuple of two, "
            "(input, target). Several inputs of the network are a tuple in the input's place, "
            "several targets a tuple or a dict in the target's."
        )


def _form(found: Any) -> str:
    """What a batch or an answer is, for an error."""
    if isinstance(found, Mapping):
        return f"a dict with the keys {list(found)}"
    if isinstance(found, torch.Tensor):
        return f"a {type(found).__name__} of shape {tuple(found.shape)}"
    size = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
    return f"a {type(found).__name__}{size}"


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
