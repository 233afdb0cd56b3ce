"""The learner's arguments, checked when they arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_local.couplings import Isolated
from lightning_local.local_module import RECOMPUTE
from lightning_local.methods import LocalMethod, get_method
from lightning_local.partition import Partition

__all__ = [
    "check_compile",
    "check_optimizer",
    "check_options",
    "check_recompute",
    "ends_to_end",
    "method_and_partition",
    "recompute_modes",
]

# Those of torch.compile.
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def method_and_partition(
    method: LocalMethod | str, partition: Partition | int | list[str] | list[int] | str
) -> tuple[LocalMethod, Partition]:
    """What `method` and `partition` stand for.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An unknown name, or a method without heads together with a partition.
    """
    made, request = get_method(method), Partition.of(partition)
    if made.head is None:
        if request not in (Partition(), Partition(num_modules=1)):
            raise ValueError(
                f"{type(made).__name__} trains the network as one module, but "
                f"partition={partition!r}: leave partition out, or choose another method."
            )
        request = Partition(num_modules=1)
    if ends_to_end(request) and not isinstance(made.coupling, Isolated):
        rank_zero_warn(
            f"{type(made.coupling).__name__} has no effect with one local module: there is no "
            "boundary. Cut the network, or use methods.EndToEnd()."
        )
    return made, request


def ends_to_end(request: Partition) -> bool:
    """Whether nothing is cut."""
    return request.num_modules == 1 or request.split_points == ()


# What the learner calls, and what to pass; a configuration file's classes arrive as functions.
_FUNCTIONS = {
    "criterion": "a loss, (output, target) -> scalar, such as torch.nn.MSELoss() or a function",
    "unpack": "a function from a batch to (input, target), such as lambda batch: (batch['image'], "
    "batch['label'])",
    "optimizer": "a function that makes an optimizer for the parameters of each local module, such "
    "as lambda parameters: torch.optim.SGD(parameters, lr=0.1)",
    "lr_scheduler": "a function that makes a scheduler for each local module's optimizer, such as "
    "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)",
}


def check_options(
    out_features: int | None, criterion: Any, unpack: Any, optimizer: Any, lr_scheduler: Any
) -> None:
    """Checks what is called, has a range or goes in pairs.

    Raises:
        TypeError: What is to be called can't be, or is a class where its instance is.
        ValueError: `out_features` below 1, or `lr_scheduler` without `optimizer`.
    """
    given = (criterion, unpack, optimizer, lr_scheduler)
    for (name, wanted), value in zip(_FUNCTIONS.items(), given, strict=True):
        if value is not None and not callable(value):
            found = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
            found += ", made already" if isinstance(value, (Optimizer, LRScheduler)) else ""
            raise TypeError(f"LocalLearner({name}=...) got {found}: pass {wanted}.")
    if isinstance(criterion, type):
        raise TypeError(
            f"LocalLearner(criterion=...) got the class {criterion.__name__}, which output and "
            f"target would make an instance of: pass an instance, {criterion.__name__}()."
        )
    if out_features is not None and out_features < 1:
        raise ValueError(f"out_features={out_features}: heads need 1 or more outputs.")
    if lr_scheduler is not None and optimizer is None:
        raise ValueError("lr_scheduler needs optimizer: pass both, or neither.")


def check_compile(compile: Any) -> str:
    """The compiler's mode; empty for none.

    Raises:
        TypeError: It is neither a bool nor a string.
        ValueError: No such mode.
    """
    if isinstance(compile, bool):
        return "default" if compile else ""
    if not isinstance(compile, str):
        raise TypeError(f"compile={compile!r}: pass True, False or one of {MODES}.")
    if compile not in MODES:
        raise ValueError(f"compile={compile!r} is not known: pass True, False or one of {MODES}.")
    return compile


def check_optimizer(given: Any, optimizer: Any) -> None:
    """Refuses two answers to one question.

    Raises:
        ValueError: A LightningCLI's `--optimizer` besides the learner's own argument.
    """
    if given is not None and optimizer is not None:
        raise ValueError(
            "The command line's --optimizer and LocalLearner(optimizer=...) both say how to "
            "optimize: leave one of them out."
        )


def check_recompute(recompute: Any) -> str | dict[int, str]:
    """Which local modules compute activations twice: a mode for all, or one for each index.

    Raises:
        TypeError: It is neither a mode, nor a list of indices, nor a dict from indices to modes.
        ValueError: An unknown mode, or a negative or repeated index.
    """
    if isinstance(recompute, str):
        if recompute not in RECOMPUTE:
            raise ValueError(
                f"recompute={recompute!r} is not known: pass one of {RECOMPUTE}, a list of indices "
                "of local modules that recompute their bodies, or a dict from indices to modes."
            )
        return recompute
    whole = list(recompute) if isinstance(recompute, (list, tuple, Mapping)) else None
    if whole is None or not all(type(k) is int for k in whole):
        raise TypeError(
            f"recompute={recompute!r}: pass one of {RECOMPUTE}, a list of indices of local modules "
            "such as [0, 1], or a dict such as {0: 'blocks', 1: 'body'}."
        )
    if len(set(whole)) < len(whole) or any(k < 0 for k in whole):
        raise ValueError(
            f"recompute={recompute!r}: local modules are counted from 0, each named once."
        )
    modes = dict(recompute) if isinstance(recompute, Mapping) else dict.fromkeys(whole, "body")
    for k, mode in modes.items():
        if mode not in RECOMPUTE:
            raise ValueError(
                f"recompute={recompute!r}: {mode!r} (of local module {k}) is not one of "
                f"{RECOMPUTE}."
            )
    return modes or "none"


def recompute_modes(recompute: str | Mapping[int, str], num_modules: int) -> list[str]:
    """The mode of each of K local modules.

    Raises:
        ValueError: An index is K or more.
    """
    if isinstance(recompute, str):
        return [recompute] * num_modules
    beyond = [k for k in recompute if k >= num_modules]
    if beyond:
        raise ValueError(
            f"recompute names local module {beyond[0]}, and there are {num_modules}: pass indices "
            f"from 0 to {num_modules - 1}."
        )
    return [recompute.get(k, "none") for k in range(num_modules)]
