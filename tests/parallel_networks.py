"""Networks that are hard to part: in place, with masks, in another layout, with a state."""

import torch
from simple import CLASSES
from torch import nn
from torch.nn import functional


class Classifier(nn.Module):
    """A stem, blocks and a linear layer."""

    def __init__(self, make_block, blocks=3, width=6):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(make_block(width) for _ in range(blocks))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class InPlace(nn.Module):
    """Begins with an operation that overwrites what it is given."""

    def __init__(self, width):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.bn(self.conv(self.relu(x)))


class InPlaceFirst(Classifier):
    """Overwrites even the batch."""

    def forward(self, x):
        return super().forward(x.mul_(0.5))


class ChannelsLast(Classifier):
    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x, mask):
        return functional.relu(self.bn(self.conv(x))) * mask


class Masked(Classifier):
    """A mask of the input, and one of a hidden state without gradient, go along to every block."""

    def forward(self, x):
        mask = x > 0
        x = self.stem(x)
        gate = (x.detach() > 0.5).any(1, keepdim=True)
        for block in self.blocks:
            x = block(x, mask | gate if x.shape[2:] == mask.shape[2:] else mask)
        return self.fc(x.mean((2, 3)))


class Counting(InPlace):
    """A block with a state beside its tensors."""

    def __init__(self, width):
        super().__init__(width)
        self.count = 0

    def forward(self, x):
        if self.training:
            self.count += 1
        return super().forward(x)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


class Still(nn.Module):
    """Without dropout and running statistics."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return functional.relu(x + self.conv(x))
