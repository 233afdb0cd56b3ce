"""Times of single local modules on a real device, for plans that balance time."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_local.build import Builder
from lightning_local.cutting import Cutting
from lightning_local.setting import Setting

__all__ = ["device_to_time", "measure_seconds"]


def device_to_time(measure: Any) -> torch.device | None:
    """The device on which `plan_partition` times units; None for FLOPs.

    Raises:
        ValueError: There is no such device.
    """
    if measure is None:
        return None
    try:
        device = torch.device(measure)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"plan_partition(measure={measure!r}) is no device of this machine "
            f"({str(error).splitlines()[0]}): pass 'cpu', or 'cuda' where torch sees a GPU; "
            "without measure, shares of time follow from FLOPs."
        ) from error
    return device


def measure_seconds(
    builder: Builder,
    cutting: Cutting,
    setting: Setting,
    device: torch.device,
    rounds: int = 3,
) -> list[tuple[float, float]]:
    """Seconds that forward and backward of each body and head take, in forwards: a third of them.

    Args:
        builder: Makes the heads, one after the other, and has the network; a copy of it runs.
        cutting: Where that is cut.
        setting: Batch size and precision; the builder's inputs are repeated up to the former.
        device: Where to.
        rounds: How often each is timed; the fastest counts.
    """
    network, bodies = copy.deepcopy((builder.network, list(cutting.bodies)))
    dtype = None if setting.mixed else setting.dtype
    network.train().to(device, dtype)

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else None
        repeats = -(-setting.batch_size // max(1, tensor.shape[0]))
        return torch.cat([tensor] * repeats)[: setting.batch_size].to(device, kind)

    values: tuple[Any, ...] = tree_map_only(torch.Tensor, filled, tuple(builder.inputs))
    found = []
    with torch.random.fork_rng():
        for k, body in enumerate(bodies):
            seconds, after = _timed(body, values, setting, device, rounds)
            values, head = tree_map_only(torch.Tensor, torch.detach, after), 0.0
            if k < len(bodies) - 1:
                module = builder.head_at(cutting, k).train().to(device, dtype)
                if any(True for _ in module.parameters()):
                    head, _ = _timed(module.predict, values[:1], setting, device, rounds)
            found.append((seconds / 3, head / 3))
    return found


def _timed(
    run: Any, values: tuple[Any, ...], setting: Setting, device: torch.device, rounds: int
) -> tuple[float, Any]:
    """The fastest of some rounds of forward and backward, and what the forward returned."""
    fastest = float("inf")
    result: Any = None
    for turn in range(rounds + 1):  # the first one warms up
        given = values
        if isinstance(values[0], torch.Tensor) and values[0].is_floating_point():
            given = (values[0].clone().requires_grad_(), *values[1:])
            given = (given[0] * 1, *given[1:])  # bodies may overwrite what they get
        _wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=setting.dtype, enabled=setting.mixed):
            result = run(*given)
        leaves = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
        if leaves:
            torch.autograd.backward(leaves, [torch.ones_like(t) for t in leaves])
        _wait(device)
        took = time.perf_counter() - start
        fastest = min(fastest, took) if turn else fastest
    return fastest, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
