"""From a learner's arguments to its local modules: cuts and heads."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_local.dryrun import on_fakes
from lightning_local.local_module import LocalModule
from lightning_local.methods.base import LocalMethod
from lightning_local.objectives import Objective
from lightning_local.partition import Cutting, Partition, cut_network
from lightning_local.place import Place, Unit
from lightning_local.randomness import seed_for

if TYPE_CHECKING:
    from lightning_local.learner import LocalLearner

__all__ = ["make_local_modules", "parameters_per_module", "step_flops"]


def make_local_modules(
    network: nn.Module,
    request: Partition,
    method: LocalMethod,
    inputs: Sequence[Any],
    *,
    name: str,
    criterion: Any,
    out_features: int | None,
    seed: int,
) -> tuple[Cutting, list[LocalModule]]:
    """Cuts the network and makes the heads.

    Each head is initialised from its own seed, on the CPU, and leaves the global generator alone.

    Raises:
        ValueError: The network can't be cut as asked, or the heads' size can't be seen.
    """
    assert method.head is not None
    first = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    # The data may be in the precision that the network will have once the fit starts.
    inputs = [
        v.to(first.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for v in inputs
    ]
    cutting = cut_network(
        network,
        request,
        inputs,
        tail_units=method.head.tail_units,
        name=name,
    )
    if len(cutting.bodies) == 1:
        rank_zero_warn(
            f"`{name}` has one unit, so it is trained end to end, without local modules: "
            "Partition(granularity='finest') or explicit split points may cut it."
        )
    features, pools = _output_form(cutting.output, out_features, name)
    embedding = method.loss.embedding
    given = inputs[0] if inputs and isinstance(inputs[0], torch.Tensor) else None
    shape = None if given is None else torch.empty_like(given, device="meta")
    units = [
        Unit(
            body,
            cutting.unit_boundaries[u - 1],
            (*cutting.unit_boundaries, None)[u],
            last=u == len(cutting.units) - 1,
        )
        for u, body in enumerate(cutting.units)
        if u > 0
    ]
    rank = cutting.output.ndim if isinstance(cutting.output, torch.Tensor) else None
    scalar = rank == 1 and out_features is None
    modules = []
    num_modules = len(cutting.bodies)
    for k, body in enumerate(cutting.bodies[:-1]):
        unit = cutting.last_unit[k]
        form, later = cutting.boundaries[k], units[unit:]
        place = Place(k, num_modules, form, features, pools, unit, later, shape)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed_for(seed, -2 - k))
            head: nn.Module = nn.Identity()
            if embedding is None or embedding > 0:
                size = features if embedding is None else embedding
                head = method.head.build(dataclasses.replace(place, out_features=size))
                if embedding is None and scalar:
                    head = nn.Sequential(head, nn.Flatten(0))
            objective = method.loss.build(place, criterion)
            if not isinstance(objective, Objective):
                raise TypeError(
                    f"{type(method.loss).__name__}.build returned a {type(objective).__name__}: it "
                    "has to return a losses.Objective."
                )
            for each in (head, objective):
                each.to(first.device, first.dtype)
        modules.append(LocalModule(body, head, objective))
    modules.append(LocalModule(cutting.bodies[-1], None, None))
    _dry_run(network, modules, inputs)
    return cutting, modules


def step_flops(learner: LocalLearner) -> list[float]:
    """FLOPs of a training step of each local module, per sample; backwards by formula."""
    flops = []
    for k, module in enumerate(learner.modules_in_order()):
        body, head = module.body_flops, module.head_flops
        units = max(1, len(module.body.units))
        backward = learner.method.coupling.backward_flops(body, head, units=units, first=k == 0)
        flops.append(body + head + backward)
    return flops


def parameters_per_module(
    module: nn.Module, modules: Sequence[LocalModule]
) -> tuple[list[list[nn.Parameter]], list[list[nn.Parameter]]]:
    """For each local module its parameters of the user's module, and those of its head.

    What lies outside the network belongs to the last local module; without local modules,
    everything belongs to the one there is.
    """
    if not modules:
        return [list(module.parameters())], [[]]
    bodies = [list(each.body.parameters()) for each in modules]
    taken = {id(p) for parameters in bodies for p in parameters}
    bodies[-1].extend(p for p in module.parameters() if id(p) not in taken)
    # A body registers nothing, so a local module's own parameters are its head's.
    return bodies, [list(each.parameters()) for each in modules]


def _output_form(output: Any, out_features: int | None, name: str) -> tuple[int, bool]:
    """Number of logits and whether heads pool, by the rank of the network's output."""
    tensor = isinstance(output, torch.Tensor)
    if tensor and output.ndim == 1 and out_features is None:  # a number per sample
        return 1, True
    if tensor and output.ndim in (2, 3):
        return out_features or output.shape[-1], output.ndim == 2
    if out_features is not None:
        return out_features, True
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    raise ValueError(
        f"`{name}` returns {shape}; heads predict a number or a vector per sample, (N,) or (N, C), "
        "or one per token, (N, T, V). Pass LocalLearner(out_features=...) for heads that predict "
        "per sample, with a criterion that takes (N, out_features)."
    )


def _dry_run(network: nn.Module, modules: Sequence[LocalModule], inputs: Any) -> None:
    """Finds what only running tells: what is overwritten in place, and what a forward costs.

    A tensor's version counts what was done to it in place.
    """
    with torch.random.fork_rng(devices=[]):
        heads = [copy.deepcopy(module.head) for module in modules]
        others = [
            copy.deepcopy(module.objective.networks()) if module.objective is not None else []
            for module in modules
        ]

    def run(host: nn.Module, *values: Any) -> None:
        current: tuple[Any, ...] = values
        first = values[0]
        samples = first.shape[0] if isinstance(first, torch.Tensor) and first.ndim else 1
        for module, head, more in zip(modules, heads, others, strict=True):
            body = module.body
            given = [v for v in current[:1] if isinstance(v, torch.Tensor)]
            before = [v._version for v in given]
            with FlopCounterMode(display=False) as counter:
                current = body.codes[True].function(host, *current)
            module.body_flops = counter.get_total_flops() // samples
            body.in_place = before != [v._version for v in given]
            if head is None:
                return
            version = current[0]._version
            with FlopCounterMode(display=False) as counter:
                _fake_head(head, current[0])
                module.head_in_place = current[0]._version != version
                for each in more:
                    _fake_head(each, current[0])
            module.head_flops = counter.get_total_flops() // samples

    on_fakes(network, run, inputs)


def _fake_head(head: nn.Module, hidden: torch.Tensor) -> None:
    """Runs a head on fakes of its own parameters, made in the mode that is active."""
    tensors = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    if isinstance(hidden, FakeTensor):
        mode = hidden.fake_mode
        tensors = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
    torch.func.functional_call(head, tensors, (hidden,))
