"""Local learning as one writes it for a single network: no Lightning, no tracing, a dozen lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import ResNet, VisionTransformer

from examples.image_classification import CifarResNet

__all__ = ["ByHand", "EndToEndByHand", "parts_of"]


class _Call(nn.Module):
    """A function between layers, as a layer."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Calls it."""
        return self.function(x)


def parts_of(network: nn.Module) -> list[nn.Module]:
    """The network as a chain of its units, in the author's own order of layers."""
    if isinstance(network, CifarResNet):
        first: list[nn.Module] = [network.conv1, network.bn1, network.relu]
        blocks = [*network.layer1, *network.layer2, *network.layer3]
        last: list[nn.Module] = [_Call(lambda x: x.mean((2, 3))), network.fc]
    elif isinstance(network, ResNet):
        first = [network.conv1, network.bn1, network.relu, network.maxpool]
        blocks = [*network.layer1, *network.layer2, *network.layer3, *network.layer4]
        last = [network.avgpool, nn.Flatten(), network.fc]
    elif isinstance(network, VisionTransformer):
        encoder = network.encoder

        def embed(x: torch.Tensor) -> torch.Tensor:
            tokens = network._process_input(x)
            tokens = torch.cat([network.class_token.expand(len(x), -1, -1), tokens], 1)
            return encoder.dropout(tokens + encoder.pos_embedding)

        first = [_Call(embed)]
        blocks = list(encoder.layers)
        last = [encoder.ln, _Call(lambda x: x[:, 0]), network.heads]
    else:
        raise ValueError(f"{type(network).__name__} has not been taken apart by hand yet.")
    return [nn.Sequential(*first), *blocks[:-1], nn.Sequential(blocks[-1], *last)]


class EndToEndByHand:
    """Plain backpropagation.

    Args:
        network: What is trained.
        make_optimizer: Makes the optimizer.
    """

    def __init__(self, network: nn.Module, make_optimizer: Callable[[Any], Any]) -> None:
        self.network, self.optimizer = network, make_optimizer(network.parameters())

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One batch."""
        functional.cross_entropy(self.network(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class ByHand:
    """Gradient-isolated local modules.

    Args:
        bodies: K of them.
        heads: K - 1.
        make_optimizer: Makes a local module's optimizer.
        linked: Send each error one boundary back (BackLink).
    """

    def __init__(
        self,
        bodies: Sequence[nn.Module],
        heads: Sequence[nn.Module],
        make_optimizer: Callable[[Any], Any],
        linked: bool,
    ) -> None:
        self.bodies, self.heads, self.linked = bodies, [*heads, nn.Identity()], linked
        self.optimizers = [
            make_optimizer([p for part in pair for p in part.parameters()])
            for pair in zip(bodies, self.heads, strict=True)
        ]

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One batch."""
        before: torch.Tensor | None = None
        for k, (body, head) in enumerate(zip(self.bodies, self.heads, strict=True)):
            if self.linked and k:
                x.requires_grad_()
            hidden = body(x)
            loss = functional.cross_entropy(head(hidden), y)
            loss.backward(retain_graph=self.linked and k + 1 < len(self.bodies))
            if before is not None:
                before.backward(x.grad, inputs=list(self.bodies[k - 1].parameters()))
                self._finish(k - 1)
            if self.linked and k + 1 < len(self.bodies):
                before = hidden
            else:
                before = None
                self._finish(k)
            x = hidden.detach()

    def _finish(self, k: int) -> None:
        self.optimizers[k].step()
        self.optimizers[k].zero_grad()
