"""What can only be seen in a first batch: whether targets, losses and graphs fit.

All of it is raised before the local module in question steps. Reading from the device is fine here,
once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_local.local_module import LocalModule
from lightning_local.message import Message
from lightning_local.objectives import Objective, form_of, per_item
from lightning_local.second_order import graph_nodes

__all__ = ["check_graph", "check_reach", "check_target", "first_loss"]

_IGNORED = -100  # by torch's cross entropy


def first_loss(
    k: int,
    module: LocalModule,
    output: torch.Tensor,
    hidden: torch.Tensor,
    message: Message,
    default_criterion: bool,
) -> torch.Tensor:
    """The local loss of the first batch, looked at from all sides.

    Args:
        k: The index of the local module.
        module: It.
        output: Its head's.
        hidden: Its hidden state.
        message: What it got.
        default_criterion: Whether the heads' criterion is ours, cross entropy.

    Raises:
        ValueError: The targets don't fit the loss, it fails or broadcasts, it overwrites the hidden
            state, or it is no scalar with a gradient.
    """
    objective = module.objective
    assert objective is not None
    if default_criterion and module.predicts:
        check_target(message.target, output)
    objective.check(output, message.target, message.input)
    version = hidden._version
    loss = _computed(k, objective, output, hidden, message)
    name = type(objective).__name__.lstrip("_")
    if hidden._version != version:
        raise ValueError(
            f"The loss {name} overwrites the hidden state, which the next local module gets: begin "
            "with an operation that is not in place, or with hidden.clone()."
        )
    _check_scalar(loss, f"The local loss {name} of local module {k}")
    learns = hidden.requires_grad or getattr(output, "requires_grad", False)
    if learns and not loss.requires_grad:
        raise ValueError(
            f"The local loss {name} of local module {k} has no gradient, so nothing would be "
            f"learned. {_given(output, message.target)}: pass LocalLearner(criterion=...) that "
            "stays differentiable, without detach(), argmax(), numpy() or no_grad()."
        )
    checked: torch.Tensor = loss
    return checked


def _check_scalar(loss: Any, name: str) -> None:
    if not isinstance(loss, torch.Tensor):
        raise ValueError(
            f"{name} returned a {type(loss).__name__}, and a scalar tensor is needed: let the "
            "criterion return the loss as it was computed, without item(), numpy() or a dict."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{name} returned {tuple(loss.shape)}, and a scalar is needed: let the criterion "
            "average (reduction='mean')."
        )


def _computed(
    k: int, objective: Objective, output: torch.Tensor, hidden: torch.Tensor, message: Message
) -> Any:
    """The loss of a criterion that neither fails nor sets each output against each target."""
    target = message.target
    remedy = _squeezed(output, target)
    watch = _Broadcast(*per_item(output, target)) if remedy else None
    try:
        if watch is None:
            return objective(output, hidden, target, message.input)
        with watch, warnings.catch_warnings():
            # torch warns of this in some of its losses; what is raised below says more.
            warnings.filterwarnings("ignore", "Using a target size")
            loss = objective(output, hidden, target, message.input)
    except Exception as error:
        if is_oom_error(error):
            raise
        raise ValueError(
            f"The local loss of local module {k} failed in its first batch, with "
            f"{type(error).__name__}: {error}\n{_given(output, target)}: pass "
            "LocalLearner(criterion=...), a loss of the heads' output and the target, or "
            "unpack=... that returns another target." + (f" Here {remedy}." if remedy else "")
        ) from error
    if watch.found:
        raise ValueError(
            f"The criterion compares each output with each target, {tuple(watch.joint)} of them, "
            f"which teaches heads nonsense. {_given(output, target)}: {remedy}."
        )
    return loss


def _given(output: torch.Tensor, target: Any) -> str:
    """What a criterion got, for an error."""
    return f"The head's output is {form_of(output)}, and the target {form_of(target)}"


def _squeezed(output: Any, target: Any) -> str:
    """What to do where one of the two has a last dimension of 1 more; empty where none has."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return ""
    if output.shape == (*target.shape, 1):
        return (
            "pass criterion=lambda output, target: loss(output.squeeze(-1), target), with your "
            "loss; or network='.', where the module's own forward squeezes the output"
        )
    if target.shape == (*output.shape, 1):
        return (
            "pass criterion=lambda output, target: loss(output, target.squeeze(-1)), with your "
            "loss; or unpack=... that returns such a target"
        )
    return ""


# torch leaves TorchDispatchMode and broadcast_shapes untyped, hence the ignores.
class _Broadcast(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices an operation in which outputs `(N, 1)` and targets `(N,)` make `(N, N)`.

    Args:
        output: The head's, or `(N,)`.
        target: The batch's, or `(N, 1)`.

    Attributes:
        joint: The shape of both together.
        found: Whether there was such an operation.
    """

    def __init__(self, output: torch.Tensor, target: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = output.shape, target.shape
        self._expanded: set[str] = set()
        self.joint = torch.Size()
        self.found = False
        with suppress(RuntimeError):  # can't be broadcast, which the criterion will say
            joint = torch.broadcast_shapes(*self._shapes)  # type: ignore[no-untyped-call]
            self.joint = joint if joint not in self._shapes else self.joint

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at its shapes."""
        result = func(*args, **(kwargs or {}))
        sides = {self._side(each) for each in args if isinstance(each, torch.Tensor)}
        # torch's losses expand both, one after the other, before they compare them.
        expands = func is torch.ops.aten.expand.default
        sides |= self._expanded if expands else set()
        if isinstance(result, torch.Tensor) and result.shape == self.joint and self.joint:
            self.found |= sides >= {"output", "target"}
        self._expanded = sides if expands else set()
        return result

    def _side(self, tensor: torch.Tensor) -> str:
        """What it comes from: a criterion may compare outputs with each other, and targets."""
        if tensor.requires_grad and tensor.shape == self._shapes[0]:
            return "output"
        return "target" if not tensor.requires_grad and tensor.shape == self._shapes[1] else ""


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
    order = ""
    if output.ndim == 3 and target.shape == output.shape[::2]:
        order = (
            " Heads take the network's output as (N, T, V), classes last. If yours is (N, V, T), "
            "classes in dimension 1, pass out_features=V, or let the network return (N, T, V) and "
            "transpose in training_step."
        )
    if target.shape != output.shape[:-1]:
        raise ValueError(
            f"The targets are class indices of shape {tuple(target.shape)}, and heads give "
            f"{tuple(output.shape)}, which wants {tuple(output.shape[:-1])}: pass "
            "LocalLearner(unpack=...) that returns one index per prediction, or criterion=... that "
            f"takes these.{order}"
        )
    classes = output.shape[-1]
    wrong = target[((target < 0) | (target >= classes)) & (target != _IGNORED)]
    if wrong.numel():
        raise ValueError(
            f"A target is class {int(wrong[0])}, and the heads' {classes} outputs are classes 0 to "
            f"{classes - 1} ({_IGNORED} is left out): number the classes so, or give network and "
            f"heads (LocalLearner(out_features=...)) as many outputs as there are classes.{order}"
        )
