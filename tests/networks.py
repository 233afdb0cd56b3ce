"""Tiny networks for the tests that compare numbers.

Every network tells its *pieces*: one module per unit, in order, as a person would cut it. Chained,
they are the network. `reference.py` gets them, so it needs nothing of the package's own cutting.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

CLASSES = 4


class Glue(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class ConvBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)))


class Cnn(nn.Module):
    """Five blocks, conv-BN-ReLU in place; the classifier belongs to the last one."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 6, 6, 8, 8, 10]
        strides = [1, 2, 1, 2, 1]
        self.blocks = nn.Sequential(
            *(ConvBlock(*w) for w in zip(widths, widths[1:], strides, strict=False))
        )
        self.fc = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))

    def pieces(self) -> list[nn.Module]:
        end = nn.Sequential(self.blocks[-1], Glue(lambda x: x.mean((2, 3))), self.fc)
        return [*self.blocks[:-1], end]


class ResBlock(nn.Module):
    """Two 3x3 convolutions: the form that `Augmented` makes residual blocks of."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A stem and four residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.layer1 = nn.Sequential(ResBlock(4, 4), ResBlock(4, 4))
        self.layer2 = nn.Sequential(ResBlock(4, 8, 2), ResBlock(8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer2(self.layer1(self.stem(x)))
        return self.fc(functional.adaptive_avg_pool2d(hidden, 1).flatten(1))

    def pieces(self) -> list[nn.Module]:
        pool = Glue(lambda x: functional.adaptive_avg_pool2d(x, 1).flatten(1))
        end = nn.Sequential(self.layer2[1], pool, self.fc)
        return [self.stem, *self.layer1, self.layer2[0], end]


class PreActBlock(nn.Module):
    """Begins by overwriting what it is given."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(self.relu(x)))


class PreAct(nn.Module):
    """Four blocks that start with an in-place activation; the first overwrites the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            PreActBlock(3, 6), PreActBlock(6, 6), PreActBlock(6, 8, 2), PreActBlock(8, 8)
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(functional.relu(self.blocks(x)).mean((2, 3)))

    def pieces(self) -> list[nn.Module]:
        pool = Glue(lambda x: functional.relu(x).mean((2, 3)))
        return [*self.blocks[:-1], nn.Sequential(self.blocks[-1], pool, self.fc)]


class Mlp(nn.Module):
    """Linear-BN-ReLU three times, and a linear layer: four units on `(N, D)`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [7, 12, 10, 8]
        self.layers = nn.Sequential()
        for a, b in zip(sizes, sizes[1:], strict=False):
            self.layers.extend([nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True)])
        self.layers.append(nn.Linear(sizes[-1], CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def pieces(self) -> list[nn.Module]:
        return [self.layers[i : i + 3] for i in (0, 3, 6, 9)]


class EncoderBlock(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(features, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(features)
        self.mlp = nn.Sequential(
            nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Tokens `(N, T, 5)`: an embedding, three encoder blocks, their mean, a classifier."""

    pooled = True

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.encoder = nn.ModuleList(EncoderBlock(8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.encoder:
            x = block(x)
        return self.predict(x)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.fc(x.mean(1) if self.pooled else x)

    def pieces(self) -> list[nn.Module]:
        pool = Glue(lambda x: x.mean(1) if self.pooled else x)
        end = nn.Sequential(self.encoder[2], self.norm, pool, self.fc)
        return [self.embed, self.encoder[0], self.encoder[1], end]


class Tagger(Vit):
    """The same with one prediction per token, `(N, T, classes)`."""

    pooled = False
