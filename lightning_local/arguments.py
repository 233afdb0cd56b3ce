"""The learner's arguments, checked when they arrive."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_local.couplings import Isolated
from lightning_local.methods import LocalMethod, get_method
from lightning_local.partition import Partition

__all__ = ["check_optimizer", "check_options", "ends_to_end", "method_and_partition"]


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


def check_options(out_features: int | None, optimizer: Any, lr_scheduler: Any) -> None:
    """Checks what has a range or goes in pairs.

    Raises:
        ValueError: `out_features` below 1, or `lr_scheduler` without `optimizer`.
    """
    if out_features is not None and out_features < 1:
        raise ValueError(f"out_features={out_features}: heads need 1 or more outputs.")
    if lr_scheduler is not None and optimizer is None:
        raise ValueError("lr_scheduler needs optimizer: pass both, or neither.")


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
