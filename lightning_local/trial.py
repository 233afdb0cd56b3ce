"""A trial of local modules on fake tensors: what they overwrite, and what a forward costs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_local.augmented import UnitCopy
from lightning_local.fake_run import on_fakes
from lightning_local.local_module import LocalModule
from lightning_local.preserving import attributes_kept

__all__ = ["try_modules"]


def try_modules(
    network: nn.Module,
    modules: Sequence[LocalModule],
    inputs: Any,
    fakes: FakeTensorMode | None = None,
) -> None:
    """Finds what only running tells: what is overwritten in place, and what a forward costs.

    A tensor's version counts what was done to it in place.
    """
    heads = [module.head for module in modules]
    others = [module.objective.networks() if module.objective else [] for module in modules]
    if fakes is None:
        with torch.random.fork_rng(devices=[]):
            heads, others = copy.deepcopy(heads), copy.deepcopy(others)

    def run(host: nn.Module, *values: Any) -> None:
        current: tuple[Any, ...] = values
        first = values[0]
        samples = first.shape[0] if isinstance(first, torch.Tensor) and first.ndim else 1
        buffers = _buffers(host)
        for module, head, more in zip(modules, heads, others, strict=True):
            with FlopCounterMode(display=False) as counter:
                given = current
                before = _version(given)
                for part in module.pieces or (module.body,):
                    current = _noting(part, part.codes[True].function, host, *current)
                module.body.in_place = before != _version(given)
            earlier, buffers = buffers, _buffers(host)
            # What is made now, such as a table of positions, is no state.
            module.body.changes = tuple(n for n in earlier if buffers.get(n) != earlier[n])
            module.body_flops = counter.get_total_flops() // samples
            if head is None:
                return
            before = _version(current)
            with FlopCounterMode(display=False) as counter:
                _fake_head(head, current[0], module.head)
                module.head_in_place = before != _version(current)
                module.predict_flops = counter.get_total_flops() // samples
                for each in more:
                    _fake_head(each, current[0])
            module.head_flops = counter.get_total_flops() // samples

    on_fakes(network, run, inputs, mode=fakes)


def _buffers(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor each buffer is, and how often it was changed in place."""
    # Names of one layer in several places too.
    named = network.named_buffers(remove_duplicate=False)
    return {name: (id(buffer), buffer._version) for name, buffer in named}


def _version(values: Sequence[Any]) -> int | None:
    return values[0]._version if values and isinstance(values[0], torch.Tensor) else None


def _noting(layer: Any, run: Callable[..., Any], *values: Any) -> Any:
    """`run(*values)`; the layer's `overwrites` then says whether that changed any of them."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    before = [tensor._version for tensor in tensors]
    result = run(*values)
    layer.overwrites = before != [tensor._version for tensor in tensors]
    return result


def _fake_head(head: nn.Module, hidden: torch.Tensor, original: nn.Module | None = None) -> None:
    """Runs a head on fakes of its own parameters, made in the mode that is active."""
    patched: list[nn.Module] = []
    for layer, own in zip(head.modules(), original.modules() if original else (), strict=False):
        if isinstance(own, UnitCopy):
            layer.__dict__["forward"] = functools.partial(_noting, own, layer.forward)
            patched.append(layer)
    tensors = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    if isinstance(hidden, FakeTensor):
        mode = hidden.fake_mode
        tensors = {
            name: tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
            for name, tensor in tensors.items()
        }
    try:
        with attributes_kept(head):
            torch.func.functional_call(head, tensors, (hidden,))
    finally:
        for layer in patched:
            del layer.__dict__["forward"]
