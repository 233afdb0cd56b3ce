"""Optimizers, clipping and step counting, one of each per local module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import (
    LightningOptimizer,
    _configure_optimizers,
    _configure_schedulers_automatic_opt,
)
from lightning.pytorch.utilities.types import LRSchedulerConfig
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

__all__ = [
    "build_from_callables",
    "clone_per_module",
    "count_once",
    "for_lightning",
    "read_recipe",
    "recipes",
]

Recipe = tuple[Optimizer, list[LRSchedulerConfig]]
# Dicts of an optimizer that torch makes anew when it is copied.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def read_recipe(configured: Any) -> Recipe:
    """What `configure_optimizers` returned, as one optimizer and its complete scheduler configs.

    Raises:
        ValueError: It returned no optimizer, or several.
    """
    if configured is None:
        raise ValueError(
            "configure_optimizers of the wrapped module returned None, so there is nothing to "
            "train with: return an optimizer, or pass LocalLearner(optimizer=...)."
        )
    optimizers, schedulers, monitor = _configure_optimizers(configured)
    if len(optimizers) != 1:
        raise ValueError(
            f"configure_optimizers of the wrapped module returned {len(optimizers)} optimizers; "
            "which of them a local module should get would be a guess. Return one (it may have "
            "several parameter groups), or pass LocalLearner(optimizer=...)."
        )
    optimizer = optimizers[0]
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss again and again within one step, and a local module's loss "
            "is computed once per batch: use another optimizer."
        )
    return optimizer, _configure_schedulers_automatic_opt(schedulers, monitor)


def recipes(
    configure: Callable[[], Any],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None,
    lr_scheduler: Callable[[Optimizer], Any] | None,
    own: Sequence[Sequence[nn.Parameter]],
    heads: Sequence[Sequence[nn.Parameter]],
    shared: Sequence[Any] = (),
) -> list[Recipe]:
    """One recipe per local module: from the learner's callables, else `configure`'s, cloned."""
    if len(own) > 1 and not any(p.requires_grad for parameters in own for p in parameters):
        rank_zero_warn(
            "No parameter of the module requires a gradient, so the heads alone are trained, for "
            "EarlyExit, say: requires_grad_(True) where more is to learn."
        )
    if optimizer is not None:
        return build_from_callables(optimizer, lr_scheduler, own, heads)
    return clone_per_module(read_recipe(configure()), own, heads, shared)


def for_lightning(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Scheduler configs with the keys that Lightning keeps under manual optimization."""
    given = []
    for k, (_, configs) in enumerate(recipes):
        for config in configs:
            name = f"{config.name or 'lr'}/{k:02d}" if len(recipes) > 1 else config.name
            kept = {"interval": config.interval, "frequency": config.frequency, "name": name}
            given.append({"scheduler": config.scheduler, **kept})
    return given


def clone_per_module(
    recipe: Recipe,
    own: Sequence[Sequence[nn.Parameter]],
    heads: Sequence[Sequence[nn.Parameter]],
    shared: Sequence[Any] = (),
) -> list[Recipe]:
    """Gives each local module the user's optimizer and schedulers on its own parameters.

    Groups keep their places, even when a module has nothing in one, so that what schedulers keep
    per group stays in line. A head joins the first group in which its module has parameters.

    Args:
        recipe: The user's; must not have stepped yet.
        own: For each local module its parameters of the user's module.
        heads: For each local module the parameters of its head.
        shared: What schedules may refer to without having a copy: the module, its Trainer.

    Raises:
        ValueError: It has a scheduler that is not among its schedulers.
    """
    optimizer, configs = recipe
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    if len(own) == 1:
        return [recipe]
    mine = [{id(p) for p in parameters} for parameters in own]
    known = set().union(*mine)
    # What the user optimizes outside the wrapped module goes with the last local module.
    mine[-1] |= {id(p) for p in listed if id(p) not in known}
    if not configs and hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched"):
        raise ValueError(
            "configure_optimizers of the wrapped module made a scheduler and did not return it, so "
            "it would go on with an optimizer that steps nothing: every local module has its own. "
            "Return the scheduler too, and Lightning steps it."
        )
    clones = []
    for ids, head in zip(mine, heads, strict=True):
        memo: dict[int, Any] = {id(each): each for each in (*listed, *shared)}
        clone, schedulers = copy.deepcopy((optimizer, [c.scheduler for c in configs]), memo)
        # What torch leaves out when an optimizer is copied: attributes of the user's own class, and
        # hooks. The `step` that a scheduler has put there would step the original.
        for name, value in vars(optimizer).items():
            if name in _HOOKS:
                getattr(clone, name).update(value)
            elif name not in vars(clone) and name != "step":
                setattr(clone, name, copy.deepcopy(value, memo))
        for group in clone.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) in ids]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in kept]
        held = {id(p) for group in clone.param_groups for p in group["params"]}
        for parameter in [p for p in clone.state if id(p) not in held]:
            del clone.state[parameter]
        filled = [group for group in clone.param_groups if group["params"]]
        group = (filled or clone.param_groups)[0]
        group["params"].extend(head)
        clone.state.update(_first_state(optimizer, head))
        if "param_names" in group:
            group["param_names"].extend(f"head.{i}" for i in range(len(head)))
        if schedulers:
            _track_steps(clone)
        copies = [copy.copy(config) for config in configs]
        for config, scheduler in zip(copies, schedulers, strict=True):
            config.scheduler = scheduler
        clones.append((clone, copies))
    return clones


def _first_state(optimizer: Optimizer, head: Sequence[nn.Parameter]) -> dict[Any, Any]:
    """What an optimizer such as Adagrad keeps of parameters before it has stepped."""
    if not optimizer.state or not head:
        return {}
    try:
        return dict(type(optimizer)(head, **optimizer.defaults).state)
    except TypeError as error:
        raise ValueError(
            f"{type(optimizer).__name__} keeps a state of its parameters before the first step, "
            f"and can't be made for the heads ({error}): pass LocalLearner(optimizer=...), which "
            "is called for each local module."
        ) from error


def _track_steps(optimizer: Optimizer) -> None:
    """Lets schedulers see that the clone steps, as torch does when a scheduler is made for it."""
    # What torch's schedulers hang on an optimizer themselves; no part of its types.
    step = type(optimizer).step

    def tracked(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return step(optimizer, *args, **kwargs)

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = tracked  # type: ignore[method-assign]


def build_from_callables(
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    lr_scheduler: Callable[[Optimizer], Any] | None,
    own: Sequence[Sequence[nn.Parameter]],
    heads: Sequence[Sequence[nn.Parameter]],
) -> list[Recipe]:
    """Calls the learner's own `optimizer` and `lr_scheduler` for each local module.

    Raises:
        ValueError: `optimizer` returned something else, or dropped parameters.
    """
    recipes = []
    for k, (body, head) in enumerate(zip(own, heads, strict=True)):
        # Frozen ones too: they may be thawed later.
        parameters = [*body, *head]
        made = optimizer(parameters)
        if not isinstance(made, Optimizer):
            raise ValueError(
                f"LocalLearner(optimizer=...) returned a {type(made).__name__} for local module "
                f"{k}: it has to return a torch.optim.Optimizer."
            )
        held = {id(p) for group in made.param_groups for p in group["params"]}
        missing = sum(id(p) not in held for p in parameters)
        if missing:
            raise ValueError(
                f"LocalLearner(optimizer=...) left out {missing} of the {len(parameters)} "
                f"parameters of local module {k}: it has to optimize all it is given; freeze what "
                "should not train with requires_grad_(False)."
            )
        configured: Any = made
        if lr_scheduler is not None:
            scheduler = lr_scheduler(made)
            configured = {
                "optimizer": made,
                "lr_scheduler": scheduler,
                "monitor": getattr(scheduler, "monitor", None),
            }
            if isinstance(scheduler, dict):
                configured["monitor"] = scheduler.get("monitor")
        recipes.append(read_recipe(configured))
    return recipes


def count_once(trainer: pl.Trainer, counted: int) -> None:
    """Lets one optimizer alone advance `trainer.global_step`, whatever K.

    Lightning counts every step of every optimizer under manual optimization
    (Lightning-AI/pytorch-lightning#17958); the loop hangs its counters on all optimizers at the
    start of each batch, so this runs in each batch too.
    """
    # Lightning's connectors set it, out of mypy's sight.
    profiler = trainer.profiler  # type: ignore[attr-defined]
    for k, optimizer in enumerate(trainer.strategy._lightning_optimizers):
        if k != counted:
            optimizer._on_before_step = partial(profiler.start, "optimizer_step")
            optimizer._on_after_step = partial(profiler.stop, "optimizer_step")
