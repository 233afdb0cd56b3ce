"""What can only be seen in a first batch: whether targets, losses and graphs fit.

All of it is raised before the local module in question steps. Reading from the device is fine here,
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_local.local_module import LocalModule
from lightning_local.message import Message
from lightning_local.second_order import graph_nodes

__all__ = ["check_graph", "check_reach", "check_target", "first_loss"]

_IGNORED = -100  # by torch's cross entropy


def first_loss(
    module: LocalModule,
    output: torch.Tensor,
    hidden: torch.Tensor,
    message: Message,
    default_criterion: bool,
) -> torch.Tensor:
    """The local loss of the first batch, looked at from all sides.

    Args:
        module: The local module.
        output: Its head's.
        hidden: Its hidden state.
        message: What it got.
        default_criterion: Whether the heads' criterion is ours, cross entropy.

    Raises:
        ValueError: The targets don't fit the loss, it overwrites the hidden state, or it is no
            scalar.
    """
    objective = module.objective
    assert objective is not None
    if default_criterion and module.predicts:
        check_target(message.target, output)
    objective.check(output, message.target, message.input)
    version = hidden._version
    loss: torch.Tensor = objective(output, hidden, message.target, message.input)
    name = type(objective).__name__.lstrip("_")
    if hidden._version != version:
        raise ValueError(
            f"The loss {name} overwrites the hidden state, which the next local module gets: begin "
            "with an operation that is not in place, or with hidden.clone()."
        )
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(
            f"The local loss {name} returned {found}, and a scalar is needed: let the criterion "
            "average (reduction='mean')."
        )
    return loss


def check_graph(loss: torch.Tensor) -> None:
    """Looks for what hides parameters from a coupling that asks for single gradients.

    Raises:
        ValueError: A segment is checkpointed with `use_reentrant=True`.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes(loss.grad_fn)):
        raise ValueError(
            "The network uses torch.utils.checkpoint with use_reentrant=True, which hides its "
            "parameters from the method's coupling: pass use_reentrant=False."
        )


def check_reach(loss: torch.Tensor, module: nn.Module, own: Sequence[nn.Parameter]) -> None:
    """Looks whether the user's loss stays in the last local module.

    The gradients of a penalty on all weights would wait in the others until their next step.

    Args:
        loss: What `training_step` returned.
        module: The user's module.
        own: What of it the last local module trains.

    Raises:
        ValueError: The loss depends on parameters of other local modules.
    """
    reached = {id(node.variable) for node in graph_nodes(loss.grad_fn) if hasattr(node, "variable")}
    reached -= {id(parameter) for parameter in own}
    names = [name for name, p in module.named_parameters() if id(p) in reached]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"The loss of training_step depends on {names[0]}{more}, which other local modules "
            "train: it teaches the last one alone. Penalties on weights belong into the optimizer "
            "(weight_decay), losses on hidden states into the method; call the network as a whole, "
            "not its layers."
        )


def check_target(target: Any, output: Any) -> None:
    """Looks in the first step whether cross entropy, the default criterion, fits the targets.

    Args:
        target: The unpacked target.
        output: A head's: logits `(N, C)` or `(N, T, V)`.

    Raises:
        ValueError: The targets are neither class indices of the heads' classes, one per prediction,
            nor class probabilities.
    """
    if not isinstance(target, torch.Tensor) or not isinstance(output, torch.Tensor):
        return
    if not target.is_floating_point():
        _check_classes(target, output)
        return
    if target.shape == output.shape:
        sums = target.sum(-1)
        if torch.allclose(sums, torch.ones_like(sums), atol=1e-3) and (target >= 0).all():
            return
    raise ValueError(
        f"The targets are {target.dtype} of shape {tuple(target.shape)}: neither class indices nor "
        "probabilities that add up to 1 per sample, which the heads' default criterion, cross "
        "entropy, needs. Pass LocalLearner(criterion=...), such as torch.nn.MSELoss() or "
        "torch.nn.BCEWithLogitsLoss()."
    )


def _check_classes(target: torch.Tensor, output: torch.Tensor) -> None:
    """A wrong index would end in an assertion on the device, which ends the process on a GPU."""
    if target.shape != output.shape[:-1]:
        raise ValueError(
            f"The targets are class indices of shape {tuple(target.shape)}, and heads give "
            f"{tuple(output.shape)}, which wants {tuple(output.shape[:-1])}: pass "
            "LocalLearner(unpack=...) that returns one index per prediction, or criterion=... that "
            "takes these."
        )
    classes = output.shape[-1]
    wrong = target[((target < 0) | (target >= classes)) & (target != _IGNORED)]
    if wrong.numel():
        raise ValueError(
            f"A target is class {int(wrong[0])}, and the heads' {classes} outputs are classes 0 to "
            f"{classes - 1} ({_IGNORED} is left out): number the classes so, or give network and "
            "heads (LocalLearner(out_features=...)) as many outputs as there are classes."
        )
