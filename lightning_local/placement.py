"""Which stage each local module lives on, and which tensors belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_local.build import step_flops
from lightning_local.dividing import additive, divide

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = [
    "check_placement",
    "check_shared",
    "extra_states",
    "owners",
    "stages_of",
    "tensors_per_module",
]


def check_placement(placement: Any) -> tuple[int, ...] | None:
    """A list of stages as it was given.

    Raises:
        TypeError: It is no list of whole numbers.
        ValueError: Stages are left out, or come in another order.
    """
    if placement is None:
        return None
    if not isinstance(placement, (list, tuple)) or not all(type(s) is int for s in placement):
        raise TypeError(
            f"LocalParallelStrategy(placement={placement!r}): expected a list with the stage of "
            "each local module, such as [0, 0, 1], or None for blocks of equal cost."
        )
    steps = [b - a for a, b in zip(placement, placement[1:], strict=False)]
    if not placement or placement[0] != 0 or any(step not in (0, 1) for step in steps):
        raise ValueError(
            f"LocalParallelStrategy(placement={list(placement)}): the stages of the local modules "
            "have to be 0, 1, 2, ... in order, each with one or more neighbouring local modules, "
            "such as [0, 0, 1]."
        )
    return tuple(placement)


def stages_of(
    learner: LocalLearner, placement: Sequence[int] | None, num_stages: int
) -> list[range]:
    """The local modules of each stage.

    Raises:
        ValueError: There are fewer local modules than stages, or the placement is for others.
    """
    count = learner.num_modules
    if num_stages == 1 and placement is None:
        return [range(max(1, count))]  # not cut yet, for an evaluation in one stage
    if count < num_stages:
        raise ValueError(
            f"{num_stages} stages for {count} local module{'s' * (count != 1)}: pass "
            f"LocalParallelStrategy(num_stages={count}), cut the network into more local modules "
            "with LocalLearner(partition=...), or use the other devices for replicas with "
            "data_parallel=..."
        )
    if placement is None:
        costs = step_flops(learner)
        return divide(additive(costs if any(costs) else [1.0] * count), num_stages)
    if len(placement) != count or placement[-1] != num_stages - 1:
        raise ValueError(
            f"LocalParallelStrategy(placement={list(placement)}) places {len(placement)} local "
            f"modules on {placement[-1] + 1} stages, and there are {count} local modules and "
            f"{num_stages} stages: give one stage per local module, from 0 to {num_stages - 1}."
        )
    stages = []
    for s in range(num_stages):
        members = [k for k, stage in enumerate(placement) if stage == s]
        stages.append(range(members[0], members[-1] + 1))
    return stages


def tensors_per_module(learner: LocalLearner) -> list[dict[str, torch.Tensor]]:
    """Parameters and buffers of each local module by the learner's names.

    What belongs to none, such as a loss with weights, belongs to the last.
    """
    owner = owners(learner)
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(max(1, learner.num_modules))]
    for name, tensor in [*learner.named_parameters(), *learner.named_buffers()]:
        found[owner.get(id(tensor), -1)][name] = tensor
    return found


def owners(learner: LocalLearner) -> dict[int, int]:
    """The local module of each tensor, by its id, that belongs to one."""
    owner: dict[int, int] = {}
    for k, module in enumerate(learner.modules_in_order()):
        # A body lists what it uses of the network; a local module's own tensors are its head's.
        for holder in (module.body, module):
            for tensor in (*holder.parameters(), *holder.buffers()):
                owner.setdefault(id(tensor), k)
    return owner


def extra_states(learner: LocalLearner) -> list[list[tuple[str, nn.Module]]]:
    """Modules with a state beside their tensors (`get_extra_state`), by local module and name."""
    owner: dict[int, int] = {}
    for k, module in enumerate(learner.modules_in_order()):
        for layer in (*module.body.layers(), *module.modules()):
            owner.setdefault(id(layer), k)
    found: list[list[tuple[str, nn.Module]]] = [[] for _ in range(max(1, learner.num_modules))]
    for name, module in learner.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[owner.get(id(module), -1)].append((name, module))
    return found


def check_shared(learner: LocalLearner, stages: Sequence[range]) -> None:
    """Refuses a buffer that one stage changes and another one uses: each has its own.

    Raises:
        ValueError: Names the buffer, running statistics for example.
    """
    modules = learner.modules_in_order()
    homes = {k: s for s, owned in enumerate(stages) for k in owned}
    for k, module in enumerate(modules):
        for name in module.body.changes:
            for j, other in enumerate(modules):
                used = any(name == p or name.startswith(f"{p}.") for p in other.body.used)
                if used and homes[j] != homes[k]:
                    layer = name.rpartition(".")[0]
                    raise ValueError(
                        f"`{name}` changes in local module {k} on stage {homes[k]}, and is used by "
                        f"local module {j} on stage {homes[j]}, where it would be another one: "
                        f"give each place {'a layer' if layer else 'a buffer'} of its own, or "
                        "place both on one stage."
                    )
