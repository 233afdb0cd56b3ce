"""Networks in a few words, of modules and a forward; cut, and composed again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from settings import cut_network
from torch import nn

from lightning_local import Partition
from lightning_local.cutting import Cutting

D = 6
IMAGE, VECTOR, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(4, D), torch.randn(4, 5, D)


def net(forward: Callable[..., torch.Tensor], **modules: nn.Module) -> nn.Module:
    """A network of the user's class with these modules and this forward."""
    network = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(network, name, module)
    return network


def linear(outputs: int = D) -> nn.Linear:
    return nn.Linear(D, outputs)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def cut(network: nn.Module, *inputs: torch.Tensor, **request) -> Cutting:
    return cut_network(network, Partition(**request), inputs)


def composed(bodies, *inputs: torch.Tensor) -> torch.Tensor:
    values = inputs
    for body in bodies:
        values = body(*values)
    return values
